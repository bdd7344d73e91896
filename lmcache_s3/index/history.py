"""The kept past of a space: which versions are still there, when they were made, by whom, and the state as of then.

Times are the store's Last-Modified, as a LIST shows them, never a clock of ours. Versions are made one after another,
so their times are taken to rise: where a listed time is earlier than that of a version before, that one's counts
(a version re-created by a stalled writer, a copied bucket); whatever is decided by age is then decided late, not early.

Reads only. Everything read is untrusted: keys that are no version are passed over, documents are checked.
Raises the store's `Unavailable` and `Invalid`, and `Invalid` (argument) for a past that is not kept any more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lmcache_s3.errors import Invalid, Missing, Unusable
from lmcache_s3.index.checkpoint_loading import load_checkpoint
from lmcache_s3.index.delta import MAX_INTEGER, MAX_VERSION_BYTES, Delta, decode_delta
from lmcache_s3.index.manifest import (
    EMPTY,
    State,
    apply,
    checkpoint_key,
    checkpoints_prefix,
    log_key,
    parse_checkpoint_key,
    segments_prefix,
)
from lmcache_s3.index.segments import MAX_INDEX_BYTES, decode_index
from lmcache_s3.tiers.stores.base import ObjectStore

_T = TypeVar("_T")
_R = TypeVar("_R")
_DIGITS = re.compile(r"[0-9]{20}", re.ASCII)
_BATCH = 64
"""Versions read ahead."""


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions that a listing showed, in order. numbers: int64. times_s: float64, never falling. sizes: bytes, int64.
    foreign: other objects there."""

    numbers: np.ndarray
    times_s: np.ndarray
    sizes: np.ndarray
    foreign: int = 0

    def newest_at(self, time_s: float) -> int:
        """The newest version made at or before that time; 0 if none is listed."""
        n = int(np.searchsorted(self.times_s, time_s, side="right"))
        return int(self.numbers[n - 1]) if n else 0

    def time_of(self, version: int) -> float | None:
        """When the version was made (of versions deleted since: about when, from the next one kept); None: unknown."""
        n = int(np.searchsorted(self.numbers, version))
        return float(self.times_s[n]) if n < len(self.numbers) else None


@dataclass(frozen=True, slots=True)
class Entry:
    """A version for people. time_s: Unix seconds by the store's clock. delta: None if it cannot be read (`problem`)."""

    version: int
    time_s: float
    size_bytes: int
    delta: Delta | None
    problem: str | None = None


def list_versions(store: ObjectStore, space_id: str, *, after: int = 0, upto: int = MAX_INTEGER) -> Versions:
    """The versions in (after, upto] that are there. One LIST a thousand."""
    folder = log_key(space_id, 0)[:-20]
    numbers, times_s, sizes, foreign = [], [], [], 0
    for info in store.list(folder, start_after=log_key(space_id, after)):
        version = version_of(info.key, folder)
        if version is None:
            foreign += 1
        elif version > upto:
            break
        else:
            numbers.append(version)
            times_s.append(info.modified_s)
            sizes.append(info.size_bytes)
    times = np.maximum.accumulate(np.array(times_s, np.float64)) if times_s else np.zeros(0)
    return Versions(np.array(numbers, np.int64), times, np.array(sizes, np.int64), foreign)


def version_of(key: str, folder: str) -> int | None:
    """The number of a version's key below `folder`; None for any other object."""
    name = key.removeprefix(folder)
    if _DIGITS.fullmatch(name) is None or not 1 <= int(name) <= MAX_INTEGER:
        return None
    return int(name)


def entries(
    store: ObjectStore, space_id: str, versions: Versions, *, readers: Executor | None = None
) -> Iterator[Entry]:
    """Read the listed versions, in order; those deleted meanwhile are left out. One GET each."""
    for at in range(0, len(versions.numbers), _BATCH):
        numbers = versions.numbers[at : at + _BATCH].tolist()
        found = _each(readers, lambda version: _read(store, space_id, version), numbers)
        for i, (version, delta) in enumerate(zip(numbers, found, strict=True), at):
            if delta is None:
                continue
            time_s, size_bytes = float(versions.times_s[i]), int(versions.sizes[i])
            if isinstance(delta, Unusable):
                yield Entry(version, time_s, size_bytes, None, str(delta))
            else:
                yield Entry(version, time_s, size_bytes, delta)


