"""The columns behind a `State`: one row a chunk, one *owner* an extent, found by hash in microseconds.

A `Table` grows at one end and is shared by all states made from it: rows and owners are appended, and an owner that is
removed is only marked with the version that did it. A state remembers how far the table went and at which version, and
so stays a consistent snapshot for ever. Only the state at the tip is extended in place; extending an older one, or a
table with many dead rows, copies what is visible into a table of its own. About 40 bytes a chunk, 130 an extent.

Threads: readers any number and without locks, on states that were handed to them; one writer at a time.
Raises `Unusable` (oversized) beyond 2³² − 2 chunks, and for an extent that holds one hash twice (format).
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np

from lmcache_s3.errors import Unusable
from lmcache_s3.kernels import hash_build, hash_index
from lmcache_s3.types import HASH_BYTES, ExtentName, ExtentRecord, Grid

MAX_ROWS = 2**32 - 2
_ROWS_AT_ONCE = 2**20
"""That one thread sorts by their homes."""
_LEAST = 64
"""Capacity of a new table, in rows, cells and owners."""

Array = np.ndarray
_Part = TypeVar("_Part", "Rows", "Cells", "Owners")


@dataclass(frozen=True, slots=True)
class Rows:
    """One row a chunk; an owner's rows lie together, in the order of its chunks.

    hashes: u64 [row, 2], the prefix hash's bytes. owner: u32 [row].
    """

    hashes: Array
    owner: Array


@dataclass(frozen=True, slots=True)
class Cells:
    """One item a cell, an owner's together, [shard][chunk] as in `ExtentRecord`. lengths: u32. sums: u64."""

    lengths: Array
    sums: Array


@dataclass(frozen=True, slots=True)
class Owners:
    """One item an extent, in the order of first add.

    nonces, parents: u64 [owner, 2], the bytes. starts, counts: first row and number of rows. cells: first cell.
    removed_at: version that removed it, `NEVER` while live. itself: 0, 1, 2, … (as `owner` of the names' table). codec:
    number in the table's list of codecs. The rest as in `ExtentRecord` and `LiveExtent`.
    """

    nonces: Array
    parents: Array
    starts: Array
    counts: Array
    cells: Array
    stages: Array
    head_groups: Array
    first_token: Array
    born: Array
    codec: Array
    raw_bytes: Array
    created: Array
    place: Array
    removed_at: Array
    itself: Array


