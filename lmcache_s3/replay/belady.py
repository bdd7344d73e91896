"""Belady's policy, which knows the future: no policy can hit more. What is used again last goes first.

It is prefix-aware by nature: a chunk is never used later than what follows it in the prompt.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Sequence

from lmcache_s3.replay.trace import Trace
from lmcache_s3.tiers.eviction.base import NOTHING, Item
from lmcache_s3.tiers.eviction.leaves import Leaves

_NEVER = float("inf")


class BeladyPolicy:
    """`EvictionPolicy` for one replay of one trace: the n-th call of `use` is the n-th request."""

    def __init__(self, trace: Trace) -> None:
        self._leaves = Leaves()
        self._use = -1
        self._next: list[tuple[float, ...]] = []
        last: dict[int, float] = {}
        for number in range(len(trace.uses) - 1, -1, -1):
            chunks = trace.uses[number].chunks
            self._next.append(tuple(last.get(chunk, _NEVER) for chunk in chunks))
            last.update(dict.fromkeys(chunks, float(number)))
        self._next.reverse()
        self._coming: dict[Hashable, float] = {}

    def use(self, items: Sequence[Item], now_s: float) -> None:
        self._use += 1
        self._coming = {item.key: n for item, n in zip(items, self._next[self._use], strict=True)}
        for key, following in self._coming.items():
            if key in self._leaves:
                self._leaves.rank(key, -following)

    def admit(self, item: Item, now_s: float, spare: Container[Hashable] = NOTHING) -> bool:
        victim = self._leaves.lowest(spare)
        return victim is not None and -self._coming[item.key] > self._leaves.rank_of(victim)

    def add(self, item: Item, now_s: float) -> None:
        if item.key not in self._leaves:
            self._leaves.add(item.key, item.parent, -self._coming[item.key])

    def remove(self, key: Hashable) -> None:
        if key in self._leaves:
            self._leaves.remove(key)

    def victim(self, now_s: float, spare: Container[Hashable] = NOTHING) -> Hashable | None:
        return self._leaves.lowest(spare)
