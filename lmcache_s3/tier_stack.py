"""The tiers of a process in order: fast to slow, the object tier last.

Each cell comes from the fastest tier that has it. A tier that fails, or holds damage, is passed over: only the object
tier's answer is final. Nothing here decodes, and nothing raises for a cell.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_s3.errors import LMCacheS3Error, Unusable
from lmcache_s3.tiers.base import Tier, TierStats
from lmcache_s3.tiers.object import ObjectTier
from lmcache_s3.types import Buffer, CellRef


class TierStack:
    """tiers: fast → slow, without the object tier."""

    def __init__(self, tiers: Sequence[Tier], bucket: ObjectTier) -> None:
        self.tiers = tuple(tiers)
        self.bucket = bucket

    def name(self, level: int) -> str:
        return self.tiers[level].name if level < len(self.tiers) else self.bucket.name

    def level(self, name: str) -> int | None:
        """Where the tier of that name stands; None if there is none."""
        for i in range(len(self.tiers) + 1):
            if self.name(i) == name:
                return i
        return None

    def levels(self, cells: Sequence[CellRef]) -> list[int]:
        """Where each cell is to be had fastest, without I/O; a promise of nothing."""
        last = len(self.tiers)
        return [next((i for i, tier in enumerate(self.tiers) if tier.match_prefix([c])), last) for c in cells]

    def fetch_local(self, cells: Sequence[CellRef]) -> tuple[list[Buffer | None], list[int]]:
        """The cells' bytes, verified, from the tiers before the bucket, and each one's level; None: in none of them.

        Blocks on a disk's I/O.
        """
        data: list[Buffer | None] = [None] * len(cells)
        levels = [len(self.tiers)] * len(cells)
        for level, tier in enumerate(self.tiers):
            here = [i for i, one in enumerate(data) if one is None and tier.match_prefix([cells[i]])]
            for i, one in zip(here, _get(tier, [cells[i] for i in here]), strict=True):
                if one is not None:
                    data[i], levels[i] = one, level
        return data, levels

    def use(self, cells: Sequence[CellRef]) -> None:
        """A prompt is used; see `Tier.use`."""
        for tier in self.tiers:
            tier.use(cells)

    def discard(self, cells: Sequence[CellRef]) -> None:
        """Forget damaged cells everywhere."""
        for tier in self.tiers:
            tier.discard(cells)

    def stats(self) -> dict[str, TierStats]:
        return {tier.name: tier.stats() for tier in (*self.tiers, self.bucket)}

    def close(self) -> None:
        for tier in (*self.tiers, self.bucket):
            tier.close()


def _get(tier: Tier, cells: Sequence[CellRef]) -> list[Buffer | None]:
    """`get`, but one damaged cell does not take the others with it."""
    if not cells:
        return []
    try:
        return list(tier.get(cells))
    except Unusable:
        if len(cells) == 1:
            return [None]
        return [_get(tier, [cell])[0] for cell in cells]
    except LMCacheS3Error:
        return [None] * len(cells)
