"""Places: which part of which chunk a cell is, as one short key. A tier holds at most one cell a place.

The place of a cell's parent follows from the cell's reference alone, so that a tier knows what hangs on what.
Pure. Raises nothing.
"""

from __future__ import annotations

import functools

from lmcache_s3.types import CellRef


def place_of(cell: CellRef) -> bytes:
    return cell.prefix_hash + part(cell.grid.stages, cell.grid.head_groups, cell.shard)


def parent_of(cell: CellRef) -> bytes | None:
    """The place of the same part of the chunk before it; None if that is not known."""
    return cell.parent + part(cell.grid.stages, cell.grid.head_groups, cell.shard) if cell.parent else None


@functools.lru_cache(maxsize=1024)
def part(stages: int, head_groups: int, shard: int) -> bytes:
    """What follows a chunk's prefix hash in its places."""
    return b".%d.%d.%d" % (stages, head_groups, shard)
