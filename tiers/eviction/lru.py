"""Least recently used leaf first; everything is admitted."""

from __future__ import annotations

from collections.abc import Container, Hashable, Sequence

from lmcache_s3.tiers.eviction.base import NOTHING, Item
from lmcache_s3.tiers.eviction.leaves import Leaves


class LRUPolicy:
    """`EvictionPolicy`. Of one use, the end of the prompt goes before its beginning."""

    def __init__(self) -> None:
        self._leaves = Leaves()

    def __len__(self) -> int:
        return len(self._leaves)

    def use(self, items: Sequence[Item], now_s: float) -> None:
        for item in reversed(items):
            if item.key in self._leaves:
                self._leaves.rank(item.key, now_s)

    def admit(self, item: Item, now_s: float, spare: Container[Hashable] = NOTHING) -> bool:
        return self._leaves.lowest(spare) is not None

    def add(self, item: Item, now_s: float) -> None:
        if item.key not in self._leaves:
            self._leaves.add(item.key, item.parent, now_s)

    def remove(self, key: Hashable) -> None:
        if key in self._leaves:
            self._leaves.remove(key)

    def victim(self, now_s: float, spare: Container[Hashable] = NOTHING) -> Hashable | None:
        return self._leaves.lowest(spare)
