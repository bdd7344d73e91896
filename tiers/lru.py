"""Least-recently-used tiers with a byte budget: one bookkeeping, one tier on top; host, device and disk add the rest.

`LRU` is pure bookkeeping (no I/O, no lock). `LRUTier` is the whole `Tier` port but for three hooks: write a cell
somewhere, read it back, drop it.

Invariant: bytes held + bytes reserved for cells being written ≤ budget, at every moment: room is made by dropping
before anything is written. A cell larger than the budget is not kept, and evicts nothing.
Raises what the port says; hooks may raise `Missing`, `Unusable`, `Unavailable`.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Generic, TypeAlias, TypeVar

from lmcache_s3.errors import Invalid, LMCacheS3Error, Missing, Unavailable, Unusable
from lmcache_s3.tiers.base import TierStats
from lmcache_s3.tiers.verify import verify, where
from lmcache_s3.types import Buffer, CellRef, ExtentName

H = TypeVar("H")
"""What a tier holds for a cell: a buffer, a tensor, a file."""

CellKey: TypeAlias = tuple[ExtentName, int, int]
"""(extent, shard, position): names a cell's bytes for ever."""


def key_of(cell: CellRef) -> CellKey:
    return (cell.extent, cell.shard, cell.position)


class LRU(Generic[H]):
    """Which cells are held, how large they are, and which goes next. Not thread-safe: its owner holds a lock."""

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes <= 0:
            raise Invalid(f"a tier's budget must be positive, not {budget_bytes} bytes", kind="setting")
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.reserved_bytes = 0
        self._entries: OrderedDict[CellKey, tuple[H, int]] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: CellKey) -> bool:
        return key in self._entries

    def touch(self, key: CellKey) -> H | None:
        """What is held for `key`, now the most recently used; None if nothing is."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def held(self, key: CellKey) -> H | None:
        """What is held for `key`, without touching it."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def oldest(self) -> tuple[CellKey, H, int] | None:
        """The cell to go next, with its bytes."""
        for key, (held, n_bytes) in self._entries.items():
            return key, held, n_bytes
        return None

    def could_hold(self, n_bytes: int) -> bool:
        """Whether evicting everything would make room for `n_bytes` beside what is reserved."""
        return self.reserved_bytes + n_bytes <= self.budget_bytes

    def has_room(self, n_bytes: int) -> bool:
        return self.used_bytes + self.reserved_bytes + n_bytes <= self.budget_bytes

    def reserve(self, n_bytes: int) -> None:
        """Set room aside for a cell about to be written; the caller has made it."""
        self.reserved_bytes += n_bytes

    def unreserve(self, n_bytes: int) -> None:
        self.reserved_bytes -= n_bytes

    def add(self, key: CellKey, held: H, n_bytes: int) -> None:
        """Keep a new cell as the most recently used."""
        self._entries[key] = (held, n_bytes)
        self.used_bytes += n_bytes

    def remove(self, key: CellKey) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.used_bytes -= entry[1]


