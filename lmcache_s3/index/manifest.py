"""Versions as values: deltas, the floor, and how they add up to a state (FORMAT.md §4).

Pure: no I/O, clock or randomness (`log` has those). A `State` is a pure function of versions 1…n and never changes:
states made one from another share a `Table`, so applying a delta costs what it changes and one reference is a
consistent snapshot for ever.
Invariants: a chunk resolves to the extent added first among the live ones; the floor only rises; extents are in the
order of their first add (`LiveExtent.order`).
Raises `Unusable` on a malformed document or key, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from lmcache_s3.errors import Unusable
from lmcache_s3.index.courtesy import breathe
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
from lmcache_s3.index.table import Array, Arrays, Table, batch_of, gathered, keys_of
from lmcache_s3.kernels import hash_index
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
    "inbox_key",
    "inbox_prefix",
    "judged",
    "log_key",
    "log_prefix",
    "parse_checkpoint_key",
    "record_size",
    "segments_prefix",
    "unjudged",
]

MILESTONE = 4096
"""Versions that are multiples of it are never deleted."""
_LAST = 10**20 - 1
_SPARE_ROWS = 2**16
"""Dead rows that a table may always hold; beyond these and a quarter of the live ones it is copied without them."""


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


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Everything versions 1…version say. Immutable; compared by content.

    lead: ULID of the process that merges the inbox, or None. n_extents, n_chunks: of live extents (a chunk in two of
    them counts twice). accessed: i64, by owner, the version of the last access, 0 or missing if that was the add. The
    rest is how far the shared table belongs to this state: see `Table`.
    """

    version: int
    floor: int
    lead: str | None
    n_extents: int
    n_chunks: int
    table: Table
    arrays: Arrays
    rows: int
    owners: int
    accessed: Array
    tick: int

    # ---- look-ups ----------------------------------------------------------------------------------------------------

    def match(self, keys: Array, hidden: Array, out: Array) -> int:
        """How many of `keys` (u64 [n, 2]), from the first on, are there; their rows go to `out` (i64). Microseconds."""
        a = self.arrays
        n = hash_index.match(
            a.slots, a.seed, hash_index.shift_of(a.slots), a.rows.hashes, a.rows.owner, a.owners.removed_at,
            self.rows, np.uint64(self.version), hidden, keys, out,
        )  # fmt: skip
        return int(n)

    def resolve(self, keys: Array) -> Array:
        """The row of each key (u64 [n, 2]), −1 where it is in no live extent; i64. For many keys: releases the GIL."""
        a = self.arrays
        out = np.empty(len(keys), np.int64)
        hash_index.resolve(
            a.slots, a.seed, hash_index.shift_of(a.slots), a.rows.hashes, a.rows.owner, a.owners.removed_at,
            self.rows, np.uint64(self.version), np.ascontiguousarray(keys), out,
        )  # fmt: skip
        return out

    def rows_of(self, prefix_hash: bytes) -> Array:
        """All rows with this hash, in the order of first add."""
        a, found = self.arrays, np.empty(4, np.int64)
        key = np.frombuffer(prefix_hash, np.uint64)
        while True:
            n = hash_index.find(
                a.slots, a.seed, hash_index.shift_of(a.slots), a.rows.hashes, a.rows.owner, a.owners.removed_at,
                self.rows, np.uint64(self.version), key, found,
            )  # fmt: skip
            if n <= found.size:
                return found[:n]
            found = np.empty(n, np.int64)

    def owner_of(self, name: ExtentName) -> int | None:
        """The live extent of this name, as a number within the table."""
        return self.table.owner_of(self.arrays, self.owners, self.version, name)

    def record(self, owner: int) -> ExtentRecord:
        return self.table.record(self.arrays, owner)

    def live(self, owner: int) -> LiveExtent:
        o = self.arrays.owners
        created = int(o.created[owner])
        accessed = int(self.accessed[owner]) if owner < len(self.accessed) else 0
        return LiveExtent(self.record(owner), created, max(created, accessed), int(o.place[owner]))

    # ---- everything --------------------------------------------------------------------------------------------------

    @property
    def extents(self) -> Mapping[ExtentName, LiveExtent]:
        """Live extents by name; objects are made when asked for."""
        return _Extents(self)

    @property
    def chunks(self) -> Mapping[bytes, tuple[ChunkRef, ...]]:
        """Prefix hash (16 bytes) → where it lies, in the order of first add; never empty. For small states."""
        return _Chunks(self)

    def live_owners(self) -> Array:
        """Numbers of the live extents, ascending: the order of first add."""
        return np.flatnonzero(self.arrays.owners.removed_at[: self.owners] > np.uint64(self.version))

    def in_order(self) -> Iterator[LiveExtent]:
        """Live extents in the order of their first add."""
        return map(self.live, self.live_owners().tolist())

    def last_access(self, owners: Array) -> Array:
        out: Array = self.arrays.owners.created[owners].copy()
        known = owners < len(self.accessed)
        out[known] = np.maximum(out[known], self.accessed[owners[known]])
        return out

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        if (self.version, self.floor, self.lead) != (other.version, other.floor, other.lead):
            return False
        ours, theirs = self.live_owners(), other.live_owners()
        if not np.array_equal(self.last_access(ours), other.last_access(theirs)):
            return False
        one, two = gathered(self.table, self.arrays, ours), gathered(other.table, other.arrays, theirs)
        return (
            [one.codecs[0][i] for i in one.codecs[1]] == [two.codecs[0][i] for i in two.codecs[1]]
            and np.array_equal(one.hashes, two.hashes)
            and np.array_equal(one.lengths, two.lengths)
            and np.array_equal(one.sums, two.sums)
            and all(np.array_equal(column, two.owners[name]) for name, column in one.owners.items())
        )

    __hash__ = None  # type: ignore[assignment]


