"""One upload: the cells of one shard encoded side by side, joined to one object, put once.

Memory: where all cells have one length, they are encoded straight into the object. Others take what
encoding takes from the budget and give back the difference after; the object then takes its own, and its parts go when
they are in it. No room → `Unavailable(full)` at once, for stores are what is dropped first.
"""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lmcache_s3.budget import ByteBudget
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.checksum import xxh3
from lmcache_s3.errors import Invalid, LMCacheS3Error
from lmcache_s3.handle import Work
from lmcache_s3.lane import Lane, Slot
from lmcache_s3.reading import Step
from lmcache_s3.resting import RestingTier
from lmcache_s3.tiers.buffers import BufferPool, rounded
from lmcache_s3.tiers.object import ObjectTier
from lmcache_s3.tracebacks import without_frames
from lmcache_s3.types import HASH_BYTES, Buffer, CellRef, ExtentName, Geometry, Grid


@dataclass(frozen=True, slots=True)
class StoredShard:
    """What the index must know of a shard that is stored.

    lengths: u32 little-endian, sums: u64 little-endian, one a cell, in order, as `ExtentRecord` keeps them. n_bytes: of
    the whole object.
    """

    lengths: bytes
    sums: bytes
    n_bytes: int


def stored_shard(lengths: Sequence[int], sums: Sequence[int], n_bytes: int) -> StoredShard:
    n = len(lengths)
    return StoredShard(struct.pack(f"<{n}I", *lengths), struct.pack(f"<{n}Q", *sums), n_bytes)


@dataclass(frozen=True, slots=True)
class ShardJob:
    """What is to be stored: the cells of one shard of a named extent, each `geometry.cell_shape(grid)`."""

    name: ExtentName
    grid: Grid
    shard: int
    first_token: int
    hashes: bytes
    cells: Sequence[np.ndarray]
    parent: bytes = b""
    """Prefix hash of the chunk before the first; empty: not known."""

    def check(self, geometry: Geometry, codec: KVCodec) -> None:
        """Raises `Invalid` if the parts do not fit together."""
        if not geometry.divides(self.grid) or not 0 <= self.shard < self.grid.shards:
            raise Invalid(f"shard {self.shard} of {self.grid} does not divide this model", kind="argument")
        if len(self.cells) != self.name.n_chunks or len(self.hashes) != HASH_BYTES * self.name.n_chunks:
            raise Invalid(
                f"extent {self.name}: {len(self.cells)} cells and {len(self.hashes)} bytes of hashes", kind="argument"
            )
        if self.name.codec != codec.id:
            raise Invalid(f"extent {self.name} is named for another codec than {codec.id}", kind="argument")
        shape = geometry.cell_shape(self.grid)
        for cell in self.cells:
            if cell.shape != shape or cell.dtype != geometry.storage_dtype:
                raise Invalid(
                    f"a cell is {cell.dtype}{list(cell.shape)}, not {geometry.storage_dtype}{list(shape)}",
                    kind="argument",
                )

    def position(self, geometry: Geometry, i: int) -> CellPosition:
        return CellPosition(
            self.hashes[HASH_BYTES * i : HASH_BYTES * (i + 1)],
            self.first_token + i * geometry.chunk_tokens,
            geometry.cell_layers(self.grid, self.shard).start,
            geometry.cell_heads(self.grid, self.shard).start,
        )


OnStored: TypeAlias = Callable[[list[tuple[CellRef, Buffer]]], None]
"""Told of stored cells and their bytes, to keep them in faster tiers."""


@dataclass(frozen=True, slots=True)
class UploadMeans:
    """What all uploads of a transfer share. share: part of the budget that uploads may use. close_shard: the index that
    ends a shard object, from its cells' lengths. workers: to encode; lane: to PUT."""

    geometry: Geometry
    bucket: ObjectTier
    budget: ByteBudget
    share: float
    buffers: BufferPool
    close_shard: Callable[[Sequence[int]], bytes]
    workers: ThreadPoolExecutor
    lane: Lane
    step: Step

    def new_body(self, lengths: Sequence[int]) -> memoryview:
        """Memory for an object of such cells, its index written. Raises `Unavailable(full)`."""
        index = self.close_shard(lengths)
        n_bytes = sum(lengths) + len(index)
        budget, size = self.budget, rounded(n_bytes)
        budget.take(size, self.share)
        body = self.buffers.take(n_bytes, lambda: budget.give_back(size))
        body[n_bytes - len(index) :] = index
        return body


