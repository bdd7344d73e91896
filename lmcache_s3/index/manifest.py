"""Versions as values: deltas, the floor, and how they add up to a state (FORMAT.md §4).

Pure: no I/O, clock or randomness (`log` has those). A `State` is a pure function of versions 1…n; states share
structure, so applying a delta costs what it changes and one reference is a consistent snapshot for ever.
Invariants: a chunk resolves to the extent added first among the live ones; the floor only rises; extents are in the
order of their first add (`LiveExtent.order`).
Raises `Unusable` on a malformed document or key, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from immutables import Map

from lmcache_s3.errors import Unusable
from lmcache_s3.index.delta import (
    MAX_CELLS,
    MAX_CHUNKS,
    MAX_INTEGER,
    MAX_VERSION_BYTES,
    NOBODY,
    Delta,
    check_record,
    decode_delta,
    encode_delta,
    record_size,
)
from lmcache_s3.types import ChunkRef, ExtentName, ExtentRecord, space_prefix

__all__ = [
    "EMPTY",
    "MAX_CELLS",
    "MAX_CHUNKS",
    "MAX_INTEGER",
    "MAX_VERSION_BYTES",
    "MILESTONE",
    "NOBODY",
    "Delta",
    "LiveExtent",
    "State",
    "Verdict",
    "apply",
    "check_record",
    "checkpoint_key",
    "checkpoints_prefix",
    "decode_delta",
    "encode_delta",
    "fence",
    "judged",
    "log_key",
    "parse_checkpoint_key",
    "record_size",
    "segments_prefix",
]

MILESTONE = 4096
"""Versions that are multiples of it are never deleted."""
_LAST = 10**20 - 1


class Verdict(Enum):
    """What the manifest says of an extent that somebody wants added. Each of them is final for its writer."""

    LIVE = "live"
    VOID = "void"
    """Born below the floor: its writer was stalled too long, and the extent may be collected any time."""
    COVERED = "covered"
    """Every chunk of it is in live extents already: it would add nothing."""


@dataclass(frozen=True, slots=True)
class LiveExtent:
    """An extent of the state. created, last_access: version numbers. place: where in its version's `add` it stood."""

    record: ExtentRecord
    created: int
    last_access: int
    place: int

    @property
    def order(self) -> tuple[int, int]:
        """Sorts extents by first add."""
        return (self.created, self.place)


@dataclass(frozen=True, slots=True)
class State:
    """Everything versions 1…version say. Immutable.

    chunks: prefix hash (16 bytes) → where it lies, in the order of first add; never empty tuples.
    lead: ULID of the process that merges the inbox, or None.
    """

    version: int
    floor: int
    lead: str | None
    extents: Map[ExtentName, LiveExtent]
    chunks: Map[bytes, tuple[ChunkRef, ...]]

    def in_order(self) -> Iterator[LiveExtent]:
        """Live extents in the order of their first add."""
        return iter(sorted(self.extents.values(), key=lambda live: live.order))


EMPTY = State(0, 0, None, Map(), Map())
"""Version 0."""


def apply(state: State, delta: Delta) -> State:
    """The state one version on: add (void if born below the floor as before), remove, access, lead, floor."""
    version = state.version + 1
    extents, chunks = state.extents.mutate(), state.chunks.mutate()
    for place, record in enumerate(delta.add):
        if record.name in extents or record.name.born < state.floor:
            continue
        extents[record.name] = LiveExtent(record, version, version, place)
        for position, prefix_hash in enumerate(record.chunk_hashes()):
            chunks[prefix_hash] = (*chunks.get(prefix_hash, ()), ChunkRef(prefix_hash, record, position))
    for name in delta.remove:
        if name not in extents:
            continue
        for prefix_hash in extents.pop(name).record.chunk_hashes():
            left = tuple(ref for ref in chunks[prefix_hash] if ref.extent.name != name)
            if left:
                chunks[prefix_hash] = left
            else:
                del chunks[prefix_hash]
    for name in delta.access:
        if name in extents:
            live = extents[name]
            extents[name] = LiveExtent(live.record, live.created, version, live.place)
    return State(
        version=version,
        floor=max(state.floor, delta.floor),
        lead=state.lead if delta.lead is None else (delta.lead or None),
        extents=extents.finish(),
        chunks=chunks.finish(),
    )


def judged(state: State, record: ExtentRecord) -> Verdict | None:
    """What the state says of this extent; None: nothing yet, so it may be added."""
    if record.name in state.extents:
        return Verdict.LIVE
    if record.name.born < state.floor:
        return Verdict.VOID
    if all(prefix_hash in state.chunks for prefix_hash in record.chunk_hashes()):
        return Verdict.COVERED
    return None


def fence(version: int, milestone: int = MILESTONE) -> int:
    """The second milestone above `version`. While it is absent, no version ≥ `version` was ever deleted."""
    return (version // milestone + 2) * milestone


# ---- keys ----------------------------------------------------------------------------------------------------------


def log_key(space_id: str, version: int) -> str:
    return f"{space_prefix(space_id)}manifest/log/{version:020d}"


def checkpoints_prefix(space_id: str) -> str:
    return f"{space_prefix(space_id)}manifest/checkpoints/"


def checkpoint_key(space_id: str, version: int, nonce: str) -> str:
    """Key of a checkpoint's index; the newest version sorts first."""
    return f"{checkpoints_prefix(space_id)}{_LAST - version:020d}.{nonce}.json"


def segments_prefix(space_id: str, version: int, nonce: str) -> str:
    """Key prefix of a checkpoint's segments, with trailing slash."""
    return f"{space_prefix(space_id)}segments/{version:020d}.{nonce}/"


_CHECKPOINT = re.compile(r"([0-9]{20})\.([0-9a-f]{32})\.json", re.ASCII)


def parse_checkpoint_key(key: str) -> tuple[int, str]:
    """(version, nonce) of a checkpoint's key. Raises `Unusable` for any other object there."""
    m = _CHECKPOINT.fullmatch(key.rpartition("/")[2])
    if m is None or _LAST - int(m[1]) > MAX_INTEGER:
        raise Unusable(f"{key[:200]!r} is not a checkpoint", kind="format", key=key[:200])
    return _LAST - int(m[1]), m[2]