_Columns = dict[str, tuple[Any, int]]
"""Name → data type, and width where a column has two dimensions."""
_ROWS: _Columns = {"hashes": (np.uint64, 2), "owner": (np.uint32, 0)}
_CELLS: _Columns = {"lengths": (np.uint32, 0), "sums": (np.uint64, 0)}
_OWNERS: _Columns = {
    "nonces": (np.uint64, 2), "parents": (np.uint64, 2), "starts": (np.int64, 0), "counts": (np.int64, 0),
    "cells": (np.int64, 0), "stages": (np.uint32, 0), "head_groups": (np.uint32, 0), "first_token": (np.int64, 0),
    "born": (np.int64, 0), "codec": (np.uint16, 0), "raw_bytes": (np.int64, 0), "created": (np.int64, 0),
    "place": (np.uint32, 0), "removed_at": (np.uint64, 0), "itself": (np.uint32, 0),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arrays:
    """All columns at one moment; a longer set replaces it when one is full.

    slots: rows by hash. names: owners by nonce. Both as in `kernels.hash_index`, with one seed.
    """

    seed: np.uint64
    slots: Array
    names: Array
    rows: Rows
    cells: Cells
    owners: Owners


Codecs = tuple[Sequence[str], np.ndarray]
"""Codecs, and for each extent which of them."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Extents to append, as columns: see `Rows`, `Cells`, `Owners`, without what follows from their place."""

    hashes: Array
    lengths: Array
    sums: Array
    owners: dict[str, Array]
    codecs: Codecs


class Table:
    """See the module. `tick` counts the states made in place: who holds the newest one may extend it."""

    def __init__(self, rows: int = _LEAST, cells: int = _LEAST, owners: int = _LEAST) -> None:
        self.lock = threading.Lock()
        self.tick = 0
        self.codecs: list[str] = []
        self._codec_ids: dict[str, int] = {}
        self.n_rows = self.n_cells = self.n_owners = 0
        self.arrays = Arrays(
            seed=np.uint64(secrets.randbits(64) | 1),
            slots=_slots(rows),
            names=_slots(owners),
            rows=Rows(**_made(_ROWS, rows)),
            cells=Cells(**_made(_CELLS, cells)),
            owners=Owners(**_made(_OWNERS, owners)),
        )

    def codec_id(self, codec: str) -> int:
        known = self._codec_ids.get(codec)
        if known is None:
            known = self._codec_ids[codec] = len(self.codecs)
            self.codecs.append(codec)
        return known

    def nbytes(self) -> int:
        """Bytes that hold something: capacity never touched takes no memory."""
        used = {Rows: self.n_rows, Cells: self.n_cells, Owners: self.n_owners}
        parts = (self.arrays.rows, self.arrays.cells, self.arrays.owners)
        columns = sum(getattr(part, f.name)[: used[type(part)]].nbytes for part in parts for f in fields(part))
        return int(columns + self.arrays.slots.nbytes + self.arrays.names.nbytes)

    # ---- growing: the writer only ------------------------------------------------------------------------------------

    def reserve(self, rows: int, cells: int, owners: int) -> None:
        """Room for so many more, the hash tables' too."""
        if self.n_rows + rows > MAX_ROWS:
            raise Unusable(f"more than {MAX_ROWS} chunks in one index: collect garbage first", kind="oversized")
        a = self.arrays
        wanted = (self.n_rows + rows, self.n_cells + cells, self.n_owners + owners)
        a = replace(
            a,
            rows=_grown(a.rows, _ROWS, self.n_rows, wanted[0]),
            cells=_grown(a.cells, _CELLS, self.n_cells, wanted[1]),
            owners=_grown(a.owners, _OWNERS, self.n_owners, wanted[2]),
        )
        if wanted[0] > _most(a.slots):
            a = replace(a, slots=_slots(wanted[0]))
            self._index_all(a)
        if wanted[2] > _most(a.names):
            a = replace(a, names=_slots(wanted[2]))
            self._index_names(a, np.arange(self.n_owners))
        self.arrays = a

    def append(self, batch: Batch) -> None:
        """Append extents. Raises `Unusable` if one holds a hash twice: the table must then be thrown away."""
        counts = batch.owners["counts"]
        self.reserve(len(batch.hashes), len(batch.lengths), len(counts))
        rows = slice(self.n_rows, self.n_rows + len(batch.hashes))
        cells = slice(self.n_cells, self.n_cells + len(batch.lengths))
        owners = slice(self.n_owners, self.n_owners + len(counts))
        self.set_owners(batch.owners, batch.codecs, owners, rows.start, cells.start)
        a = self.arrays
        a.rows.hashes[rows] = batch.hashes
        a.rows.owner[rows] = np.repeat(a.owners.itself[owners], counts)
        a.cells.lengths[cells], a.cells.sums[cells] = batch.lengths, batch.sums
        self.n_rows, self.n_cells, self.n_owners = rows.stop, cells.stop, owners.stop
        self._index_names(a, np.arange(owners.start, owners.stop))
        self._index_rows(a, np.arange(rows.start, rows.stop), batch.hashes)

    def set_owners(
        self, columns: dict[str, Array], codecs: Codecs, owners: slice, first_row: int, first_cell: int
    ) -> None:
        """Fill in the owners' columns; rows and cells follow one another from the given ones on."""
        o = self.arrays.owners
        counts = columns["counts"]
        widths = columns["stages"].astype(np.int64) * columns["head_groups"]
        for name, values in columns.items():
            getattr(o, name)[owners] = values
        o.starts[owners] = first_row + np.cumsum(counts) - counts
        o.cells[owners] = first_cell + np.cumsum(counts * widths) - counts * widths
        names, which = codecs
        o.codec[owners] = np.array([self.codec_id(codec) for codec in names], np.uint16)[which]
        o.removed_at[owners] = hash_index.NEVER
        o.itself[owners] = np.arange(owners.start, owners.stop, dtype=np.uint32)

    def index_all(self, run: Callable[..., Iterable[Any]] = map) -> None:
        """Make all rows findable; none is yet. run: `map`, or an executor's, to do it in several threads."""
        self._index_all(self.arrays, run)

    def _index_all(self, a: Arrays, run: Callable[..., Iterable[Any]] = map) -> None:
        n = self.n_rows
        bits = a.slots.size.bit_length() - 1
        region_bits = min(bits, hash_build.REGION_BITS)
        where = (a.rows.hashes, a.seed, hash_index.shift_of(a.slots), np.uint64(region_bits))
        parts = [(first, min(n, first + _ROWS_AT_ONCE)) for first in range(0, n, _ROWS_AT_ONCE)]
        counts = np.zeros((len(parts), a.slots.size >> region_bits), np.int64)
        list(run(lambda i: hash_build.count(*where, *parts[i], counts[i]), range(len(parts))))
        ends = np.cumsum(counts.sum(0))
        begins = ends - counts.sum(0)
        at = begins + np.cumsum(counts, 0) - counts
        rows, homes = np.empty(n, np.uint32), np.empty(n, np.uint32)
        list(run(lambda i: hash_build.scatter(*where, *parts[i], at[i], rows, homes), range(len(parts))))

        def fill(region: int) -> Array:
            some = slice(begins[region], ends[region])
            left = np.empty(some.stop - some.start, np.uint32)
            n_left = hash_build.fill(
                a.slots, a.rows.hashes, a.rows.owner, a.owners.starts, rows[some], homes[some],
                (region + 1) << region_bits, left,
            )  # fmt: skip
            self._check_once(a, n_left)
            return left[:n_left]

        left = np.concatenate([*run(fill, range(len(ends))), np.empty(0, np.uint32)]).astype(np.int64)
        self._index_rows(a, left, a.rows.hashes[left])

    def index_names(self) -> None:
        self._index_names(self.arrays, np.arange(self.n_owners))

    def _index_rows(self, a: Arrays, rows: Array, hashes: Array) -> None:
        shift = hash_index.shift_of(a.slots)
        bad = hash_index.insert(a.slots, a.seed, shift, a.rows.hashes, a.rows.owner, a.owners.starts, rows, hashes)
        self._check_once(a, bad)

    def _check_once(self, a: Arrays, bad: np.signedinteger[Any]) -> None:
        """bad: as `hash_index.insert` returns it."""
        if bad < 0:
            raise Unusable(f"extent {self.name(a, -1 - int(bad))}: a prefix hash occurs twice", kind="format")

    def _index_names(self, a: Arrays, owners: Array) -> None:
        o, shift = a.owners, hash_index.shift_of(a.names)
        hash_index.insert(
            a.names, a.seed, shift, o.nonces, o.itself, o.itself.astype(np.int64), owners, o.nonces[owners]
        )

    # ---- reading -----------------------------------------------------------------------------------------------------

    def name(self, a: Arrays, owner: int) -> ExtentName:
        o = a.owners
        last = int(o.starts[owner] + o.counts[owner] - 1)
        return ExtentName(
            a.rows.hashes[last].tobytes(),
            int(o.counts[owner]),
            self.codecs[o.codec[owner]],
            int(o.born[owner]),
            o.nonces[owner].tobytes().hex(),
        )

    def record(self, a: Arrays, owner: int) -> ExtentRecord:
        o = a.owners
        start, n = int(o.starts[owner]), int(o.counts[owner])
        grid = Grid(int(o.stages[owner]), int(o.head_groups[owner]))
        cell, cells = int(o.cells[owner]), n * grid.shards
        return ExtentRecord(
            name=self.name(a, owner),
            grid=grid,
            parent=o.parents[owner].tobytes(),
            first_token=int(o.first_token[owner]),
            hashes=a.rows.hashes[start : start + n].tobytes(),
            lengths=a.cells.lengths[cell : cell + cells].tobytes(),
            sums=a.cells.sums[cell : cell + cells].tobytes(),
            raw_bytes=int(o.raw_bytes[owner]),
        )

    def might_know(self, a: Arrays, names: Sequence[ExtentName]) -> list[bool]:
        """For each name, whether any extent has its nonce; quicker than asking for each."""
        keys = _pairs(bytes.fromhex("".join(name.nonce for name in names)))
        o, shift, found = a.owners, hash_index.shift_of(a.names), np.empty(len(names), np.int64)
        never = np.uint64(0)  # any version: removed ones too
        hash_index.resolve(a.names, a.seed, shift, o.nonces, o.itself, o.removed_at, self.n_owners, never, keys, found)
        known: list[bool] = (found >= 0).tolist()
        return known

    def owner_of(self, a: Arrays, owners: int, version: int, name: ExtentName) -> int | None:
        """The live owner of that name at a version, among the first `owners`."""
        key = np.frombuffer(bytes.fromhex(name.nonce), np.uint64)
        o, shift = a.owners, hash_index.shift_of(a.names)
        found = np.empty(4, np.int64)
        while True:
            n = hash_index.find(
                a.names, a.seed, shift, o.nonces, o.itself, o.removed_at, owners, np.uint64(version), key, found
            )
            if n <= found.size:
                break
            found = np.empty(n, np.int64)
        # Nonces are random, but nobody checks that a writer made a new one.
        return next((int(i) for i in found[:n] if self.name(a, int(i)) == name), None)


def gathered(table: Table, a: Arrays, owners: Array) -> Batch:
    """These owners' columns, end to end, in the order given."""
    o = a.owners
    counts = o.counts[owners]
    widths = o.stages[owners].astype(np.int64) * o.head_groups[owners]
    rows = _ranges(o.starts[owners], counts)
    cells = _ranges(o.cells[owners], counts * widths)
    kept = [name for name in _OWNERS if name not in ("starts", "cells", "codec", "removed_at", "itself")]
    return Batch(
        hashes=a.rows.hashes[rows],
        lengths=a.cells.lengths[cells],
        sums=a.cells.sums[cells],
        owners={name: getattr(o, name)[owners] for name in kept},
        codecs=(list(table.codecs), o.codec[owners]),
    )


def batch_of(records: Sequence[ExtentRecord], created: int, places: Sequence[int]) -> Batch:
    """Records as columns. places: where each stood in its version."""

    def column(values: Sequence[int], kind: type = np.int64) -> Array:
        return np.array(values, kind)

    names = [record.name for record in records]
    codecs = list(dict.fromkeys(name.codec for name in names))
    return Batch(
        hashes=_pairs(b"".join(record.hashes for record in records)),
        lengths=np.frombuffer(b"".join(record.lengths for record in records), np.uint32),
        sums=np.frombuffer(b"".join(record.sums for record in records), np.uint64),
        owners={
            "nonces": _pairs(bytes.fromhex("".join(name.nonce for name in names))),
            "parents": _pairs(b"".join(record.parent for record in records)),
            "counts": column([name.n_chunks for name in names]),
            "stages": column([record.grid.stages for record in records], np.uint32),
            "head_groups": column([record.grid.head_groups for record in records], np.uint32),
            "first_token": column([record.first_token for record in records]),
            "born": column([name.born for name in names]),
            "raw_bytes": column([record.raw_bytes for record in records]),
            "created": column([created] * len(names)),
            "place": column(places, np.uint32),
        },
        codecs=(codecs, np.array([codecs.index(name.codec) for name in names], np.int64)),
    )


def keys_of(hashes: Sequence[bytes]) -> Array:
    """u64 [n, 2] of 16-byte hashes."""
    return _pairs(b"".join(hashes))


def _pairs(data: bytes) -> Array:
    return np.frombuffer(data, np.uint64).reshape(-1, HASH_BYTES // 8)


def _ranges(starts: Array, counts: Array) -> Array:
    """starts[0], starts[0] + 1, … counts[0] of them, then starts[1] …"""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def _slots(rows: int) -> Array:
    """An empty hash table that takes so many rows."""
    n = _LEAST
    while rows > n * 3 // 4:
        n *= 2
    return np.zeros(n, np.uint32)


def _most(slots: Array) -> int:
    return int(slots.size * 3 // 4)


def _made(columns: _Columns, capacity: int) -> dict[str, Array]:
    capacity = max(capacity, _LEAST)
    return {name: np.empty((capacity, width) if width else capacity, kind) for name, (kind, width) in columns.items()}


def _grown(part: _Part, columns: _Columns, used: int, wanted: int) -> _Part:
    """The part, or a copy of twice its size. (Memory that is never touched is never taken.)"""
    first = next(iter(columns))
    if wanted <= len(getattr(part, first)):
        return part
    longer = _made(columns, max(wanted, 2 * used))
    for name, column in longer.items():
        column[:used] = getattr(part, name)[:used]
    return type(part)(**longer)
