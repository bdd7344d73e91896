"""The tiers of a process as one source of cells: fast to slow, the object tier last.

Each cell comes from the fastest tier that has it. A tier that fails, or holds damage, is passed over: only the object
tier's answer is final. Nothing here decodes, and nothing raises for a cell: its error stands in the cell's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmcache_s3.errors import LMCacheS3Error, Missing, Unusable
from lmcache_s3.tiers.base import Tier, TierStats
from lmcache_s3.tiers.object import ObjectTier, ranges_of
from lmcache_s3.types import Buffer, CellRef


@dataclass(frozen=True, slots=True)
class Fetched:
    """One answer a cell, in order. level: which tier gave it (index into the stack). requests: GETs made."""

    data: list[Buffer | LMCacheS3Error]
    levels: list[int]
    requests: int


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

    def fetch(self, cells: Sequence[CellRef]) -> Fetched:
        """The cells' bytes, verified. Blocks on I/O."""
        data: list[Buffer | LMCacheS3Error | None] = [None] * len(cells)
        levels = [len(self.tiers)] * len(cells)
        for level, tier in enumerate(self.tiers):
            here = [i for i, one in enumerate(data) if one is None and tier.match_prefix([cells[i]])]
            for i, one in zip(here, _get(tier, [cells[i] for i in here]), strict=True):
                if not isinstance(one, LMCacheS3Error):
                    data[i], levels[i] = one, level
        rest = [i for i, one in enumerate(data) if one is None]
        wanted = [cells[i] for i in rest]
        requests = sum(1 for _ in ranges_of(wanted))
        answers = _get(self.bucket, wanted)
        for i, answer in zip(rest, answers, strict=True):
            data[i] = answer
        return Fetched([one for one in data if one is not None], levels, requests)

    def discard(self, cells: Sequence[CellRef]) -> None:
        """Forget damaged cells everywhere."""
        for tier in self.tiers:
            tier.discard(cells)

    def stats(self) -> dict[str, TierStats]:
        return {tier.name: tier.stats() for tier in (*self.tiers, self.bucket)}

    def close(self) -> None:
        for tier in (*self.tiers, self.bucket):
            tier.close()


def _get(tier: Tier, cells: Sequence[CellRef]) -> list[Buffer | LMCacheS3Error]:
    """`get`, but one damaged cell does not take the others with it."""
    if not cells:
        return []
    try:
        return list(tier.get(cells))
    except Unusable as e:
        whole_object_gone = isinstance(e, Missing) and isinstance(tier, ObjectTier)
        if len(cells) == 1 or whole_object_gone:
            return [e] * len(cells)
        return [_get(tier, [cell])[0] for cell in cells]
    except LMCacheS3Error as e:
        return [e] * len(cells)
