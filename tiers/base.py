"""The Tier port: one level of the cache, holding stored cells.

A tier's unit is the *cell*, named by `CellRef` (extent name, shard, position): bytes behind a name never change, so a
tier never needs to be invalidated, only emptied. Methods block and are safe to call from many threads.

Who guarantees what: `get` returns bytes that were verified against the reference's length and checksum, on the way in
(memory tiers) or on the way out (disk, object); a caller decodes them without looking again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lmcache_s3.types import Buffer, CellRef


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters since start, and what is held now."""

    cells: int
    used_bytes: int
    budget_bytes: int | None
    hits: int
    misses: int
    evicted_cells: int
    bad_cells: int
    """Cells dropped because their bytes were not what the reference says."""
    read_bytes: int
    written_bytes: int


@runtime_checkable
class Tier(Protocol):
    """One level. `budget_bytes=None`: no budget of its own (the object tier: the index collects garbage there)."""

    name: str
    budget_bytes: int | None

    def match_prefix(self, cells: Sequence[CellRef]) -> int:
        """How many of the leading cells are here, without I/O. A promise of nothing: `get` may still miss."""
        ...

    def use(self, cells: Sequence[CellRef]) -> None:
        """A prompt is used: consecutive cells of one shard, from its beginning on, here or not. For eviction, which
        learns from whole prompts; what `get` and `put` move of these cells within a minute is part of this use."""
        ...

    def get(self, cells: Sequence[CellRef]) -> list[Buffer]:
        """The stored bytes of every cell, in order, verified. All or nothing.

        Cells that lie one after another are read as one range. Counts as a use of them for eviction.
        Returned buffers are read-only to the caller and stay valid as long as they are referenced; where they are the
        tier's own memory (host) they count against its budget until then, evicted or not: let go of them soon.
        Raises `Missing`, `Unusable` (key = the extent; the bad cell is dropped here first), `Unavailable`.
        """
        ...

    def put(self, cells: Sequence[tuple[CellRef, Buffer]]) -> int:
        """Keep these cells of one prompt, in order; returns how many were kept, those that were here already included.

        The tier's eviction policy says what goes for them, if they are worth it: never a cell whose next one is held,
        nor what is being read. Never exceeds the budget, not even for a moment; what does not fit is not kept. Another
        extent's cell in the same place of the same prompt is replaced. A failed put leaves no trace.
        Raises `Unusable` if bytes and reference disagree, `Unavailable` (disk full, read-only).
        """
        ...

    def evict(self, n_bytes: int) -> int:
        """Drop cells, as the policy says, until at least `n_bytes` are freed or nothing is left; returns bytes freed.

        What is being read is dropped too, and freed when it is let go of.
        """
        ...

    def discard(self, cells: Sequence[CellRef]) -> None:
        """Forget these cells (their extent is damaged)."""
        ...

    def stats(self) -> TierStats: ...

    def close(self) -> None: ...
