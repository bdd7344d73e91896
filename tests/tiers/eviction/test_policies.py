"""Every policy keeps the rules of the port."""

from __future__ import annotations

from lmcache_s3.testing.eviction import EvictionPolicyTests, chain
from lmcache_s3.tiers.eviction.base import EvictionPolicy, Item
from lmcache_s3.tiers.eviction.lru import LRUPolicy


class TestLRU(EvictionPolicyTests):
    def make_policy(self) -> EvictionPolicy:
        return LRUPolicy()

    def test_the_least_recently_used_goes_first(self) -> None:
        policy = LRUPolicy()
        items = [Item(name, None, 0, 1) for name in "abc"]
        for i, item in enumerate(items):
            policy.add(item, float(i))
        policy.use(items[:1], 3.0)
        assert policy.victim(4.0) == "b"

    def test_a_parent_waits_for_its_children_however_old_it_is(self) -> None:
        policy = LRUPolicy()
        first, second = chain("p", 2)
        policy.add(first, 0.0)
        policy.add(Item("other", None, 0, 1), 1.0)
        policy.add(second, 2.0)
        assert policy.victim(3.0) == "other"

    def test_many_uses_do_not_grow_it(self) -> None:
        policy = LRUPolicy()
        item = Item("a", None, 0, 1)
        policy.add(item, 0.0)
        for i in range(10_000):
            policy.use([item], float(i))
        assert len(policy._leaves._heap) < 100
