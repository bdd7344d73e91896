"""What every `EvictionPolicy` must do: a suite to subclass, for our policies and anybody else's.

    class TestMyPolicy(EvictionPolicyTests):
        def make_policy(self): return MyPolicy()

Checked: the rules of the port. Not checked: whether what a policy evicts is worth less than what it keeps.
"""

from __future__ import annotations

import random
from collections.abc import Hashable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_s3.tiers.eviction.base import EvictionPolicy, Item

_PER_CLASS = [HealthCheck.differing_executors]  # the examples of one subclass are as good for the others


def chain(name: str, n: int, *, chunk_tokens: int = 256, n_bytes: int = 100) -> list[Item]:
    """The chunks of one prompt, first one first; keys are (name, position)."""
    return [
        Item((name, i), (name, i - 1) if i else None, i * chunk_tokens, n_bytes) for i in range(n)
    ]  # fmt: skip


class EvictionPolicyTests:
    """The conformance suite."""

    def make_policy(self) -> EvictionPolicy:
        raise AssertionError("a subclass gives a policy")

    def test_is_a_policy(self) -> None:
        assert isinstance(self.make_policy(), EvictionPolicy)

    def test_an_empty_one_has_no_victim(self) -> None:
        policy = self.make_policy()
        assert policy.victim(0.0) is None
        policy.add(Item("a", None, 0, 1), 0.0)
        policy.remove("a")
        assert policy.victim(1.0) is None

    def test_what_is_not_held_can_be_used_and_removed_without_effect(self) -> None:
        policy = self.make_policy()
        policy.use([Item("a", None, 0, 1)], 0.0)
        policy.remove("a")
        assert policy.victim(0.0) is None

    def test_a_prompt_goes_from_its_end(self) -> None:
        policy = self.make_policy()
        items = chain("p", 20)
        policy.use(items, 0.0)
        for item in items:
            policy.add(item, 0.0)
        gone = []
        while (key := policy.victim(1.0)) is not None:
            gone.append(key)
            policy.remove(key)
        assert gone == [item.key for item in reversed(items)]

    def test_what_is_spared_is_no_victim(self) -> None:
        policy = self.make_policy()
        for name in "abc":
            policy.add(Item(name, None, 0, 1), 0.0)
        assert policy.victim(1.0, {"a", "b"}) == "c"
        assert policy.victim(1.0, {"a", "c"}) == "b"
        assert policy.victim(1.0, {"a", "b", "c"}) is None
        assert not policy.admit(Item("d", "c", 256, 1), 1.0, {"a", "b", "c"}), "nothing could make room"
        assert policy.victim(1.0) in {"a", "b", "c"}

    def test_a_child_may_outlive_its_parent_and_still_goes(self) -> None:
        policy = self.make_policy()
        a, b, c = chain("p", 3)
        for item in (a, b, c):
            policy.add(item, 0.0)
        policy.remove(b.key)  # found damaged
        gone = set()
        while (key := policy.victim(1.0)) is not None:
            gone.add(key)
            policy.remove(key)
        assert gone == {a.key, c.key}

    def test_a_parent_that_comes_back_has_its_children_again(self) -> None:
        policy = self.make_policy()
        a, b = chain("p", 2)
        for item in (a, b):
            policy.add(item, 0.0)
        policy.remove(a.key)
        policy.add(a, 1.0)
        assert policy.victim(2.0) == b.key

    @settings(max_examples=200, deadline=None, suppress_health_check=_PER_CLASS)
    @given(seed=st.integers(0, 2**32), room=st.integers(1, 30), n_events=st.integers(1, 150))
    def test_any_history_keeps_the_rules(self, seed: int, room: int, n_events: int) -> None:
        rng = random.Random(seed)
        policy = self.make_policy()
        held: dict[Hashable, Item] = {}
        now_s = 0.0
        prompts = [_branching(rng, f"p{i}") for i in range(6)]
        for _ in range(n_events):
            now_s += rng.choice([0.0, 0.01, 1.0, 60.0, 4000.0])
            prompt = rng.choice(prompts)
            if held and rng.random() < 0.1:
                key = rng.choice(list(held))
                policy.remove(key)
                del held[key]
            elif rng.random() < 0.1:
                policy.use([rng.choice(prompt)], now_s)
            else:
                self._use(policy, held, prompt[: rng.randrange(1, len(prompt) + 1)], room, now_s)
        while (key := policy.victim(now_s)) is not None:
            self._check(held, key)
            policy.remove(key)
            del held[key]
        assert not held, "everything can be evicted"

    def _use(
        self, policy: EvictionPolicy, held: dict[Hashable, Item], prompt: list[Item], room: int, now_s: float
    ) -> None:
        """As a tier does: the rest of the prompt is kept while the policy says so."""
        own = {item.key for item in prompt}
        policy.use(prompt, now_s)
        for item in prompt:
            if item.key in held:
                continue
            if len(held) >= room:
                if not policy.admit(item, now_s, own):
                    break
                key = policy.victim(now_s, own)
                assert key is not None, "admitted, so something can go"
                assert key not in own
                self._check(held, key)
                assert policy.victim(now_s, own) == key, "asking changes nothing"
                policy.remove(key)
                del held[key]
            policy.add(item, now_s)
            held[item.key] = item

    def _check(self, held: dict[Hashable, Item], key: Hashable) -> None:
        assert key in held, "a victim is held"
        assert not [item for item in held.values() if item.parent == key], "a victim is a leaf"


def _branching(rng: random.Random, name: str) -> list[Item]:
    """A prompt that shares its first chunks with others of the same root."""
    shared = rng.randrange(1, 4)
    out: list[Item] = []
    for i in range(rng.randrange(shared, 10)):
        key = ("root", i) if i < shared else (name, i)
        out.append(Item(key, out[-1].key if out else None, 256 * i, 100))
    return out
