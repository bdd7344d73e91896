"""When is KV reusable? The identity of a space, and the hash of a prefix. FORMAT.md gives the bytes.

A `Space` names everything that changes the bits of a KV cache, and nothing else: no path, parallel layout, GPU or
engine version. Its id is the SHA-256 of its canonical JSON (RFC 8785). A prefix hash chains all tokens up to a chunk's
end, seeded by the space and the salt: equal hash, equal KV, in every process, whatever PYTHONHASHSEED says.

Pure: no I/O, clock or randomness (`weights` reads the files). Raises `Invalid` for arguments that make no sense and
`Unusable` for a stored space.json that cannot be read, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, TypeAlias, get_args

import numpy as np
import rfc8785

from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.types import FORMAT_VERSION, HASH_BYTES, Geometry, KVDtype
from lmcache_s3.weights import weights_digest

__all__ = ["ExtraKey", "KVGroup", "PrefixHasher", "Space", "prefix_hashes", "root_hash", "weights_digest"]

JSON: TypeAlias = str | int | float | bool | list[Any] | dict[str, Any] | None
Tokens: TypeAlias = Sequence[int] | np.ndarray

ATTENTION_KINDS = ("full", "sliding", "chunked", "mla")
MAX_SPACE_JSON_BYTES = 1 << 16
"""No space.json is longer; more is not read."""
_MAX_DIMENSION = 1 << 20
_ROOT_TAG = b"lmcache-s3/1/root\0"
_CHUNK_TAG = b"lmcache-s3/1/chunk\0"
_HEX64 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_HEX = re.compile(r"(?:[0-9a-f]{2})+", re.ASCII)
_WORD = re.compile(r"[a-z0-9_-]{1,64}", re.ASCII)
_FIDELITY = re.compile(r"exact|kl[0-9][0-9.e-]{0,30}|unmeasured-[a-z0-9_-]{1,64}-[A-Za-z0-9._+-]{1,64}", re.ASCII)


def _count(name: str, value: object, maximum: int = _MAX_DIMENSION) -> None:
    if type(value) is not int or not 1 <= value <= maximum:
        raise Invalid(f"{name}: {value!r} is not a whole number from 1 to {maximum}", kind="argument", key=name)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """`layers` layers whose KV has one shape and one attention pattern.

    kind: `full`, `sliding` or `chunked` (with `window` tokens), or `mla` (kv=1, heads=1: the joint latent).
    """

    kind: str
    layers: int
    kv: int
    heads: int
    head_dim: int
    window: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ATTENTION_KINDS:
            raise Invalid(f"kind: {self.kind!r} is none of {', '.join(ATTENTION_KINDS)}", kind="argument", key="kind")
        for name in ("layers", "heads", "head_dim"):
            _count(name, getattr(self, name))
        _count("kv", self.kv, 2)
        if (self.kind in ("sliding", "chunked")) != (self.window is not None):
            raise Invalid(
                f"window: {self.window!r} does not go with {self.kind} attention", kind="argument", key="window"
            )
        if self.window is not None:
            _count("window", self.window, 1 << 40)


def canonical_json(value: JSON) -> bytes:
    """RFC 8785. Raises `Invalid` for what it cannot write (NaN, whole numbers beyond 2⁵³, keys that are no text)."""
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, RecursionError, UnicodeEncodeError) as e:
        raise Invalid(f"no canonical JSON for {str(value)[:80]}: {e}", kind="argument") from e


def _whole_number(digits: str) -> int | float:
    # RFC 8785 knows doubles only: it writes 1e16 as digits, and refuses larger ints.
    return int(digits) if len(digits) < 16 else float(digits)


def _parse(data: bytes) -> Any:
    return json.loads(data, parse_int=_whole_number)


@dataclass(frozen=True)
class Space:
    """Everything on which the bits of a KV cache depend; one index and one set of extents per space.

    weights: `weights_digest` of the model (64 hex digits). rope: the rotary embedding's parameters, any JSON.
    quantisation: how the engine changed the weights after loading them, None if it did not. fidelity: `exact`,
    `kl<bound>` or `unmeasured-<codec>-<level>`. model: a name for people; not part of the identity.
    """

    weights: str
    kv_dtype: KVDtype
    groups: tuple[KVGroup, ...]
    rope: Mapping[str, JSON] = field(default_factory=dict)
    chunk_tokens: int = 256
    quantisation: str | None = None
    fidelity: str = "exact"
    model: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.weights, str) or _HEX64.fullmatch(self.weights) is None:
            raise Invalid(f"weights: {self.weights!r} is not a SHA-256 (64 hex digits)", kind="argument", key="weights")
        if self.kv_dtype not in get_args(KVDtype):
            raise Invalid(
                f"kv_dtype: {self.kv_dtype!r} is none of {', '.join(get_args(KVDtype))}",
                kind="argument",
                key="kv_dtype",
            )
        if not self.groups or not all(isinstance(g, KVGroup) for g in self.groups):
            raise Invalid("groups: a space needs at least one group of layers", kind="argument", key="groups")
        _count("chunk_tokens", self.chunk_tokens, 1 << 16)
        if self.quantisation is not None and not (isinstance(self.quantisation, str) and self.quantisation):
            raise Invalid(f"quantisation: {self.quantisation!r} is no name", kind="argument", key="quantisation")
        if not isinstance(self.fidelity, str) or _FIDELITY.fullmatch(self.fidelity) is None:
            raise Invalid(
                f"fidelity: {self.fidelity!r} is not exact, kl<bound> or unmeasured-<codec>-<level>",
                kind="argument",
                key="fidelity",
            )
        if not isinstance(self.rope, Mapping):
            raise Invalid(f"rope: {self.rope!r} is not a JSON object", kind="argument", key="rope")
        # A private copy in canonical form: nobody can change the identity behind our back, and 500000.0 equals 500000.
        object.__setattr__(self, "rope", _parse(canonical_json(dict(self.rope))))
        object.__setattr__(self, "groups", tuple(self.groups))

    def identity(self) -> dict[str, JSON]:
        """What the id is the hash of."""
        return {
            "format": FORMAT_VERSION,
            "weights": self.weights,
            "quantisation": self.quantisation,
            "kv_dtype": self.kv_dtype,
            "groups": [asdict(g) for g in self.groups],
            "rope": dict(self.rope),
            "chunk_tokens": self.chunk_tokens,
            "fidelity": self.fidelity,
        }

    def canonical(self) -> bytes:
        return canonical_json(self.identity())

    @cached_property
    def id(self) -> str:
        """64 hex digits: SHA-256 of `canonical()`."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def geometry(self) -> Geometry:
        """Shape of a chunk. Raises `Invalid` for hybrid models (several groups), which have one array per group."""
        if len(self.groups) != 1:
            kinds = ", ".join(f"{g.layers} {g.kind}" for g in self.groups)
            raise Invalid(
                f"this model's layers differ in their KV ({kinds}): hybrid models are not cached yet", kind="argument"
            )
        g = self.groups[0]
        return Geometry(g.kv, g.layers, g.heads, g.head_dim, self.kv_dtype, self.chunk_tokens)

    def to_json(self) -> bytes:
        """The bytes of space.json: canonical, so every writer of one space (and name) writes the same."""
        return canonical_json({"format": FORMAT_VERSION, "identity": self.identity(), "model": self.model})

    @classmethod
    def from_json(cls, data: bytes) -> Space:
        """Read space.json; everything is checked. Raises `Unusable(format)`."""
        if len(data) > MAX_SPACE_JSON_BYTES:
            raise Unusable(f"space.json: {len(data)} bytes are too many", kind="oversized", key="space.json")
        try:
            document = _parse(data)
            if set(document) != {"format", "identity", "model"} or not isinstance(document["model"], str):
                raise _bad_space("unexpected members")
            identity = document["identity"]
            if document["format"] != FORMAT_VERSION or identity["format"] != FORMAT_VERSION:
                raise _bad_space(f"format {document['format']!r} is not {FORMAT_VERSION}; upgrade lmcache-s3")
            if set(identity) != _IDENTITY_KEYS or any(set(g) != _GROUP_KEYS for g in identity["groups"]):
                raise _bad_space("unexpected members of the identity")
            members = {k: v for k, v in identity.items() if k not in ("format", "groups")}
            groups = tuple(KVGroup(**g) for g in identity["groups"])
            return cls(groups=groups, model=document["model"], **members)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise _bad_space(str(e)[:200]) from e


