"""What became of chunks that the index does not hold: traces in the inbox, the kept versions and the objects.

Reads only: the inbox, the newest versions, and one LIST a chunk, all bounded. Everything read is untrusted; what cannot
be read leaves no trace. Raises the store's `Unavailable` and `Invalid`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import StrEnum

from lmcache_s3.errors import Unusable
from lmcache_s3.extent import MAX_METADATA_BYTES, record_from_metadata
from lmcache_s3.index.delta import MAX_INTEGER, MAX_VERSION_BYTES, decode_delta
from lmcache_s3.index.history import entries, list_versions
from lmcache_s3.index.manifest import State, inbox_prefix
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import ExtentName, ExtentRecord, space_prefix

MAX_VERSIONS = 4096
MAX_INBOX = 512
MAX_LISTS = 256
"""Chunks looked for among the objects, from the first missing one on."""
_AT_ONCE = 16


class Fate(StrEnum):
    """What became of a chunk that the index does not hold; of several the first."""

    WAITING = "waiting"
    """Handed over; the leader has not merged it yet."""
    UPLOADED = "uploaded"
    """Its objects lie there, and may still be committed: an upload under way, or a writer that died."""
    EVICTED = "evicted"
    """It was in the index and was removed."""
    VOID = "void"
    """It was uploaded, but its commit came too late, after the grace, or never."""
    GONE = "gone"
    """Its objects lie there, but can come into the index no more: void, or removed before the versions looked at."""
    NEVER = "never"
    """No trace: never stored, or removed before the versions looked at."""


@dataclass(frozen=True, slots=True)
class Trace:
    """extent: that held it, if known. version: that removed it. since_s: when that was, or when it was handed over or
    uploaded (Unix seconds, the store's)."""

    fate: Fate
    extent: ExtentName | None = None
    version: int | None = None
    since_s: float | None = None


def traces(
    store: ObjectStore, space_id: str, state: State, missing: Sequence[bytes], readers: Executor | None = None
) -> dict[bytes, Trace]:
    """What became of each of the hashes (16 bytes each, in the prompt's order), none of which `state` holds."""
    wanted = set(missing)
    past = _past(store, space_id, state, wanted, readers)
    found = [
        _in_inbox(store, space_id, state, wanted),
        _in_objects(store, space_id, state, missing, past, readers),
        past.traces,
    ]
    order = list(Fate)
    out = {}
    for prefix_hash in missing:
        known = [one[prefix_hash] for one in found if prefix_hash in one]
        out[prefix_hash] = min(known, key=lambda t: order.index(t.fate), default=Trace(Fate.NEVER))
    return out


def covered_uploads(store: ObjectStore, space_id: str, state: State, prefix_hash: bytes) -> list[ExtentName]:
    """Extents that end with this chunk, lie there whole, and would add nothing: all their chunks are in the index."""
    return [
        record.name
        for record, _ in _uploads(store, space_id, state, prefix_hash)
        if all(h in state.chunks for h in record.chunk_hashes())
    ]


def _in_inbox(store: ObjectStore, space_id: str, state: State, wanted: set[bytes]) -> dict[bytes, Trace]:
    out: dict[bytes, Trace] = {}
    for info in store.list(inbox_prefix(space_id), limit=MAX_INBOX):
        try:
            delta = decode_delta(store.get(info.key, limit_bytes=MAX_VERSION_BYTES), MAX_INTEGER)
        except Unusable:
            continue
        for record in delta.add:
            fate = Fate.VOID if record.name.born < state.floor else Fate.WAITING
            _note(out, wanted, record, Trace(fate, record.name, None, info.modified_s))
    return out


@dataclass(frozen=True, slots=True)
class _Past:
    """What the versions after `after` say, all of which were read. names: extents they added or removed."""

    traces: dict[bytes, Trace]
    names: set[ExtentName]
    after: int


def _in_objects(
    store: ObjectStore, space_id: str, state: State, missing: Sequence[bytes], past: _Past, readers: Executor | None
) -> dict[bytes, Trace]:
    """Extents are found by their last chunk, so the LISTs go from the prompt's end: one may tell of many chunks."""
    out: dict[bytes, Trace] = {}
    wanted = set(missing)
    run = map if readers is None else readers.map
    for first in range(0, len(missing[:MAX_LISTS]), _AT_ONCE):
        ends = [h for h in missing[:MAX_LISTS][::-1][first : first + _AT_ONCE] if h not in out]
        for found in run(lambda h: _uploads(store, space_id, state, h), ends):
            for record, modified_s in found:
                if record.name in past.names:
                    continue
                fate = Fate.UPLOADED
                if record.name.born < state.floor:  # versions up to its birth cannot have added it
                    fate = Fate.VOID if past.after <= record.name.born else Fate.GONE
                _note(out, wanted, record, Trace(fate, record.name, None, modified_s))
    return out


def _uploads(store: ObjectStore, space_id: str, state: State, prefix_hash: bytes) -> list[tuple[ExtentRecord, float]]:
    """Whole-looking extents not in the index that end with this chunk, and when their zarr.json was written."""
    found = []
    text = prefix_hash.hex()
    for info in store.list(f"{space_prefix(space_id)}extents/{text[:2]}/{text}."):
        folder, _, file = info.key.rpartition("/")
        if file != "zarr.json":
            continue
        try:
            name = ExtentName.parse(folder.rpartition("/")[2])
            if name in state.extents:
                continue
            metadata = record_from_metadata(
                store.get(info.key, limit_bytes=MAX_METADATA_BYTES), name=name, space_id=space_id
            )
        except Unusable:
            continue
        found.append((metadata.record, info.modified_s))
    return found


def _past(store: ObjectStore, space_id: str, state: State, wanted: set[bytes], readers: Executor | None) -> _Past:
    """Extents that kept versions added and that are not live: removed since, or void from the start."""
    after = max(0, state.version - MAX_VERSIONS)
    versions = list_versions(store, space_id, after=after, upto=state.version)
    held: dict[ExtentName, ExtentRecord] = {}
    removed: dict[ExtentName, tuple[int, float]] = {}
    expected = after + 1
    for entry in entries(store, space_id, versions, readers=readers):
        if entry.version != expected or entry.delta is None:  # a gap: only what follows is whole
            after = entry.version - (entry.delta is not None)
        expected = entry.version + 1
        if entry.delta is None:
            continue
        for record in entry.delta.add:
            if not wanted.isdisjoint(record.chunk_hashes()):
                held[record.name] = record
        for name in entry.delta.remove:
            removed[name] = (entry.version, entry.time_s)
    if expected != state.version + 1:
        after = state.version
    out: dict[bytes, Trace] = {}
    for name, record in held.items():
        if name in state.extents:
            continue
        trace = Trace(Fate.EVICTED, name, *removed[name]) if name in removed else Trace(Fate.VOID, name)
        _note(out, wanted, record, trace)
    return _Past(out, set(held) | set(removed), after)


def _note(out: dict[bytes, Trace], wanted: set[bytes], record: ExtentRecord, trace: Trace) -> None:
    """The trace of the record's chunks, where nothing better is known."""
    order = list(Fate)
    for prefix_hash in wanted.intersection(record.chunk_hashes()):
        if prefix_hash not in out or order.index(trace.fate) <= order.index(out[prefix_hash].fate):
            out[prefix_hash] = trace
