"""Every policy keeps the rules of the port."""

from __future__ import annotations

from lmcache_s3.testing.eviction import EvictionPolicyTests, chain
from lmcache_s3.tiers.eviction.base import EvictionPolicy, Item
from lmcache_s3.tiers.eviction.hazard import HazardPolicy
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


class TestHazard(EvictionPolicyTests):
    def make_policy(self) -> EvictionPolicy:
        return HazardPolicy()

    def test_a_use_within_a_second_is_the_same_use_and_counts_for_order_only(self) -> None:
        policy = HazardPolicy()
        a, b = chain("a", 2), chain("b", 2)
        for i, prompt in enumerate((a, b)):
            policy.use(prompt, 0.1 * i)
            for item in prompt:
                policy.add(item, 0.1 * i)
        policy.use(a, 0.2)
        assert policy.victim(0.3) == b[-1].key
        assert not policy._visits.table.reuses.any()

    def test_it_starts_as_least_recently_used(self) -> None:
        policy = HazardPolicy()
        for i, name in enumerate("abc"):
            policy.use([Item(name, None, 0, 1)], 100.0 * i)
            policy.add(Item(name, None, 0, 1), 100.0 * i)
        policy.use([Item("a", None, 0, 1)], 300.0)
        assert policy.victim(400.0) == "b"

    def test_it_learns_that_first_turns_do_not_come_back_and_later_ones_do(self) -> None:
        """Chats of a second turn go on a minute later, as long as they are kept in view; first turns never do."""
        policy = HazardPolicy()
        for i in range(400):
            now_s = 30.0 * i
            chat, once = chain(f"chat{i // 40}", 4 + i % 40), chain(f"once{i}", 12)
            for prompt in (once, chat):
                policy.use(prompt, now_s)
                for item in prompt:
                    policy.add(item, now_s)
        held = {key for key in policy._held if str(key[0]).startswith("chat9")}  # type: ignore[index]
        for i in range(390, 400):
            key = policy.victim(12_000.0)
            assert key is not None
            assert key not in held, i
            policy.remove(key)

    def test_what_is_remembered_of_evicted_chunks_is_bounded(self) -> None:
        policy = HazardPolicy()
        for i in range(12_000):
            policy.use(chain(f"p{i}", 30), 0.01 * i)
        assert len(policy._visits._witnesses) <= 65_536
        assert len(policy) == 0

    def test_a_pause_of_weeks_is_no_trouble(self) -> None:
        policy = HazardPolicy()
        prompt = chain("p", 20)
        for now_s in (0.0, 60.0, 2e6, 2e6 + 60, 9e9):
            policy.use(prompt, now_s)
            for item in prompt:
                policy.add(item, now_s)
        assert policy.victim(1e10) == prompt[-1].key

    def test_a_prompt_used_for_ever_costs_no_more_than_one_used_once(self) -> None:
        policy = HazardPolicy()
        prompt = chain("p", 30)
        for i in range(2000):
            policy.use(prompt, 1.5 * i)
            for item in prompt:
                policy.add(item, 1.5 * i)
        visits = {visit for bucket in policy._buckets for visit in bucket} | {c.visit for c in policy._held.values()}
        assert len(policy._visits) <= 10
        assert sum(len(visit.keys) for visit in visits) == len(prompt)

    def test_what_is_taken_again_at_once_grows_old_all_the_same(self) -> None:
        policy = HazardPolicy()
        [item] = chain("p", 1)
        policy.use([item], 0.0)
        policy.add(item, 0.0)
        policy.remove(item.key)
        policy.add(item, 0.5)
        for i in range(3000):
            policy.use([Item("q", None, 0, 1)], 100.0 * i)
        assert policy._held[item.key].visit.bin > 0
