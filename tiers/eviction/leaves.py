"""Which of the held chunks are leaves, and which of those has the lowest rank: what policies with one rank per chunk
share.

A heap with lazy deletion: entries that no longer hold are skipped when they surface, and swept out when they outnumber
the others. Every operation is O(log n) amortised.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Hashable


class Leaves:
    """Held chunks, their parents and ranks. Ranks may be anything ordered; equal ranks go in order of `rank` calls."""

    def __init__(self) -> None:
        self._parents: dict[Hashable, Hashable | None] = {}
        self._children: dict[Hashable, int] = {}
        self._ranks: dict[Hashable, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._calls = 0

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._parents

    def is_leaf(self, key: Hashable) -> bool:
        return key not in self._children

    def rank_of(self, key: Hashable) -> float:
        return self._ranks[key][0]

    def add(self, key: Hashable, parent: Hashable | None, rank: float) -> None:
        """A chunk that is not held yet."""
        self._parents[key] = parent
        if parent is not None:
            self._children[parent] = self._children.get(parent, 0) + 1
        self.rank(key, rank)

    def rank(self, key: Hashable, rank: float) -> None:
        """A new rank of a held chunk."""
        self._calls += 1
        self._ranks[key] = (rank, self._calls)
        if self.is_leaf(key):
            self._push(key)

    def remove(self, key: Hashable) -> None:
        """A held chunk goes; its parent may be a leaf now."""
        parent = self._parents.pop(key)
        del self._ranks[key]
        if parent is None:
            return
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
            return
        del self._children[parent]
        if parent in self._parents:
            self._push(parent)

    def lowest(self, spare: Container[Hashable]) -> Hashable | None:
        """The leaf of the lowest rank that is not in `spare`."""
        spared: list[tuple[float, int, Hashable]] = []
        found: Hashable | None = None
        while self._heap:
            rank, call, key = self._heap[0]
            if self._ranks.get(key) != (rank, call) or not self.is_leaf(key):
                heapq.heappop(self._heap)
            elif key in spare:
                spared.append(heapq.heappop(self._heap))
            else:
                found = key
                break
        for entry in spared:
            heapq.heappush(self._heap, entry)
        return found

    def _push(self, key: Hashable) -> None:
        if len(self._heap) > 64 + 4 * len(self._ranks):
            self._heap = [(*self._ranks[one], one) for one in self._ranks if self.is_leaf(one)]
            heapq.heapify(self._heap)
            return  # `key` is among them
        heapq.heappush(self._heap, (*self._ranks[key], key))
