"""A version of the manifest log as a value, and its bytes (FORMAT.md §4.2).

Pure: no I/O, clock or randomness. Decoding is total: every document is either a `Delta` or raises `Unusable`; sizes are
checked before anything is allocated from them. Encoding refuses what decoding would refuse, so no writer of ours can
put a document into the log that stops its readers.
Raises `Unusable` (kinds: format, oversized), nothing else.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pybase64

from lmcache_s3.errors import Unusable
from lmcache_s3.index.courtesy import breathe
from lmcache_s3.types import FORMAT_VERSION, HASH_BYTES, ExtentName, ExtentRecord, Grid

MAX_VERSION_BYTES = 16 * 2**20
"""No version object is longer."""
MAX_CHUNKS = 2**16
"""Chunks in one extent (a position is stored as u16)."""
MAX_CELLS = 2**18
"""Cells in one extent: chunks × shards."""
MAX_INTEGER = 2**63 - 1
"""No number in a document is larger: versions, tokens, bytes."""
NOBODY = ""
"""`Delta.lead`: the leader steps down."""

_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{32}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one version changes.

    writer: ULID of the process that made it. lead: a leader's ULID, `NOBODY` (steps down), or None (unchanged).
    access: extents hit lately. floor: adds born below it are void from the next version on; 0 changes nothing.
    """

    writer: str
    add: tuple[ExtentRecord, ...] = ()
    remove: tuple[ExtentName, ...] = ()
    floor: int = 0
    lead: str | None = None
    access: tuple[ExtentName, ...] = ()


def encode_delta(delta: Delta) -> bytes:
    """The version object's bytes. Raises `Unusable` for what no reader would accept."""
    for record in delta.add:
        check_record(record)
    document: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "writer": ulid_of(delta.writer),
        "add": [_record_json(record) for record in delta.add],
        "remove": [str(name) for name in delta.remove],
        "floor": delta.floor,
        "access": [str(name) for name in delta.access],
    }
    if delta.lead is not None:
        document["lead"] = ulid_of(delta.lead) if delta.lead else None
    data = json.dumps(document, separators=(",", ":")).encode()
    if len(data) > MAX_VERSION_BYTES:
        raise Unusable(f"a version of {len(data)} bytes exceeds {MAX_VERSION_BYTES}", kind="oversized")
    return data


def decode_delta(data: bytes, version: int) -> Delta:
    """The delta of version `version`. Unknown keys are ignored; absent lists are empty. Raises `Unusable`."""
    document = load_json(data, MAX_VERSION_BYTES)
    check_format(document)
    floor = integer(document.get("floor", 0), "floor")
    if floor >= version:
        raise _bad(f"floor {floor} is not below version {version}")
    lead: str | None = None
    if "lead" in document:
        lead = NOBODY if document["lead"] is None else ulid_of(document["lead"])
    return Delta(
        writer=ulid_of(document.get("writer")),
        add=tuple(_record(item) for item in _list(document, "add")),
        remove=tuple(name_of(item) for item in _list(document, "remove")),
        floor=floor,
        lead=lead,
        access=tuple(name_of(item) for item in _list(document, "access")),
    )


def check_record(record: ExtentRecord) -> None:
    """Raises `Unusable` if the record exceeds the format's bounds (its lengths were checked when it was made)."""
    name_of(str(record.name))
    _check_bounds(record)


def _check_bounds(record: ExtentRecord) -> None:
    """All but the name."""
    name, cells = record.name, record.name.n_chunks * record.grid.shards
    if record.grid.stages < 1 or record.grid.head_groups < 1 or cells > MAX_CELLS:
        raise _bad(f"extent {name}: {cells} cells; a grid is positive and an extent has at most {MAX_CELLS} cells")
    if max(record.first_token, record.raw_bytes) > MAX_INTEGER:
        raise _bad(f"extent {name}: numbers beyond 63 bits")
    # Different halves are different hashes, and quicker to tell apart.
    halves = memoryview(record.hashes).cast("Q")[::2]
    if len(set(halves)) != name.n_chunks and len(set(record.chunk_hashes())) != name.n_chunks:
        raise _bad(f"extent {name}: a prefix hash occurs twice")


def record_size(record: ExtentRecord) -> int:
    """About how many bytes the record takes in a version; never too few."""
    return 512 + (len(record.hashes) + len(record.lengths) + len(record.sums)) * 4 // 3


