"""The object tier: cells as they lie in the bucket, in shard objects that are written once and whole.

Consecutive cells of one shard are one range GET, verified against the index's checksums on the way out. `get` is the
`Tier` port's; the transfer, which reads into memory of its own and verifies in other threads, uses `read_into` and
`checked`. The tier has no budget and evicts nothing: what lives in the bucket is the affair of the index and its
garbage collection. Likewise `match_prefix` says yes to everything: whoever holds a `CellRef` has it from the index.
Raises what the `Tier` port says; `Invalid` (credentials, bucket) from the store passes through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from lmcache_s3.errors import Invalid, Missing, Unusable
from lmcache_s3.tiers.base import TierStats
from lmcache_s3.tiers.buffers import BufferPool
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.verify import verify
from lmcache_s3.types import Buffer, CellRef, shard_key


class ObjectTier:
    """The cells of one space in an object store.

    close_shard: makes the index that ends a shard object from its cells' lengths in bytes (`extent.shard_index`).
    buffers: where `get` takes memory; None: nothing is kept for the next reads.
    """

    name = "object"
    budget_bytes: int | None = None

    def __init__(
        self,
        store: ObjectStore,
        space_id: str,
        close_shard: Callable[[Sequence[int]], bytes],
        *,
        buffers: BufferPool | None = None,
    ) -> None:
        self._store = store
        self._space_id = space_id
        self._close_shard = close_shard
        self._buffers = buffers or BufferPool(0)
        self._lock = threading.Lock()
        self._hits = self._misses = self._bad = self._read_bytes = self._written_bytes = 0

    def match_prefix(self, cells: Sequence[CellRef]) -> int:
        return len(cells)

    def use(self, cells: Sequence[CellRef]) -> None:
        """Evicts nothing, so it need not know."""

    def get(self, cells: Sequence[CellRef]) -> list[Buffer]:
        out: list[Buffer] = []
        for run in ranges_of(cells):
            first, last = run[0], run[-1]
            buffer = self._buffers.take(last.offset + last.length - first.offset)
            self.read_into(first, first.offset, buffer)
            for cell in run:
                start = cell.offset - first.offset
                out.append(self.checked(cell, buffer[start : start + cell.length].toreadonly()))
        return out

    def read_into(self, cell: CellRef, start: int, into: memoryview) -> None:
        """Fill `into` from byte `start` of the shard object that holds `cell`. One GET; nothing is verified."""
        try:
            self._store.get_into(shard_key(self._space_id, cell.extent, cell.grid, cell.shard), start, into)
        except Missing as e:
            with self._lock:
                self._misses += 1
            raise Missing(str(e), key=str(cell.extent)) from e
        except Unusable as e:
            raise self._bad_cell(cell, e) from e
        with self._lock:
            self._read_bytes += into.nbytes

    def checked(self, cell: CellRef, data: Buffer) -> Buffer:
        """`data` if it is the cell's. Raises `Unusable`."""
        try:
            verify(cell, data)
        except Unusable as e:
            raise self._bad_cell(cell, e) from e
        with self._lock:
            self._hits += 1
        return data

    def _bad_cell(self, cell: CellRef, e: Unusable) -> Unusable:
        with self._lock:
            self._bad += 1
        return Unusable(str(e), kind=e.kind, key=str(cell.extent))

    def put(self, cells: Sequence[tuple[CellRef, Buffer]]) -> int:
        """Write one shard object; `cells` must be all of the shard's, in order. One PUT."""
        if not cells:
            return 0
        first = cells[0][0]
        offset = 0
        for i, (cell, data) in enumerate(cells):
            if (cell.extent, cell.grid, cell.shard, cell.position, cell.offset) != (
                first.extent,
                first.grid,
                first.shard,
                i,
                offset,
            ):
                raise Invalid(f"extent {first.extent}: a shard is put whole, from its first cell on", kind="argument")
            verify(cell, data)
            offset += cell.length
        if len(cells) != first.extent.n_chunks:
            raise Invalid(
                f"extent {first.extent}: a shard has {first.extent.n_chunks} cells, not {len(cells)}", kind="argument"
            )
        body = join_shard([data for _, data in cells], self._close_shard([cell.length for cell, _ in cells]))
        self.put_shard(first, body)
        return len(cells)

    def put_shard(self, first: CellRef, body: Buffer) -> None:
        """Write a shard object that is already assembled (see `join_shard`)."""
        self._store.put(shard_key(self._space_id, first.extent, first.grid, first.shard), body)
        with self._lock:
            self._written_bytes += memoryview(body).nbytes

    def evict(self, n_bytes: int) -> int:
        """Frees nothing: returns 0."""
        return 0

    def discard(self, cells: Sequence[CellRef]) -> None:
        """Nothing to forget: a damaged extent is taken out of the index, and collected from there."""

    def stats(self) -> TierStats:
        """`cells` and `used_bytes` are 0: the index knows what the bucket holds."""
        with self._lock:
            return TierStats(0, 0, None, self._hits, self._misses, 0, self._bad, self._read_bytes, self._written_bytes)

    def close(self) -> None:
        """The store is its opener's to close."""
        self._buffers.close()


def ranges_of(cells: Sequence[CellRef]) -> Iterator[Sequence[CellRef]]:
    """Runs of cells that lie one after another in one shard object: one GET each."""
    start = 0
    for i in range(1, len(cells) + 1):
        if i < len(cells):
            a, b = cells[i - 1], cells[i]
            if b.shard == a.shard and b.offset == a.offset + a.length and b.extent == a.extent:
                continue
        yield cells[start:i]
        start = i


def join_shard(cells: list[Buffer], index: bytes) -> bytearray:
    """A shard object: the cells one after another, then the index. Empties `cells`, so memory is not held twice."""
    body = bytearray(sum(memoryview(data).nbytes for data in cells) + len(index))
    view = memoryview(body)
    offset = 0
    for i, data in enumerate(cells):
        flat = memoryview(data).cast("B")
        view[offset : offset + flat.nbytes] = flat
        offset += flat.nbytes
        cells[i] = b""
        del data, flat
    view[offset:] = index
    return body
