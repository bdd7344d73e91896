"""A tier with a byte budget: the whole `Tier` port but for where the bytes lie; host, device and disk add that.

Who goes and who may come is the eviction policy's affair (`eviction/`); this module asks it, one prompt's chunks at a
time, and guarantees the rest: never more than the budget, chunks only after the chunk before them, nothing dropped that
the same call keeps or somebody reads.

Invariant: room taken by cells held, being written, or evicted but still looked at ≤ budget, at every moment: room is
made by dropping before anything is written. A cell larger than the budget is not kept, and evicts nothing.
Raises what the port says; hooks may raise `Unavailable`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from lmcache_s3.errors import Invalid, Missing, Unavailable, Unusable
from lmcache_s3.tiers.base import TierStats
from lmcache_s3.tiers.eviction.base import EvictionPolicy, Item
from lmcache_s3.tiers.eviction.lru import LRUPolicy
from lmcache_s3.tiers.places import parent_of, place_of
from lmcache_s3.tiers.verify import verify, where
from lmcache_s3.types import Buffer, CellRef, ExtentName

H = TypeVar("H")
"""What a tier holds for a cell: a piece of memory, a tensor, a place in a file."""

_SAME_USE_S = 60.0
"""What is moved within this time of a use that was told whole belongs to it."""
_MOST_TOLD = 65_536


@dataclass(slots=True, eq=False)
class Entry(Generic[H]):
    """A cell as it is held. n_bytes: the room it takes. ready: written, so that it can be read."""

    extent: ExtentName
    n_bytes: int
    held: H
    ready: bool


class _Spared:
    """Places that must not be evicted now: of this very prompt, being written, being read."""

    def __init__(self, own: set[bytes], writing: set[bytes], is_pinned: Callable[[bytes], bool]) -> None:
        self._own, self._writing, self._is_pinned = own, writing, is_pinned

    def __contains__(self, place: object) -> bool:
        place = cast(bytes, place)
        return place in self._own or place in self._writing or self._is_pinned(place)


class BudgetedTier(ABC, Generic[H]):
    """The `Tier` port but for hooks. Their I/O, `_write` and `_read`, happens outside the lock; the others hold it.

    eviction: the policy; least recently used if none is given. chunk_tokens: tokens of a chunk, from which a cell's
    depth in its prompt follows. clock: seconds, for the policy only.
    """

    name: str
    budget_bytes: int | None

    def __init__(
        self,
        name: str,
        budget_bytes: int,
        *,
        eviction: EvictionPolicy | None = None,
        chunk_tokens: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if budget_bytes <= 0:
            raise Invalid(f"a tier's budget must be positive, not {budget_bytes} bytes", kind="setting")
        self.name = name
        self.budget_bytes = budget_bytes
        self._most_bytes = budget_bytes
        self._used_bytes = 0
        self._policy: EvictionPolicy = LRUPolicy() if eviction is None else eviction
        self._chunk_tokens = chunk_tokens
        self._clock = clock
        self._last_s = 0.0
        self._lock = threading.Lock()
        self._entries: dict[bytes, Entry[H]] = {}
        self._writing: set[bytes] = set()
        self._told: OrderedDict[object, float] = OrderedDict()
        """Places that `use` named lately, and when."""
        self._closed = False
        self._hits = self._misses = self._evicted = self._bad = self._read_bytes = self._written_bytes = 0

    # --- hooks

    @abstractmethod
    def _room_of(self, length: int) -> int:
        """Bytes that a cell of `length` bytes takes, all in."""

    @abstractmethod
    def _allot(self, cell: CellRef, n_bytes: int) -> H | None:
        """Room for a cell, of `n_bytes` as `_room_of` says, which the budget has; None if it must be freed first all
        the same (it lies in pieces). Raises `Unavailable`."""

    @abstractmethod
    def _write(self, cells: Sequence[tuple[CellRef, H, Buffer]]) -> None:
        """Copy verified bytes to where they were allotted. Raises `Unavailable`; all are dropped then."""

    @abstractmethod
    def _read(self, cells: Sequence[tuple[CellRef, H]]) -> list[Buffer | Unusable]:
        """The bytes again, verified on the way in or here. Raises `Unavailable`."""

    @abstractmethod
    def _drop(self, held: H, n_bytes: int) -> int:
        """Free what is held; returns the bytes freed at once, `n_bytes` or 0 (then `_used_bytes` is lowered later).
        Raises `Unavailable` if it cannot: it is held still."""

    def _can_hold(self, cell: CellRef) -> bool:
        """Whether it could be held if there were room."""
        return True

    def _unwritten(self, held: H) -> None:
        """What was allotted is not written after all, and dropped next."""

    def _lend(self, held: H) -> None:
        """A cell is about to be read."""

    def _is_lent(self, held: H) -> bool:
        """Whether dropping it would not free it now."""
        return False

    def _settle(self) -> None:
        """Take notice of what readers gave back; called before room is counted."""

    def _used(self, entries: Sequence[Entry[H]], now_s: float) -> None:
        """These were used; a durable tier notes it."""

    # --- the port

    def match_prefix(self, cells: Sequence[CellRef]) -> int:
        with self._lock:
            for i, cell in enumerate(cells):
                if self._find(cell) is None:
                    return i
        return len(cells)

    def use(self, cells: Sequence[CellRef]) -> None:
        with self._lock:
            now_s = self._now_s()
            items = [self._item(cell) for cell in cells]
            self._policy.use(items, now_s)
            for item in items:
                self._told[item.key] = now_s
                self._told.move_to_end(item.key)
            while len(self._told) > _MOST_TOLD:
                self._told.popitem(last=False)

    def _use_again(self, items: Sequence[Item], now_s: float) -> None:
        """A use of these, unless `use` has just told of it."""
        if not all(self._told.get(item.key, -_SAME_USE_S) > now_s - _SAME_USE_S for item in items):
            self._policy.use(items, now_s)

    def get(self, cells: Sequence[CellRef]) -> list[Buffer]:
        if not cells:
            return []
        held = self._take(cells)
        found = self._read(list(zip(cells, held, strict=True)))
        bad = [(cell, one) for cell, one in zip(cells, found, strict=True) if isinstance(one, Unusable)]
        for cell, error in bad:
            gone = not self._forget(cell, held[cells.index(cell)])
            if gone or isinstance(error, Missing):  # evicted while it was read: no damage
                raise Missing(f"{where(cell)} is not in tier {self.name} any more", key=str(cell.extent)) from error
            with self._lock:
                self._bad += 1
        if bad:
            raise bad[0][1]
        with self._lock:
            self._hits += len(cells)
            self._read_bytes += sum(cell.length for cell in cells)
        return cast("list[Buffer]", found)

    def _take(self, cells: Sequence[CellRef]) -> list[H]:
        """All or nothing."""
        with self._lock:
            self._check_open()
            now_s = self._now_s()
            self._use_again([self._item(cell) for cell in cells], now_s)
            found: list[Entry[H]] = []
            absent: list[CellRef] = []
            for cell in cells:
                entry = self._find(cell)
                if entry is None:
                    absent.append(cell)
                else:
                    found.append(entry)
            if absent:
                self._misses += len(absent)
                raise Missing(f"{where(absent[0])} is not in tier {self.name}", key=str(absent[0].extent))
            self._used(found, now_s)
            for entry in found:
                self._lend(entry.held)
            return [entry.held for entry in found]

    def put(self, cells: Sequence[tuple[CellRef, Buffer]]) -> int:
        for cell, data in cells:
            verify(cell, data)
        new, present = self._admit(cells)
        if not new:
            return present
        try:
            self._write([(cell, entry.held, data) for cell, entry, data in new])
        except BaseException:
            with self._lock:
                self._take_back(new)
            raise
        with self._lock:
            for cell, entry, _ in new:
                entry.ready = True
                self._writing.discard(place_of(cell))
                self._written_bytes += cell.length
        return present + len(new)

    def _admit(self, cells: Sequence[tuple[CellRef, Buffer]]) -> tuple[list[tuple[CellRef, Entry[H], Buffer]], int]:
        """Decide what to keep and make room for it; returns (cells to write, how many are here already).

        Beginnings are preferred, and no cell of a call makes room for another of the same call.
        """
        new: list[tuple[CellRef, Entry[H], Buffer]] = []
        with self._lock:
            self._check_open()
            now_s = self._now_s()
            items = [self._item(cell) for cell, _ in cells]
            self._use_again(items, now_s)
            here = {place_of(cell): entry for cell, _ in cells if (entry := self._find(cell)) is not None}
            self._used(list(here.values()), now_s)
            own_bytes = sum(entry.n_bytes for entry in here.values())
            own = {*here, *(cast(bytes, item.parent) for item in items if item.parent is not None)}
            spare = _Spared(own, self._writing, self._is_pinned)
            refused: set[object] = set()
            try:
                for (cell, data), item in zip(cells, items, strict=True):
                    place = place_of(cell)
                    if place in here or place in self._writing:
                        continue
                    fits = own_bytes + item.n_bytes <= self._most_bytes and self._can_hold(cell)
                    wanted = fits and item.parent not in refused
                    entry = self._make(cell, item, spare, now_s) if wanted else None
                    if entry is None:  # without it, what follows in the prompt is of no use
                        refused.add(place)
                        continue
                    own_bytes += entry.n_bytes
                    new.append((cell, entry, data))
            except BaseException:
                self._take_back(new)
                raise
        return new, len(here)

    def _make(self, cell: CellRef, item: Item, spare: _Spared, now_s: float) -> Entry[H] | None:
        """An entry with room of its own, yet to be written; None if it is not worth it, or there is no room."""
        place = place_of(cell)
        if place in self._entries:  # another extent's copy of the same chunk: the index prefers this one now
            self._remove(place)
        admitted = False
        while True:
            self._settle()
            if self._used_bytes + item.n_bytes <= self._most_bytes:
                held = self._allot(cell, item.n_bytes)
                if held is not None:
                    break
            if not admitted and not self._policy.admit(item, now_s, spare):
                return None
            admitted = True
            victim = self._policy.victim(now_s, spare)
            if victim is None:
                return None
            self._evict_one(cast(bytes, victim))
        entry = Entry(cell.extent, item.n_bytes, held, ready=False)
        self._used_bytes += entry.n_bytes
        self._entries[place] = entry
        self._writing.add(place)
        self._policy.add(item, now_s)
        return entry

    def _take_back(self, new: Sequence[tuple[CellRef, Entry[H], Buffer]]) -> None:
        """As if they had never been put. Ends first: the policy sees leaves go."""
        for cell, entry, _ in reversed(new):
            self._writing.discard(place_of(cell))
            self._unwritten(entry.held)
            with contextlib.suppress(Unavailable):
                self._remove(place_of(cell))

    def evict(self, n_bytes: int) -> int:
        freed = 0
        with self._lock:
            spare = _Spared(set(), self._writing, lambda place: False)
            while freed < n_bytes:
                victim = self._policy.victim(self._now_s(), spare)
                if victim is None:
                    break
                freed += self._evict_one(cast(bytes, victim))
        return freed

    def discard(self, cells: Sequence[CellRef]) -> None:
        for cell in cells:
            self._forget(cell)

    def _forget(self, cell: CellRef, seen: H | None = None) -> bool:
        """Whether it was held (and is still what the caller saw). What cannot be dropped stays, and stays counted."""
        with self._lock:
            entry = self._find(cell)
            if entry is None or (seen is not None and entry.held is not seen):
                return False
            with contextlib.suppress(Unavailable):
                self._remove(place_of(cell))
            return True

    def stats(self) -> TierStats:
        with self._lock:
            self._settle()
            return TierStats(
                cells=len(self._entries) - len(self._writing),
                used_bytes=self._used_bytes,
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

    # --- with the lock

    def _find(self, cell: CellRef) -> Entry[H] | None:
        entry = self._entries.get(place_of(cell))
        if entry is None or not entry.ready or (entry.extent is not cell.extent and entry.extent != cell.extent):
            return None
        return entry

    def _item(self, cell: CellRef) -> Item:
        depth_tokens = cell.first_token + cell.position * self._chunk_tokens
        return Item(place_of(cell), parent_of(cell), depth_tokens, self._room_of(cell.length))

    def _is_pinned(self, place: bytes) -> bool:
        entry = self._entries.get(place)
        return entry is not None and self._is_lent(entry.held)

    def _evict_one(self, place: bytes) -> int:
        freed = self._remove(place)
        self._evicted += 1
        return freed

    def _remove(self, place: bytes) -> int:
        self._settle()
        entry = self._entries[place]
        freed = self._drop(entry.held, entry.n_bytes)
        del self._entries[place]
        self._policy.remove(place)
        self._used_bytes -= freed
        return freed

    def _restore(self, found: Iterable[tuple[Item, ExtentName, H, float]]) -> None:
        """Take over what a durable tier held before, each with the time of its last use, oldest first; what is over the
        budget goes."""
        with self._lock:
            entries, used_bytes = self._entries, 0
            prompt: list[Item] = []  # what was used at once and hangs together is told to the policy as one prompt
            for item, extent, held, used_s in found:  # a hundred thousand within a second
                n_bytes = item.n_bytes
                entries[cast(bytes, item.key)] = Entry(extent, n_bytes, held, True)
                used_bytes += n_bytes
                if prompt and (used_s != self._last_s or item.parent != prompt[-1].key):
                    self._take_over(prompt)
                    prompt = []
                prompt.append(item)
                self._last_s = used_s
            self._take_over(prompt)
            self._used_bytes = used_bytes
            while self._used_bytes > self._most_bytes:
                victim = self._policy.victim(self._now_s())
                if victim is None:
                    break
                self._evict_one(cast(bytes, victim))

    def _take_over(self, prompt: list[Item]) -> None:
        if prompt:
            self._policy.use(prompt, self._last_s)
            for item in prompt:
                self._policy.add(item, self._last_s)

    def _now_s(self) -> float:
        self._last_s = max(self._last_s, self._clock())
        return self._last_s

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable(f"tier {self.name} is closed", kind="closed")