class LRUTier(ABC, Generic[H]):
    """The `Tier` port over an `LRU`. Blocking I/O of the hooks `_write` and `_read` happens outside the lock.

    Cells of one call are a prefix's, in order, and a prefix without its beginning is of no use: within a call the first
    cell counts as the most recently used, so that ends go before beginnings.
    """

    name: str
    budget_bytes: int | None

    def __init__(self, name: str, budget_bytes: int) -> None:
        self.name = name
        self.budget_bytes = budget_bytes
        self._lru: LRU[H] = LRU(budget_bytes)
        self._lock = threading.Lock()
        self._writing: set[CellKey] = set()
        self._closed = False
        self._hits = self._misses = self._evicted = self._bad = self._read_bytes = self._written_bytes = 0

    @abstractmethod
    def _write(self, cell: CellRef, data: Buffer) -> H:
        """Keep a copy of `data` (verified, room reserved). Raises `Unavailable`, and then leaves nothing behind."""

    @abstractmethod
    def _read(self, cell: CellRef, held: H) -> Buffer:
        """The bytes again, verified on the way in or here. Raises `Missing`, `Unusable`, `Unavailable`."""

    @abstractmethod
    def _drop(self, key: CellKey, held: H) -> None:
        """Free what is held, at once. Called with the lock. Raises `Unavailable` if it cannot: it is held still."""

    def _touched(self, held: H) -> None:
        """Called with the lock when a cell was used; a durable tier notes it."""

    def match_prefix(self, cells: Sequence[CellRef]) -> int:
        with self._lock:
            for i, cell in enumerate(cells):
                if key_of(cell) not in self._lru:
                    return i
        return len(cells)

    def get(self, cells: Sequence[CellRef]) -> list[Buffer]:
        out: list[Buffer] = []
        for cell, held in zip(cells, self._take(cells), strict=True):
            try:
                out.append(self._read(cell, held))
            except Missing:
                self._forget(cell, held)
                raise
            except Unusable:
                with self._lock:
                    self._bad += 1
                self._forget(cell, held)
                raise
        with self._lock:
            self._hits += len(cells)
            self._read_bytes += sum(cell.length for cell in cells)
        return out

    def _take(self, cells: Sequence[CellRef]) -> list[H]:
        """Touch all cells, last one first; all or nothing."""
        with self._lock:
            self._check_open()
            absent = [cell for cell in cells if key_of(cell) not in self._lru]
            if absent:
                self._misses += len(absent)
                raise Missing(f"{where(absent[0])} is not in tier {self.name}", key=str(absent[0].extent))
            held = []
            for cell in reversed(cells):
                one = self._lru.touch(key_of(cell))
                assert one is not None
                self._touched(one)
                held.append(one)
            return held[::-1]

    def put(self, cells: Sequence[tuple[CellRef, Buffer]]) -> int:
        for cell, data in cells:
            verify(cell, data)
        new, present = self._admit(cells)
        # Ends first: the beginning of the prefix becomes the most recently used.
        written: list[CellRef] = []
        try:
            while new:
                cell, data = new[-1]
                held = self._write(cell, data)
                with self._lock:
                    self._settle(cell)
                    self._lru.add(key_of(cell), held, cell.length)
                    self._written_bytes += cell.length
                written.append(cell)
                new.pop()
        except LMCacheS3Error:
            self.discard(written)
            raise
        finally:
            with self._lock:
                for cell, _ in new:
                    self._settle(cell)
        return present + len(written)

    def _admit(self, cells: Sequence[tuple[CellRef, Buffer]]) -> tuple[list[tuple[CellRef, Buffer]], int]:
        """Decide what to keep and reserve room for it; returns (cells to write, how many are here already).

        Beginnings are preferred, and no cell of a call makes room for another of the same call.
        """
        new: list[tuple[CellRef, Buffer]] = []
        with self._lock:
            self._check_open()
            here = {key_of(cell): cell for cell, _ in cells if key_of(cell) in self._lru}
            for key in reversed(here):
                held = self._lru.touch(key)
                assert held is not None
                self._touched(held)
            here_bytes = sum(cell.length for cell in here.values())
            try:
                for cell, data in cells:
                    key = key_of(cell)
                    if key in here or key in self._writing:
                        continue
                    if not self._lru.could_hold(here_bytes + cell.length):
                        continue
                    self._make_room(cell.length)
                    self._lru.reserve(cell.length)
                    self._writing.add(key)
                    new.append((cell, data))
            except LMCacheS3Error:
                for cell, _ in new:
                    self._settle(cell)
                raise
        return new, len(here)

    def _settle(self, cell: CellRef) -> None:
        """The reservation ends. With the lock."""
        self._writing.discard(key_of(cell))
        self._lru.unreserve(cell.length)

    def _make_room(self, n_bytes: int) -> None:
        while not self._lru.has_room(n_bytes):
            self._evict_oldest()

    def _evict_oldest(self) -> int:
        oldest = self._lru.oldest()
        assert oldest is not None
        key, held, n_bytes = oldest
        self._drop(key, held)
        self._lru.remove(key)
        self._evicted += 1
        return n_bytes

    def evict(self, n_bytes: int) -> int:
        freed = 0
        with self._lock:
            while freed < n_bytes and len(self._lru):
                freed += self._evict_oldest()
        return freed

    def discard(self, cells: Sequence[CellRef]) -> None:
        for cell in cells:
            self._forget(cell, None)

    def _forget(self, cell: CellRef, seen: H | None) -> None:
        """Drop a cell (only if it is still what the caller saw). What cannot be dropped stays, and stays counted."""
        key = key_of(cell)
        with self._lock:
            held = self._lru.held(key)
            if held is None or (seen is not None and held is not seen):
                return
            with contextlib.suppress(Unavailable):
                self._drop(key, held)
                self._lru.remove(key)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable(f"tier {self.name} is closed", kind="closed")

    def _restore(self, found: Iterable[tuple[CellKey, H, int]]) -> None:
        """Take over what a durable tier held before, oldest first, dropping what is over the budget by now."""
        with self._lock:
            entries = list(found)
            over_bytes = sum(n_bytes for _, _, n_bytes in entries) - self._lru.budget_bytes
            for key, held, n_bytes in entries:
                if over_bytes > 0:
                    self._drop(key, held)
                    self._evicted += 1
                    over_bytes -= n_bytes
                else:
                    self._lru.add(key, held, n_bytes)

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                cells=len(self._lru),
                used_bytes=self._lru.used_bytes + self._lru.reserved_bytes,
                budget_bytes=self.budget_bytes,
                hits=self._hits,
                misses=self._misses,
                evicted_cells=self._evicted,
                bad_cells=self._bad,
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
            )

    def close(self) -> None:
        """Memory is let go; what is durable stays."""
        with self._lock:
            self._closed = True
