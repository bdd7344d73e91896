"""A new manifest from the extents themselves, when the old one is damaged beyond its checkpoints or gone.

Offline: engines and collectors are stopped first, their requests ended; what an engine that runs on stores meanwhile is
void. Reads every `zarr.json` under `extents/` and lists the shard objects beside it; what is whole becomes live again.
Left out is what the readable part of the old manifest lets a collector delete: a DELETE of it may be under way. All
reading comes first; then, at versions beyond any that was ever used,
1. create every missing milestone up to M, so that every replica of the past finds its fence, whatever version it is at
   (they change nothing: until 2 the old history goes on, through them),
2. put a checkpoint of version M − 1 with floor M − 1: whoever named an extent before finds it live or void. Segments
   first, then the index.
M is a milestone beyond the fence of the newest version that a listing of log, checkpoints, segments or extents shows.

May be stopped at any step and run again. Bytes of the cells are not read (`verify` does that). Steps and order are
those of `testing.protocol_model`, which shows for each what goes wrong without it.
Raises `Invalid` (something claims an impossible version), and the store's `Unavailable` and `Invalid`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, wait
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from lmcache_s3.errors import Invalid, Unavailable, Unusable
from lmcache_s3.extent import MAX_METADATA_BYTES, record_from_metadata
from lmcache_s3.identity import Space
from lmcache_s3.index.delta import MAX_INTEGER, Delta, check_record, encode_delta, name_of
from lmcache_s3.index.history import as_far_as_readable, list_versions
from lmcache_s3.index.manifest import (
    EMPTY,
    MILESTONE,
    State,
    apply,
    checkpoint_key,
    checkpoints_prefix,
    fence,
    log_key,
    parse_checkpoint_key,
    segments_prefix,
)
from lmcache_s3.index.segments import encode_checkpoint
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import ExtentName, ExtentRecord, ObjectInfo, Outcome, extent_prefix, shard_key, space_prefix

MAX_MILESTONES = 2**16
"""More would have to be created only if something claims a version that never was."""
_CREATES = 8
"""Attempts at a create without a clear answer."""
_SHARDS = 256
_SEGMENT = re.compile(r"([0-9]{20})\.[0-9a-f]{32}/[^/]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Rejected:
    """An upload that is not whole, or no extent of this space."""

    extent: str
    why: str


@dataclass(slots=True)
class RebuildReport:
    """What was done, or in a dry run would be.

    tip: the newest version that anything shows. version: of the checkpoint. milestones: created. readable: the version
    up to which the old manifest could be read. extents, chunks, encoded_bytes: live afterwards. covered: uploads that
    add nothing to these. dead: uploads that the old manifest had given up. rejected: those that are not whole.
    """

    dry_run: bool
    tip: int = 0
    version: int = 0
    milestones: int = 0
    readable: int = 0
    extents: int = 0
    chunks: int = 0
    encoded_bytes: int = 0
    covered: int = 0
    dead: int = 0
    rejected: list[Rejected] = field(default_factory=list)


def rebuild(
    store: ObjectStore,
    space: Space,
    *,
    writer: str,
    nonce: str,
    milestone: int = MILESTONE,
    executor: Executor | None = None,
    progress: Callable[[int], object] = lambda _: None,
    dry_run: bool = False,
) -> RebuildReport:
    """See the module. writer: ULID of this process. nonce: of the checkpoint, 32 hex digits. progress: called 256 times
    from any thread, with the number of whole extents among each 256th of the names."""
    report = RebuildReport(dry_run)
    before = as_far_as_readable(store, space.id, readers=executor)
    report.readable = before.version
    found = _read_all(store, space, report, executor, progress)
    alive = [record for record in found.records if record.name in before.extents or record.name.born >= before.floor]
    report.dead = len(found.records) - len(alive)
    missing = _plan(store, space.id, max(found.newest_born, before.version), milestone, report)
    state = _state(alive, writer, report)
    if not dry_run:
        _write(store, space.id, state, missing, writer, nonce)
    return report


def _plan(store: ObjectStore, space_id: str, born: int, milestone: int, report: RebuildReport) -> list[int]:
    """The milestones to create; report.tip and .version. born: of the newest extent, whole or not."""
    there = list_versions(store, space_id).numbers
    shown = {
        "a version of the log": int(there[-1]) if len(there) else 0,
        "a checkpoint": max(_checkpoint_versions(store, space_id), default=0),
        "a segment": max(_segment_versions(store, space_id), default=0),
        "an extent's name": born,
    }
    report.tip = max(shown.values())
    last = fence(report.tip, milestone) + milestone
    if last // milestone > MAX_MILESTONES:
        what = max(shown, key=lambda key: shown[key])
        raise Invalid(
            f"space {space_id[:16]}: {what} claims version {report.tip}, which cannot be; move that object away first",
            kind="argument",
        )
    report.version = last - 1
    have = set(there.tolist())
    missing = [version for version in range(milestone, last + 1, milestone) if version not in have]
    report.milestones = len(missing)
    return missing


def _checkpoint_versions(store: ObjectStore, space_id: str) -> Iterator[int]:
    for info in store.list(checkpoints_prefix(space_id)):
        try:
            yield parse_checkpoint_key(info.key)[0]
        except Unusable:
            continue


def _segment_versions(store: ObjectStore, space_id: str) -> Iterator[int]:
    prefix = space_prefix(space_id) + "segments/"
    for info in store.list(prefix):
        m = _SEGMENT.fullmatch(info.key.removeprefix(prefix))
        if m is not None and int(m[1]) <= MAX_INTEGER:
            yield int(m[1])


def _state(records: list[ExtentRecord], writer: str, report: RebuildReport) -> State:
    """Version M − 1: all extents but those that earlier ones cover, parents before children, longest first."""
    seen: set[bytes] = set()
    add = []
    for record in sorted(records, key=lambda r: (r.first_token, -r.n_chunks, str(r.name))):
        hashes = set(record.chunk_hashes())
        if hashes <= seen:
            report.covered += 1
            continue
        seen |= hashes
        add.append(record)
    report.extents = len(add)
    report.chunks = sum(record.n_chunks for record in add)
    report.encoded_bytes = sum(record.encoded_bytes for record in add)
    before = replace(EMPTY, version=report.version - 1)
    return apply(before, Delta(writer, add=tuple(add), floor=report.version))


def _write(store: ObjectStore, space_id: str, state: State, missing: list[int], writer: str, nonce: str) -> None:
    body = encode_delta(Delta(writer))
    for version in missing:
        _create(store, log_key(space_id, version), body)
    files, index = encode_checkpoint(state, nonce, writer)
    prefix = segments_prefix(space_id, state.version, nonce)
    for file, data in files.items():
        store.put(prefix + file, data)
    store.put(checkpoint_key(space_id, state.version, nonce), index)


def _create(store: ObjectStore, key: str, body: bytes) -> None:
    """Something lies under `key` when it returns."""
    for _ in range(_CREATES):
        if store.create(key, body) is not Outcome.UNKNOWN:
            return
    raise Unavailable(f"{store.url}: {key} could not be created; run rebuild again", key=key)


# ---- reading the extents ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Found:
    """records: of whole extents, in any order. newest_born: of all names."""

    records: list[ExtentRecord] = field(default_factory=list)
    newest_born: int = 0


def _read_all(
    store: ObjectStore,
    space: Space,
    report: RebuildReport,
    executor: Executor | None,
    progress: Callable[[int], object],
) -> _Found:
    lock = threading.Lock()
    all_found = _Found()

    def read(shard: int) -> None:
        prefix = f"{space_prefix(space.id)}extents/{shard:02x}/"
        found, rejected, born = [], [], 0
        listed = store.list(prefix)
        for text, objects in groupby(listed, key=lambda info: info.key.removeprefix(prefix).partition("/")[0]):
            try:
                name = name_of(text)
                born = max(born, name.born)
                found.append(_read(store, space, name, objects))
            except Unusable as e:
                rejected.append(Rejected(text[:200], str(e)[:200]))
        with lock:
            all_found.records.extend(found)
            all_found.newest_born = max(all_found.newest_born, born)
            report.rejected += rejected
        progress(len(found))

    _each(executor, read, range(_SHARDS))
    report.rejected.sort(key=lambda r: r.extent)
    return all_found


def _read(store: ObjectStore, space: Space, name: ExtentName, objects: Iterable[ObjectInfo]) -> ExtentRecord:
    """The record of the extent under this name. Raises `Unusable` for what is not whole or not what it should be."""
    sizes = {info.key: info.size_bytes for info in objects}
    prefix = extent_prefix(space.id, name)
    if f"{prefix}/zarr.json" not in sizes:
        raise Unusable("no zarr.json: the upload never ended", kind="missing")
    metadata = record_from_metadata(
        store.get(f"{prefix}/zarr.json", limit_bytes=MAX_METADATA_BYTES), name=name, space_id=space.id
    )
    record = metadata.record
    check_record(record)
    if metadata.geometry != space.geometry:
        raise Unusable("an array of another shape than the space's", kind="shape")
    n, grid = record.n_chunks, record.grid
    lengths = np.frombuffer(record.lengths, "<u4").reshape(grid.shards, n).sum(axis=1, dtype=np.int64)
    for shard in range(grid.shards):
        # Zarr's index ends a shard: offset and length of each cell, then a crc32c.
        expected, stored = int(lengths[shard]) + 16 * n + 4, sizes.get(shard_key(space.id, name, grid, shard))
        if stored != expected:
            raise Unusable(f"shard {shard} has {stored or 'no'} bytes, not {expected}", kind="truncated")
    return record


def _each(executor: Executor | None, function: Callable[[int], None], items: Iterable[int]) -> None:
    """`function` of each; all of them have ended when this returns or raises."""
    if executor is None:
        for item in items:
            function(item)
        return
    futures = [executor.submit(function, item) for item in items]
    wait(futures)
    for future in futures:
        future.result()