def state_on(
    table: Table, version: int, floor: int, lead: str | None, accessed: Array, n_extents: int, n_chunks: int
) -> State:
    """The state at the tip of a table."""
    return State(
        version,
        floor,
        lead,
        n_extents,
        n_chunks,
        table,
        table.arrays,
        table.n_rows,
        table.n_owners,
        accessed,
        table.tick,
    )


_NO_ACCESS = np.empty(0, np.int64)
EMPTY = replace(state_on(Table(), 0, 0, None, _NO_ACCESS, 0, 0), tick=-1)
"""Version 0. (Its tick makes everybody who extends it start a table of their own.)"""


def apply(state: State, delta: Delta) -> State:
    """The state one version on: add (void if born below the floor as before), remove, access, lead, floor.

    Raises `Unusable` (oversized) when the table is full.
    """
    with state.table.lock:
        if state.tick != state.table.tick:
            state = _fork(state)
        state.table.tick += 1
        return _extended(state, delta)


def _extended(state: State, delta: Delta) -> State:
    table, version = state.table, state.version + 1
    fresh: dict[ExtentName, int] = {}
    known = table.might_know(state.arrays, [record.name for record in delta.add])
    for place, (record, maybe) in enumerate(zip(delta.add, known, strict=True)):
        if record.name.born < state.floor or record.name in fresh:
            continue
        if not maybe or state.owner_of(record.name) is None:
            fresh[record.name] = place
    breathe()
    n_extents, n_chunks = state.n_extents, state.n_chunks
    if fresh:
        records = [delta.add[place] for place in fresh.values()]
        batch = batch_of(records, version, list(fresh.values()))
        breathe()
        table.append(batch)
        breathe()
        n_extents += len(records)
        n_chunks += sum(record.n_chunks for record in records)
    a = table.arrays
    for name in delta.remove:
        owner = table.owner_of(a, table.n_owners, version, name)
        if owner is not None:
            a.owners.removed_at[owner] = version
            n_extents -= 1
            n_chunks -= name.n_chunks
    accessed = state.accessed
    hit = [owner for name in delta.access if (owner := table.owner_of(a, table.n_owners, version, name)) is not None]
    if hit:
        # A copy: older states keep theirs.
        longer = np.zeros(table.n_owners, np.int64)
        longer[: len(accessed)] = accessed
        longer[hit] = version
        accessed = longer
    floor = max(state.floor, delta.floor)
    lead = state.lead if delta.lead is None else (delta.lead or None)
    after = state_on(table, version, floor, lead, accessed, n_extents, n_chunks)
    dead = table.n_rows - n_chunks
    return _fork(after) if dead > _SPARE_ROWS + n_chunks // 4 else after


def _fork(state: State) -> State:
    """The same state on a table of its own, without what is not live."""
    owners = state.live_owners()
    batch = gathered(state.table, state.arrays, owners)
    table = Table(len(batch.hashes), len(batch.lengths), len(owners))
    table.append(batch)
    accessed = np.zeros(len(owners), np.int64)
    known = owners < len(state.accessed)
    accessed[known] = state.accessed[owners[known]]
    return state_on(table, state.version, state.floor, state.lead, accessed, state.n_extents, state.n_chunks)


