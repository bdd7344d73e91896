"""Least recently used leaf first; everything is admitted."""

from __future__ import annotations

from collections.abc import Container, Hashable

from lmcache_s3.tiers.eviction.base import NOTHING, Item
from lmcache_s3.tiers.eviction.leaves import Leaves


class LRUPolicy:
    """`EvictionPolicy`. Chunks of one moment go in the order of their calls: a tier calls for ends first."""

    def __init__(self) -> None:
        self._leaves = Leaves()

    def __len__(self) -> int:
        return len(self._leaves)

    def admit(self, item: Item, now_s: float, spare: Container[Hashable] = NOTHING) -> bool:
        return self._leaves.lowest(spare) is not None

    def add(self, item: Item, now_s: float) -> None:
        if item.key in self._leaves:
            self.touch(item.key, now_s)
        else:
            self._leaves.add(item.key, item.parent, now_s)

    def touch(self, key: Hashable, now_s: float) -> None:
        if key in self._leaves:
            self._leaves.rank(key, now_s)

    def remove(self, key: Hashable) -> None:
        if key in self._leaves:
            self._leaves.remove(key)

    def victim(self, now_s: float, spare: Container[Hashable] = NOTHING) -> Hashable | None:
        return self._leaves.lowest(spare)
