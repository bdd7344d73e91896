"""What was measured of a lossy codec on a model, as a small document in the bucket (FORMAT.md §2.1).

`lmcache-s3 bench quality --save URL` writes it, opening a cache with `max_kl` reads it: that is how a codec without a
measurement of its own comes to promise a bound. Without `max_kl` nothing is read, so a new measurement moves nobody's
cache into another space. The document is named by all that the figure depends on: the weights, the KV's data type, the
chunk's length, the codec and its level.

Invariant: a codec is never believed to be better than its document says; one that cannot be read counts for nothing.
Raises `Invalid` (setting) with the command that mends it, and the store's errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.codecs.registry import fidelity_class
from lmcache_s3.errors import Invalid, Missing, Unusable
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import FORMAT_VERSION

MAX_DOCUMENT_BYTES = 1 << 16
_MAX_KL = 1e6
"""Nats a token; far beyond any vocabulary's, and so that no number is too large for a float."""
_WEIGHTS = re.compile(r"[0-9a-f]{64}", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9._+-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Subject:
    """What a measurement is of. weights: the model's digest, 64 hex digits."""

    weights: str
    kv_dtype: str
    chunk_tokens: int
    codec: str
    level: str

    def __post_init__(self) -> None:
        words = (self.kv_dtype, self.codec, self.level)
        if _WEIGHTS.fullmatch(self.weights) is None or not all(_WORD.fullmatch(word) for word in words):
            raise Invalid(f"nothing can be measured of {self}", kind="argument")

    @property
    def key(self) -> str:
        """Where the bucket keeps it."""
        return f"quality/{self.weights}/{self.codec}-{self.level}.{self.kv_dtype}.{self.chunk_tokens}.json"


@dataclass(frozen=True, slots=True)
class Measurement:
    """How far answers from a coded cache are from those without coding.

    kl: next-token KL(uncoded ‖ coded), nats per token, of the kind of text that suffers most. about: for people (model,
    texts, bits per value, KL by kind, versions); nothing is decided by it.
    """

    subject: Subject
    kl: float
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        document = {"format": FORMAT_VERSION, **asdict(self.subject), "kl": self.kl, "about": dict(self.about)}
        return json.dumps(document, indent=2, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, subject: Subject) -> Measurement:
        """Read a document that should be about `subject`. Raises `Unusable` (format, position)."""
        try:
            document: Any = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Unusable(f"not JSON ({error})", kind="format", key=subject.key) from error
        if not isinstance(document, dict) or document.get("format") != FORMAT_VERSION:
            raise Unusable(f"not of format {FORMAT_VERSION}", kind="format", key=subject.key)
        if any(document.get(name) != value for name, value in asdict(subject).items()):
            raise Unusable("about something else than its name says", kind="position", key=subject.key)
        kl, about = document.get("kl"), document.get("about", {})
        if not isinstance(about, dict):
            raise Unusable("about is no object", kind="format", key=subject.key)
        if isinstance(kl, bool) or not isinstance(kl, int | float) or not 0 <= kl <= _MAX_KL:
            raise Unusable(f"kl is {str(kl)[:40]}", kind="format", key=subject.key)
        return cls(subject, float(kl), about)


def save(store: ObjectStore, measurement: Measurement) -> None:
    """Put the document; an older one of the same subject is replaced."""
    store.put(measurement.subject.key, measurement.to_json())


def measured_codec(
    store: ObjectStore, codec: KVCodec, max_kl: float | None, *, weights: str, kv_dtype: str, chunk_tokens: int
) -> tuple[KVCodec, str]:
    """The codec with what is known of it on this model, and the fidelity class it writes.

    One GET where a bound is stated and the codec has no measurement of its own; else no I/O. Raises `Invalid` for a
    bound that nobody has shown to hold.
    """
    if max_kl is None or codec.exact or codec.measured_kl is not None:
        return codec, fidelity_class(codec, max_kl)
    subject = Subject(weights, kv_dtype, chunk_tokens, codec.id, codec.level)
    measure = (
        f"lmcache-s3 calibrate MODEL --url {store.url} --kv-dtype {kv_dtype}"  # measures each of its levels
        if codec.id == "transform"
        else f"lmcache-s3 bench quality --model MODEL --codec {codec.id} --level {codec.level} --save {store.url}"
    )
    try:
        data = store.get(subject.key, limit_bytes=MAX_DOCUMENT_BYTES)
        measurement = Measurement.from_json(data, subject)
    except Missing as error:
        raise Invalid(
            f"max_kl={max_kl}: nobody has measured codec {codec.id!r} at level {codec.level!r} on this model "
            f"({kv_dtype}, chunks of {chunk_tokens}): run {measure}, or leave max_kl out",
            kind="setting",
            key="max_kl",
        ) from error
    except Unusable as error:
        raise Invalid(
            f"max_kl={max_kl}: {store.url}: {subject.key} cannot be used ({error}): measure again with {measure}",
            kind="setting",
            key="max_kl",
        ) from error
    known = codec.measured(measurement.kl)
    return known, fidelity_class(known, max_kl)