def as_of(store: ObjectStore, space_id: str, version: int, *, readers: Executor | None = None) -> State:
    """The state right after `version`. Raises `Invalid` naming the oldest one that can still be had."""
    oldest: int | None = None
    for at, nonce in _checkpoints(store, space_id):
        if at > version:
            oldest = at
            continue
        try:
            state = _load(store, space_id, at, nonce, readers)
        except Missing:  # collected since it was listed
            continue
        return _replay(store, space_id, state, version, oldest, readers)
    return _replay(store, space_id, EMPTY, version, oldest, readers)


def as_far_as_readable(store: ObjectStore, space_id: str, *, readers: Executor | None = None) -> State:
    """The newest state that can be had of a damaged manifest: from the newest checkpoint that is whole, the versions up
    to the first that is missing or cannot be read. A prefix of the history; version 0 where nothing is left."""
    state = EMPTY
    for at, nonce in _checkpoints(store, space_id):
        try:
            state = _load(store, space_id, at, nonce, readers)
        except Unusable:
            continue
        break
    while True:
        numbers = range(state.version + 1, state.version + _BATCH + 1)
        for delta in _each(readers, lambda n: _read(store, space_id, n), numbers):
            if delta is None or isinstance(delta, Unusable):
                return state
            state = apply(state, delta)


def _checkpoints(store: ObjectStore, space_id: str) -> Iterator[tuple[int, str]]:
    """(version, nonce), the newest first."""
    for info in store.list(checkpoints_prefix(space_id)):
        try:
            yield parse_checkpoint_key(info.key)
        except Unusable:
            continue


def _load(store: ObjectStore, space_id: str, version: int, nonce: str, readers: Executor | None) -> State:
    index = decode_index(
        store.get(checkpoint_key(space_id, version, nonce), limit_bytes=MAX_INDEX_BYTES), version, nonce
    )
    prefix = segments_prefix(space_id, version, nonce)
    return load_checkpoint(index, lambda s: store.get(prefix + s.file, limit_bytes=s.size_bytes), readers)


def _replay(
    store: ObjectStore, space_id: str, state: State, version: int, oldest: int | None, readers: Executor | None
) -> State:
    """`state` and the versions after it. oldest: the oldest checkpoint after `version`, if there is one."""
    while state.version < version:
        numbers = range(state.version + 1, min(version, state.version + _BATCH) + 1)
        for number, delta in zip(numbers, _each(readers, lambda n: _read(store, space_id, n), numbers), strict=True):
            if isinstance(delta, Unusable):
                raise Unusable(f"version {number} cannot be read ({delta})", kind=delta.kind, key=delta.key)
            if delta is None:
                raise _not_kept(space_id, version, oldest, number)
            state = apply(state, delta)
    return state


def _not_kept(space_id: str, version: int, oldest: int | None, missing: int) -> Invalid:
    if oldest is None:
        return Invalid(
            f"space {space_id[:16]}: there is no version {version}, the newest is {missing - 1}", kind="argument"
        )
    return Invalid(
        f"space {space_id[:16]}: version {version} is not kept any more; the oldest that is: {oldest}", kind="argument"
    )


def _read(store: ObjectStore, space_id: str, version: int) -> Delta | Unusable | None:
    """None if it is not there; the error if it cannot be read."""
    try:
        return decode_delta(store.get(log_key(space_id, version), limit_bytes=MAX_VERSION_BYTES), version)
    except Missing:
        return None
    except Unusable as e:
        return e


def _each(readers: Executor | None, function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """`function` of each, in parallel if there are readers."""
    return list(map(function, items)) if readers is None else list(readers.map(function, items))