_IDENTITY_KEYS = {f.name for f in fields(Space)} - {"model"} | {"format"}
_GROUP_KEYS = {f.name for f in fields(KVGroup)}


def _bad_space(why: str) -> Unusable:
    return Unusable(f"space.json: {why}", kind="format", key="space.json")


@dataclass(frozen=True, slots=True, order=True)
class ExtraKey:
    """Something besides token ids on which the KV depends, from token `start_token` of the prompt on.

    kind: a word (`lora`, `image` …). digest_hex: of its content, lower-case hex. A LoRA adapter starts at token 0.
    """

    kind: str
    digest_hex: str
    start_token: int

    def __post_init__(self) -> None:
        if _WORD.fullmatch(self.kind) is None:
            raise Invalid(f"extra key: kind {self.kind!r} is not [a-z0-9_-]+", kind="argument")
        if _HEX.fullmatch(self.digest_hex) is None:
            raise Invalid(f"extra key {self.kind}: {self.digest_hex!r} is not lower-case hex", kind="argument")
        if type(self.start_token) is not int or not 0 <= self.start_token < 1 << 53:
            raise Invalid(f"extra key {self.kind}: no token {self.start_token!r}", kind="argument")


def _field(data: bytes | memoryview) -> bytes:
    """F(x) of the format: length as u32 little-endian, then x."""
    return struct.pack("<I", len(data)) + data


