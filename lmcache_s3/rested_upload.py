"""One upload of cells that rested: joined as they are to one object, put once. The last step of write-behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lmcache_s3.errors import Invalid, LMCacheS3Error
from lmcache_s3.handle import Work
from lmcache_s3.lane import Slot
from lmcache_s3.resting import RestingTier
from lmcache_s3.tracebacks import without_frames
from lmcache_s3.types import CellRef, ChunkRef, ExtentName, Grid
from lmcache_s3.uploading import OnStored, StoredShard, UploadMeans, join, put_body


class RestedUpload:
    """The upload of one shard of extent `name`, whose chunks rest under other names (`chunks`, in order).

    first_token: tokens of the prompt before the extent. means, on_stored: as for `uploading.Upload`.
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
        means: UploadMeans,
        on_stored: OnStored,
    ) -> None:
        if len(chunks) != name.n_chunks or any(chunk.extent.grid != grid for chunk in chunks):
            raise Invalid(f"extent {name}: its resting chunks are of another grid or number", kind="argument")
        self._rested = [chunk.cell(shard) for chunk in chunks]
        self._cells: list[CellRef] = []
        offset = 0
        for i, cell in enumerate(self._rested):
            self._cells.append(replace(cell, extent=name, position=i, offset=offset, first_token=first_token))
            offset += cell.length
        self._resting, self._means, self._on_stored = resting, means, on_stored
        self.work: Work[StoredShard] = Work(offset)

    def run(self, slot: Slot) -> None:
        """Join and put, and so end the work. Blocks, on a thread of the store lane."""
        if self.work.over:
            return
        try:
            data = [self._resting.get([cell])[0] for cell in self._rested]
            body = self._means.new_body([cell.length for cell in self._cells])
            join(data, body)
            put_body(self._means, self.work, body, self._cells, self._on_stored)
        except LMCacheS3Error as e:
            self.work.fail(without_frames(e))
