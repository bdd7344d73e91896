"""One upload: the cells of one shard encoded side by side, joined to one object, put once.

Memory: each cell takes its worst encoded size from the budget before it is encoded and gives back the difference after;
the joined object replaces its parts. No room → `Unavailable(full)` at once, for stores are what is dropped first.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lmcache_s3.budget import ByteBudget
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.checksum import xxh3
from lmcache_s3.errors import Invalid, LMCacheS3Error
from lmcache_s3.handle import Work
from lmcache_s3.resting import RestingTier
from lmcache_s3.tiers.object import ObjectTier, join_shard
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


class Upload:
    """The state of one upload. Thread-safe.

    share: part of the budget that uploads may use. on_stored: told of the stored cells (their bytes are views of the
    object), to keep them in faster tiers; on the store thread, after the work has ended. rest_in: keep the cells there
    instead of putting them, to be uploaded later (`rested_upload.py`).
    """

    def __init__(
        self,
        job: ShardJob,
        geometry: Geometry,
        codec: KVCodec,
        *,
        bucket: ObjectTier,
        close_shard: Callable[[Sequence[int]], bytes],
        budget: ByteBudget,
        share: float,
        on_stored: Callable[[Sequence[CellRef], Sequence[Buffer]], None],
        rest_in: RestingTier | None = None,
    ) -> None:
        self.job = job
        self._geometry = geometry
        self._codec = codec
        self._bucket = bucket
        self._close_shard = close_shard
        self._budget = budget
        self._share = share
        self._on_stored = on_stored
        self._rest_in = rest_in
        self._spec = CellSpec.of(geometry, job.grid)
        self._lock = threading.Lock()
        self._encoded: list[Buffer] = [b""] * len(job.cells)
        self._sums = [0] * len(job.cells)
        self._left = len(job.cells)
        self._held_bytes = 0
        self._broken = False
        self.work: Work[StoredShard] = Work(sum(cell.nbytes for cell in job.cells))

    def run(self, i: int) -> None:
        """Encode one cell; whoever is last joins and stores them, and so ends the work. Blocks, on a store thread."""
        whole = False
        try:
            if not self.work.over:
                self._encode(i)
                whole = True
        except LMCacheS3Error as e:
            self.work.fail(e)
        finally:
            with self._lock:
                self._left -= 1
                self._broken = self._broken or not whole
                last = self._left == 0
            if last:
                self._end()

    def _end(self) -> None:
        try:
            if not self._broken and not self.work.over:
                self._put()
        except LMCacheS3Error as e:
            self.work.fail(e)
        finally:
            self._encoded = []
            with self._lock:
                held, self._held_bytes = self._held_bytes, 0
            self._budget.give_back(held)

    def _encode(self, i: int) -> None:
        most = self._codec.max_encoded_bytes(self._spec)
        self._budget.take(most, self._share)
        kept = 0
        try:
            data = self._codec.encode(self.job.cells[i], self._spec, self.job.position(self._geometry, i))
            self._sums[i] = xxh3(data)
            self._encoded[i] = data
            kept = len(data)
        finally:
            with self._lock:
                self._held_bytes += kept
            self._budget.give_back(most - kept)
        self.work.advance(self.job.cells[i].nbytes)

    def _put(self) -> None:
        lengths = [len(data) for data in self._encoded]
        cells = self._refs(lengths)
        if self._rest_in is not None:
            self._rest_in.rest(list(zip(cells, self._encoded, strict=True)))
            if not self.work.finish(stored_shard(lengths, self._sums, sum(lengths))):
                self._rest_in.forget([self.job.name])
            return
        body = join_shard(self._encoded, self._close_shard(lengths))
        self._bucket.put_shard(cells[0], body)
        if self.work.finish(stored_shard(lengths, self._sums, len(body))):
            view = memoryview(body).toreadonly()
            self._on_stored(cells, [view[cell.offset : cell.offset + cell.length] for cell in cells])

    def _refs(self, lengths: Sequence[int]) -> list[CellRef]:
        refs = []
        offset = 0
        job, parent = self.job, self.job.parent
        for i, length in enumerate(lengths):
            own = job.hashes[HASH_BYTES * i : HASH_BYTES * (i + 1)]
            refs.append(
                CellRef(job.name, job.grid, job.shard, i, offset, length, self._sums[i], own, parent, job.first_token)
            )
            parent = own
            offset += length
        return refs
