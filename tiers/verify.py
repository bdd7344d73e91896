"""Are these bytes the cell the index speaks of? Length first, then XXH3-64 over all of them.

Pure. Raises `Unusable` (truncated, oversized, checksum; key = the extent), nothing else.
"""

from __future__ import annotations

from lmcache_s3.codecs.checksum import xxh3
from lmcache_s3.errors import Unusable
from lmcache_s3.types import Buffer, CellRef


def verify(cell: CellRef, data: Buffer) -> None:
    """Raise `Unusable` unless `data` is exactly the cell's stored bytes."""
    n_bytes = memoryview(data).nbytes
    if n_bytes != cell.length:
        kind = "truncated" if n_bytes < cell.length else "oversized"
        raise Unusable(f"{where(cell)} has {n_bytes} bytes, not {cell.length}", kind=kind, key=str(cell.extent))
    if xxh3(data) != cell.checksum:
        raise Unusable(f"{where(cell)} has another checksum than the index", kind="checksum", key=str(cell.extent))


def where(cell: CellRef) -> str:
    """The cell in words, for messages."""
    return f"cell {cell.position} of shard {cell.shard} of extent {cell.extent}"
