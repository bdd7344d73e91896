"""Our own policy: what is least likely to come back soon goes first, and what is less likely than all that is held is
not let in. It learns online, starts as least recently used, and is the same for every tier.

Chunks are judged by their last visit (`visits.py`): what kind of use it was and how long ago. Of every kind and age,
the rate of reuse to be expected is learned (`reuse.py`). Held chunks lie in buckets by kind and age; the victim is the
last leaf of the oldest visit in the bucket worth least. All chunks count alike, whatever their bytes.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Container, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from lmcache_s3.tiers.eviction.base import NOTHING, Item
from lmcache_s3.tiers.eviction.reuse import AGES_S, BINS
from lmcache_s3.tiers.eviction.visits import KINDS, Visit, Visits

_LEARN_EVERY_S = 10.0
_LEARN_EVERY_VISIT_S = 2e-3
"""Learning passes over all visits, a microsecond each: at most a two-thousandth of the time."""


_MOST_COMING = 16_384


class _Chunk:
    __slots__ = ("children", "parent", "visit")

    def __init__(self, parent: Hashable | None, visit: Visit, children: int) -> None:
        self.parent, self.visit, self.children = parent, visit, children


class HazardPolicy:
    """`EvictionPolicy`."""

    def __init__(self) -> None:
        self._held: dict[Hashable, _Chunk] = {}
        self._orphans: dict[Hashable, int] = {}
        """Held children of chunks that are not held."""
        self._visits = Visits(self._moved)
        self._coming: OrderedDict[Hashable, Visit] = OrderedDict()
        """Of the last uses: chunks that are not held. Prompts are used side by side, and what is to be kept of one may
        come when others were used since."""
        self._buckets: list[OrderedDict[Visit, None]] = [OrderedDict() for _ in range(KINDS * BINS)]
        self._queue: list[tuple[int, int]] = []
        """A heap of (rank, bucket): every bucket that is not empty, and some that are."""
        self._now_s = self._learn_at_s = float("-inf")
        self._rank(np.tile(1 / (np.array(AGES_S[:-1]) + 60.0), (KINDS, 1)))

    def __len__(self) -> int:
        return len(self._held)

    def use(self, items: Sequence[Item], now_s: float) -> None:
        if not items:
            return
        self._advance(now_s)
        parts = self._visits.use(items, now_s, self._visit_of, len(self._held))
        if not parts:
            for visit in dict.fromkeys(self._visit_of(item.key) for item in items):
                if visit is not None and visit.placed:
                    self._buckets[visit.kind * BINS + visit.bin].move_to_end(visit)
            return
        for visit, part in parts:
            for item in part:
                chunk = self._held.get(item.key)
                if chunk is None:
                    self._coming[item.key] = visit
                    self._coming.move_to_end(item.key)
                else:
                    self._let_go(chunk.visit)
                    chunk.visit = visit
                    self._hold(visit, item.key)
        while len(self._coming) > _MOST_COMING:
            self._coming.popitem(last=False)

    def admit(self, item: Item, now_s: float, spare: Container[Hashable] = NOTHING) -> bool:
        key = self.victim(now_s, spare)
        if key is None:
            return False
        visit = self._coming.get(item.key)
        mine = 0 if visit is None else visit.kind * BINS + visit.bin
        theirs = self._held[key].visit
        return bool(self._worth[mine] >= self._worth[theirs.kind * BINS + theirs.bin])

    def add(self, item: Item, now_s: float) -> None:
        if item.key in self._held:
            return
        visit = self._coming.pop(item.key, None)
        if visit is None:  # not heard of in the last use, such as what lay on a disk before
            self.use([item], now_s)
            visit = self._coming.pop(item.key, None)
        if visit is None:  # the last use again
            visit = Visit(0, now_s, [item], 1, 0, 0)
            self._visits.follow(visit)
        self._held[item.key] = _Chunk(item.parent, visit, self._orphans.pop(item.key, 0))
        self._hold(visit, item.key)
        if item.parent is not None:
            parent = self._held.get(item.parent)
            if parent is None:
                self._orphans[item.parent] = self._orphans.get(item.parent, 0) + 1
            else:
                parent.children += 1

    def remove(self, key: Hashable) -> None:
        chunk = self._held.pop(key, None)
        if chunk is None:
            return
        self._let_go(chunk.visit)
        if chunk.children:
            self._orphans[key] = chunk.children
        if chunk.parent is None:
            return
        parent = self._held.get(chunk.parent)
        if parent is not None:
            parent.children -= 1
            if not parent.children:
                self._place(parent.visit)
        elif self._orphans[chunk.parent] > 1:
            self._orphans[chunk.parent] -= 1
        else:
            del self._orphans[chunk.parent]

    def victim(self, now_s: float, spare: Container[Hashable] = NOTHING) -> Hashable | None:
        self._advance(now_s)
        spared: list[tuple[int, int]] = []
        found: Hashable | None = None
        while self._queue and found is None:
            bucket = self._buckets[self._queue[0][1]]
            found = self._last_leaf(bucket, spare)
            if found is None:
                entry = heapq.heappop(self._queue)
                if bucket:
                    spared.append(entry)
        for entry in spared:
            heapq.heappush(self._queue, entry)
        return found

    def _last_leaf(self, bucket: OrderedDict[Visit, None], spare: Container[Hashable]) -> Hashable | None:
        """Visits without a leaf leave the bucket on the way; they come back when they have one."""
        leaving: list[Visit] = []
        found: Hashable | None = None
        for visit in bucket:
            leaf, has_leaf = self._leaf_of(visit, spare)
            if leaf is not None:
                found = leaf
                break
            if not has_leaf:
                leaving.append(visit)
        for visit in leaving:
            del bucket[visit]
            visit.placed = False
        return found

    def _leaf_of(self, visit: Visit, spare: Container[Hashable]) -> tuple[Hashable | None, bool]:
        """The visit's last leaf that is not spared, and whether it has any leaf. Nearly always that is its last key."""
        keys = visit.keys
        while keys and not self._is_of(keys[-1], visit):
            keys.pop()
        has_leaf = False
        for i in range(len(keys) - 1, -1, -1):
            if self._is_of(keys[i], visit) and not self._held[keys[i]].children:
                has_leaf = True
                if keys[i] not in spare:
                    keys.append(keys.pop(i))
                    return keys[-1], True
        return None, has_leaf

    def _is_of(self, key: Hashable, visit: Visit) -> bool:
        chunk = self._held.get(key)
        return chunk is not None and chunk.visit is visit

    def _visit_of(self, key: Hashable) -> Visit | None:
        chunk = self._held.get(key)
        return None if chunk is None else chunk.visit

    def _hold(self, visit: Visit, key: Hashable) -> None:
        visit.keys.append(key)
        visit.held += 1
        self._place(visit)

    def _let_go(self, visit: Visit) -> None:
        """A chunk was used again, or goes. A visit without any leaves its bucket: nobody may look there for long."""
        visit.held -= 1
        if not visit.held:
            visit.keys.clear()
            if visit.placed:
                self._moved(visit, False)
                visit.placed = False

    # --- buckets

    def _moved(self, visit: Visit, after: bool) -> None:
        if not visit.placed:
            return
        bucket = visit.kind * BINS + visit.bin
        if after:
            self._buckets[bucket][visit] = None
            heapq.heappush(self._queue, (self._ranks[bucket], bucket))
        else:
            del self._buckets[bucket][visit]

    def _place(self, visit: Visit) -> None:
        if visit.placed:
            return
        visit.placed = True
        self._moved(visit, True)

    def _advance(self, now_s: float) -> None:
        if now_s == self._now_s:
            return
        self._now_s = now_s
        self._visits.age(now_s)
        if now_s < self._learn_at_s:
            return
        self._learn_at_s = now_s + max(_LEARN_EVERY_S, _LEARN_EVERY_VISIT_S * len(self._visits))
        table = self._visits.learned(now_s)
        if table.reuses.any():
            self._rank(table.worth())

    def _rank(self, worth: NDArray[np.float64]) -> None:
        self._worth: list[float] = worth.ravel().tolist()
        # Equal worth: the older goes first.
        order = sorted(range(KINDS * BINS), key=lambda i: (self._worth[i], -(i % BINS), i))
        self._ranks = [0] * len(order)
        for rank, bucket in enumerate(order):
            self._ranks[bucket] = rank
        self._queue = [(self._ranks[i], i) for i in range(KINDS * BINS) if self._buckets[i]]
        heapq.heapify(self._queue)