def name_of(value: object) -> ExtentName:
    """An extent's name from a document, within the format's bounds. Raises `Unusable`."""
    if not isinstance(value, str):
        raise _bad("an extent's name is not a string")
    name = ExtentName.parse(value)
    if name.n_chunks > MAX_CHUNKS or name.born > MAX_INTEGER:
        raise _bad(f"extent {name}: at most {MAX_CHUNKS} chunks, born within 63 bits")
    return name


def load_json(data: bytes, limit_bytes: int) -> dict[str, Any]:
    """Strict JSON object: UTF-8, no duplicate keys, no NaN, bounded. Raises `Unusable`."""
    if len(data) > limit_bytes:
        raise Unusable(f"document of {len(data)} bytes exceeds {limit_bytes}", kind="oversized")
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise _bad(f"not JSON: {e}"[:200]) from e
    if not isinstance(document, dict):
        raise _bad("not a JSON object")
    return document


def check_format(document: Mapping[str, object]) -> None:
    """Raises `Unusable` unless the document is of our format version, naming the mend if it is newer."""
    version = integer(document.get("format"), "format")
    if version > FORMAT_VERSION:
        raise _bad(f"format {version} is newer than {FORMAT_VERSION}: upgrade lmcache-s3 here")
    if version != FORMAT_VERSION:
        raise _bad(f"unknown format {version}")


def integer(value: object, what: str, *, low: int = 0, high: int = MAX_INTEGER) -> int:
    """An integer (not a bool) within [low, high]. Raises `Unusable`."""
    if type(value) is not int or not low <= value <= high:
        raise _bad(f"{what} is not an integer from {low} to {high}")
    return value


def hash_of(value: object, what: str) -> bytes:
    if not isinstance(value, str) or _HASH.fullmatch(value) is None:
        raise _bad(f"{what} is not {2 * HASH_BYTES} lower-case hex digits")
    return bytes.fromhex(value)


def _record_json(record: ExtentRecord) -> dict[str, Any]:
    return {
        "name": str(record.name),
        "parent": record.parent.hex(),
        "first_token": record.first_token,
        "stages": record.grid.stages,
        "head_groups": record.grid.head_groups,
        "hashes": pybase64.b64encode_as_string(record.hashes),
        "lengths": pybase64.b64encode_as_string(record.lengths),
        "sums": pybase64.b64encode_as_string(record.sums),
        "raw_bytes": record.raw_bytes,
    }


def _record(value: object) -> ExtentRecord:
    if not isinstance(value, dict):
        raise _bad("an added extent is not an object")
    name = name_of(value.get("name"))
    stages = integer(value.get("stages"), "stages", low=1, high=MAX_CELLS)
    head_groups = integer(value.get("head_groups"), "head_groups", low=1, high=MAX_CELLS)
    record = ExtentRecord(
        name=name,
        grid=Grid(stages, head_groups),
        parent=hash_of(value.get("parent"), "parent"),
        first_token=integer(value.get("first_token"), "first_token"),
        hashes=_base64(value.get("hashes"), "hashes"),
        lengths=_base64(value.get("lengths"), "lengths"),
        sums=_base64(value.get("sums"), "sums"),
        raw_bytes=integer(value.get("raw_bytes"), "raw_bytes", low=1),
    )
    _check_bounds(record)
    breathe()
    return record


def _base64(value: object, what: str) -> bytes:
    if not isinstance(value, str):
        raise _bad(f"{what} is not a string")
    try:
        data: bytes = pybase64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as e:
        raise _bad(f"{what} is not base64") from e
    if pybase64.b64encode_as_string(data) != value:
        raise _bad(f"{what} is not canonical base64")
    return data


def _list(document: Mapping[str, Any], key: str) -> list[object]:
    value = document.get(key, [])
    if not isinstance(value, list):
        raise _bad(f"{key} is not a list")
    return value


def ulid_of(value: object) -> str:
    """A writer or leader. Raises `Unusable`."""
    if not isinstance(value, str) or _ULID.fullmatch(value) is None:
        raise _bad("writer or leader is not a ULID")
    return value


def _unique(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    pairs = list(pairs)
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key occurs twice")
    return out


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _bad(why: str) -> Unusable:
    return Unusable(why, kind="format")
