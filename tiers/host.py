"""The host tier: stored cells in this process's memory.

Cells are copied in, so a caller may reuse its buffers at once; `get` hands out the kept bytes themselves, uncopied
(nobody can write to them, and an evicted one lives on while somebody reads it). Verified on the way in.
Raises what the `Tier` port says.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.tiers.lru import CellKey, LRUTier
from lmcache_s3.types import Buffer, CellRef


class HostTier(LRUTier[memoryview]):
    """Cells in host memory, at most `budget_bytes` of them."""

    def __init__(self, budget_bytes: int) -> None:
        super().__init__("host", budget_bytes)

    def _write(self, cell: CellRef, data: Buffer) -> memoryview:
        kept = np.empty(cell.length, np.uint8)
        np.copyto(kept, np.frombuffer(data, np.uint8))  # unlike bytes(data), without the GIL
        return kept.data.toreadonly()

    def _read(self, cell: CellRef, held: memoryview) -> Buffer:
        return held

    def _drop(self, key: CellKey, held: memoryview) -> None:
        pass  # the reference in the bookkeeping is the only one