class Upload:
    """The state of one upload. Thread-safe.

    means: what all uploads share. on_stored: told of the stored cells (their bytes are views of the object), to keep
    them in faster tiers; on the thread that stored them, after the work has ended. rest_in: keep the cells there
    instead of putting them, to be uploaded later (`rested_upload.py`).
    """

    def __init__(
        self,
        job: ShardJob,
        means: UploadMeans,
        codec: KVCodec,
        on_stored: OnStored,
        rest_in: RestingTier | None = None,
    ) -> None:
        self.job = job
        self._means = means
        self._codec = codec
        self._on_stored = on_stored
        self._rest_in = rest_in
        self._spec = CellSpec.of(means.geometry, job.grid)
        # What rests must not lie in memory for things under way.
        self._cell_bytes = codec.fixed_bytes(self._spec) if rest_in is None else None
        self._lock = threading.Lock()
        self._body: memoryview | None = None
        self._encoded: list[Buffer] = [b""] * len(job.cells)
        self._lengths = [0] * len(job.cells)
        self._sums = [0] * len(job.cells)
        self._left = len(job.cells)
        self._held_bytes = 0
        self._broken = False
        self.work: Work[StoredShard] = Work(sum(cell.nbytes for cell in job.cells))

    def start(self) -> None:
        """Hand all cells to the workers. Does not block."""
        for i in range(len(self.job.cells)):
            # Also when the first have failed already: the last to run gives the memory back.
            self._means.step(lambda i=i: self._means.workers.submit(self._run, i), self.work)  # type: ignore[misc]

    def _run(self, i: int) -> None:
        """Encode one cell; whoever is last has them stored."""
        whole = False
        try:
            if not self.work.over:
                self._encode(i)
                whole = True
        except LMCacheS3Error as e:
            self.work.fail(without_frames(e))
        finally:
            with self._lock:
                self._left -= 1
                self._broken = self._broken or not whole
                last = self._left == 0
            if last:
                ready = not self._broken and not self.work.over
                if not ready or not self._means.step(lambda: self._means.lane.submit(self._store), self.work):
                    self._let_go()

    def _encode(self, i: int) -> None:
        data = self._encode_in_place(i) if self._cell_bytes is not None else self._encode_apart(i)
        self._lengths[i], self._sums[i] = memoryview(data).nbytes, xxh3(data)
        self.work.advance(self.job.cells[i].nbytes)

    def _encode_in_place(self, i: int) -> Buffer:
        """Of cells whose lengths are known before: straight to their place in the object."""
        assert self._cell_bytes is not None
        with self._lock:
            if self._body is None:
                self._body = self._means.new_body([self._cell_bytes] * len(self.job.cells))
            place = self._body[i * self._cell_bytes : (i + 1) * self._cell_bytes]
        self._codec.encode_into(self.job.cells[i], self._spec, self.job.position(self._means.geometry, i), place)
        return place

    def _encode_apart(self, i: int) -> Buffer:
        budget, share = self._means.budget, self._means.share
        most = max(self._codec.max_encoded_bytes(self._spec), self._codec.encode_memory_bytes(self._spec))
        budget.take(most, share)
        kept = 0
        try:
            data = self._codec.encode(self.job.cells[i], self._spec, self.job.position(self._means.geometry, i))
            self._encoded[i] = data
            kept = len(data)
        finally:
            with self._lock:
                self._held_bytes += kept
            budget.give_back(most - kept)
        return data

    def _store(self, slot: Slot) -> None:
        """Join what was encoded apart, PUT the object: on a thread of the lane."""
        try:
            if not self.work.over:
                self._put()
        except LMCacheS3Error as e:
            self.work.fail(without_frames(e))
        finally:
            self._let_go()

    def _put(self) -> None:
        cells = self._refs()
        if self._rest_in is not None:
            self._rest_in.rest(list(zip(cells, self._encoded, strict=True)))
            if not self.work.finish(stored_shard(self._lengths, self._sums, sum(self._lengths))):
                self._rest_in.forget([self.job.name])
            return
        if self._body is None:
            self._body = self._means.new_body(self._lengths)
            join(self._encoded, self._body)
        put_body(self._means, self.work, self._body, cells, self._on_stored)

    def _let_go(self) -> None:
        self._encoded = []
        self._body = None
        with self._lock:
            held, self._held_bytes = self._held_bytes, 0
        self._means.budget.give_back(held)

    def _refs(self) -> list[CellRef]:
        refs = []
        offset = 0
        job, parent = self.job, self.job.parent
        for i, length in enumerate(self._lengths):
            own = job.hashes[HASH_BYTES * i : HASH_BYTES * (i + 1)]
            refs.append(
                CellRef(job.name, job.grid, job.shard, i, offset, length, self._sums[i], own, parent, job.first_token)
            )
            parent = own
            offset += length
        return refs


def join(parts: list[Buffer], body: memoryview) -> None:
    """Copy the cells one after another to the beginning of `body`. Empties `parts`, so memory goes as it is copied."""
    offset = 0
    for i in range(len(parts)):
        part, parts[i] = np.frombuffer(parts[i], np.uint8), b""
        np.copyto(np.frombuffer(body[offset : offset + part.nbytes], np.uint8), part)  # without the GIL
        offset += part.nbytes


def put_body(
    means: UploadMeans, work: Work[StoredShard], body: memoryview, cells: Sequence[CellRef], on_stored: OnStored
) -> None:
    """PUT a whole shard object, end the work, tell of its cells. Raises what the store says."""
    means.lane.measured(functools.partial(means.bucket.put_shard, cells[0], body), body.nbytes)
    if work.finish(stored_shard([cell.length for cell in cells], [cell.checksum for cell in cells], body.nbytes)):
        view = body.toreadonly()
        on_stored([(cell, view[cell.offset : cell.offset + cell.length]) for cell in cells])
