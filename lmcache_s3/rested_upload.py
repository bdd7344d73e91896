"""One upload of cells that rested: joined as they are to one object, put once. The last step of write-behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lmcache_s3.budget import ByteBudget
from lmcache_s3.errors import Invalid, LMCacheS3Error
from lmcache_s3.handle import Work
from lmcache_s3.resting import RestingTier
from lmcache_s3.tiers.object import ObjectTier, join_shard
from lmcache_s3.types import Buffer, CellRef, ChunkRef, ExtentName, Grid
from lmcache_s3.uploading import StoredShard, stored_shard


class RestedUpload:
    """The upload of one shard of extent `name`, whose chunks rest under other names (`chunks`, in order).

    first_token: tokens of the prompt before the extent.
    share: part of the budget that uploads may use. on_stored: as for `uploading.Upload`.
    Raises `Invalid` if the chunks do not make such a shard.
    """

    def __init__(
        self,
        name: ExtentName,
        grid: Grid,
        shard: int,
        first_token: int,
        chunks: Sequence[ChunkRef],
        *,
        resting: RestingTier,
        bucket: ObjectTier,
        close_shard: Callable[[Sequence[int]], bytes],
        budget: ByteBudget,
        share: float,
        on_stored: Callable[[Sequence[CellRef], Sequence[Buffer]], None],
    ) -> None:
        if len(chunks) != name.n_chunks or any(chunk.extent.grid != grid for chunk in chunks):
            raise Invalid(f"extent {name}: its resting chunks are of another grid or number", kind="argument")
        self._rested = [chunk.cell(shard) for chunk in chunks]
        self._cells: list[CellRef] = []
        offset = 0
        for i, cell in enumerate(self._rested):
            self._cells.append(replace(cell, extent=name, position=i, offset=offset, first_token=first_token))
            offset += cell.length
        self._n_bytes = offset
        self._resting, self._bucket, self._close_shard = resting, bucket, close_shard
        self._budget, self._share = budget, share
        self._on_stored = on_stored
        self.work: Work[StoredShard] = Work(offset)

    def run(self) -> None:
        """Join and put, and so end the work. Blocks, on a store thread."""
        if self.work.over:
            return
        try:
            self._budget.take(self._n_bytes, self._share)
            try:
                self._put()
            finally:
                self._budget.give_back(self._n_bytes)
        except LMCacheS3Error as e:
            self.work.fail(e)

    def _put(self) -> None:
        data = [self._resting.get([cell])[0] for cell in self._rested]
        lengths = [cell.length for cell in self._cells]
        body = join_shard(data, self._close_shard(lengths))
        self._bucket.put_shard(self._cells[0], body)
        if self.work.finish(stored_shard(lengths, [cell.checksum for cell in self._cells], len(body))):
            view = memoryview(body).toreadonly()
            self._on_stored(self._cells, [view[cell.offset : cell.offset + cell.length] for cell in self._cells])