def _token_bytes(tokens: Tokens) -> bytes:
    """Token ids as little-endian u32. Raises `Invalid` for anything that is not a whole number below 2³²."""
    if isinstance(tokens, np.ndarray):
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise Invalid(f"tokens: {tokens.dtype} {tokens.shape} is no row of whole numbers", kind="argument")
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < 1 << 32:
            raise Invalid("tokens: an id is negative or beyond 2^32", kind="argument")
        return tokens.astype("<u4").tobytes()
    try:
        # `array` is the fastest strict conversion: it refuses fractions, negative and large numbers.
        return np.frombuffer(array("I", tokens), np.uintc).astype("<u4", copy=False).tobytes()
    except (TypeError, OverflowError) as e:
        raise Invalid(f"tokens: {e}", kind="argument") from e


def root_hash(space_id: str, salt: str = "") -> bytes:
    """The chain's first parent, 32 bytes. salt: a tenant's secret; whoever does not know it can guess no hash."""
    if _HEX64.fullmatch(space_id) is None:
        raise Invalid(f"space id {space_id!r} is not 64 hex digits", kind="argument")
    return hashlib.sha256(_ROOT_TAG + bytes.fromhex(space_id) + _field(salt.encode())).digest()


class PrefixHasher:
    """The hash chain of one prompt that grows; not thread-safe.

    Keeps the 32-byte end of the chain and the tokens of the unfinished chunk, so that `extend` costs only what is new.
    extra: all keys of the prompt whose `start_token` is not yet hashed must be known when their chunk fills.
    """

    def __init__(self, space_id: str, chunk_tokens: int, salt: str = "", extra: Sequence[ExtraKey] = ()) -> None:
        _count("chunk_tokens", chunk_tokens, 1 << 16)
        self._chain = root_hash(space_id, salt)
        self._chunk_tokens = chunk_tokens
        self._extra = sorted(extra)
        self._tail = b""
        self._root = self._chain[:HASH_BYTES]
        self.hashes: list[bytes] = []
        """The first 16 bytes of every full chunk's hash, in order."""

    @property
    def root(self) -> bytes:
        """16 bytes: the parent of the first chunk."""
        return self._root

    @property
    def n_tokens(self) -> int:
        """Tokens seen so far, those of the unfinished chunk included."""
        return len(self.hashes) * self._chunk_tokens + len(self._tail) // 4

    def extend(self, tokens: Tokens) -> list[bytes]:
        """Add tokens; returns the hashes of the chunks that they completed (also appended to `hashes`)."""
        data = memoryview(self._tail + _token_bytes(tokens))
        size = 4 * self._chunk_tokens
        new = [self._chunk(data[i : i + size]) for i in range(0, len(data) - size + 1, size)]
        self._tail = bytes(data[len(new) * size :])
        return new

    def _chunk(self, tokens: memoryview) -> bytes:
        first = len(self.hashes) * self._chunk_tokens
        extra = b""
        if self._extra:
            here = [
                [e.kind, e.digest_hex, e.start_token]
                for e in self._extra
                if first <= e.start_token < first + self._chunk_tokens
            ]
            extra = canonical_json(here) if here else b""
        self._chain = hashlib.sha256(_CHUNK_TAG + self._chain + _field(tokens) + _field(extra)).digest()
        short = self._chain[:HASH_BYTES]
        self.hashes.append(short)
        return short


def prefix_hashes(
    space_id: str, tokens: Tokens, chunk_tokens: int, *, salt: str = "", extra: Sequence[ExtraKey] = ()
) -> list[bytes]:
    """16-byte hashes of the full chunks of a prompt, in order; tokens beyond the last full chunk count for nothing."""
    return PrefixHasher(space_id, chunk_tokens, salt, extra).extend(tokens)