def judged(state: State, record: ExtentRecord) -> Verdict | None:
    """What the state says of this extent; None: nothing yet, so it may be added."""
    if state.owner_of(record.name) is not None:
        return Verdict.LIVE
    if record.name.born < state.floor:
        return Verdict.VOID
    if (state.resolve(np.frombuffer(record.hashes, np.uint64).reshape(-1, 2)) >= 0).all():
        return Verdict.COVERED
    return None


def unjudged(state: State, add: Sequence[ExtentRecord], remove: Iterable[ExtentName] = ()) -> tuple[ExtentRecord, ...]:
    """What of `add` is worth a version that also removes `remove`: not live, not void, not covered by what then stays,
    nor by those before it. What is removed covers nothing: an extent that replaces a damaged one may come with it."""
    gone = {owner for name in remove if (owner := state.owner_of(name)) is not None}
    fresh: list[ExtentRecord] = []
    added: set[bytes] = set()
    for record in add:
        if record.name.born < state.floor or state.owner_of(record.name) is not None:
            continue
        hashes = list(record.chunk_hashes())
        rows = state.resolve(keys_of(hashes))
        left = [
            h
            for h, row in zip(hashes, rows.tolist(), strict=True)
            if (row < 0 or (gone and _only_in(state, h, gone))) and h not in added
        ]
        if left:
            fresh.append(record)
            added.update(hashes)
    return tuple(fresh)


def _only_in(state: State, prefix_hash: bytes, owners: set[int]) -> bool:
    return all(int(state.arrays.rows.owner[row]) in owners for row in state.rows_of(prefix_hash))


@dataclass(frozen=True, slots=True, eq=False)
class _Extents(Mapping[ExtentName, LiveExtent]):
    _state: State

    def __getitem__(self, name: ExtentName) -> LiveExtent:
        owner = self._state.owner_of(name)
        if owner is None:
            raise KeyError(name)
        return self._state.live(owner)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, ExtentName) and self._state.owner_of(name) is not None

    def __len__(self) -> int:
        return self._state.n_extents

    def __iter__(self) -> Iterator[ExtentName]:
        state = self._state
        return (state.table.name(state.arrays, owner) for owner in state.live_owners().tolist())


@dataclass(frozen=True, slots=True, eq=False)
class _Chunks(Mapping[bytes, tuple[ChunkRef, ...]]):
    _state: State

    def __getitem__(self, prefix_hash: bytes) -> tuple[ChunkRef, ...]:
        rows = self._state.rows_of(prefix_hash)
        if not len(rows):
            raise KeyError(prefix_hash)
        return tuple(chunk_at(self._state, int(row)) for row in rows)

    def __len__(self) -> int:
        return len(self._distinct())

    def __iter__(self) -> Iterator[bytes]:
        return (h.tobytes() for h in self._distinct())

    def _distinct(self) -> Array:
        a, state = self._state.arrays, self._state
        removed_at = a.owners.removed_at[a.rows.owner[: state.rows]]
        visible = a.rows.hashes[: state.rows][removed_at > np.uint64(state.version)]
        distinct: Array = np.unique(visible, axis=0)
        return distinct


def chunk_at(state: State, row: int) -> ChunkRef:
    """The chunk of a row."""
    a = state.arrays
    owner = int(a.rows.owner[row])
    return ChunkRef(a.rows.hashes[row].tobytes(), state.record(owner), row - int(a.owners.starts[owner]))


def fence(version: int, milestone: int = MILESTONE) -> int:
    """The second milestone above `version`. While it is absent, no version ≥ `version` was ever deleted."""
    return (version // milestone + 2) * milestone


# ---- keys ----------------------------------------------------------------------------------------------------------


def log_prefix(space_id: str) -> str:
    return f"{space_prefix(space_id)}manifest/log/"


def log_key(space_id: str, version: int) -> str:
    return f"{log_prefix(space_id)}{version:020d}"


def inbox_prefix(space_id: str) -> str:
    return f"{space_prefix(space_id)}manifest/inbox/"


def inbox_key(space_id: str, ulid: str) -> str:
    """Key of what a writer hands over to the leader."""
    return f"{inbox_prefix(space_id)}{ulid}"


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
