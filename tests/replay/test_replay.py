"""A replay counts what would have been: hits, bytes, requests; nobody beats the one who knows the future."""

from __future__ import annotations

import random

import pytest

from lmcache_s3.errors import Invalid
from lmcache_s3.replay.belady import BeladyPolicy
from lmcache_s3.replay.growing import growth, puts_at_once, puts_behind
from lmcache_s3.replay.run import TierPlan, replay
from lmcache_s3.replay.tiers import OURS, STANDARD, make_tier
from lmcache_s3.replay.trace import Trace, Use
from lmcache_s3.tiers.eviction.admission import SecondTouch


def made_up(n_chats: int = 120, seed: int = 5) -> Trace:
    """A service whose chats share a system prompt, and half of which go on."""
    rng = random.Random(seed)
    uses = []
    number = 1
    for chat in range(n_chats):
        time_s, tokens, chunks = 10.0 * chat, 0, [0]
        for _ in range(rng.choice([1, 1, 2, 4])):
            tokens += rng.randrange(600, 3000)
            while len(chunks) < -(-tokens // 512):
                chunks.append(number)
                number += 1
            uses.append(Use(time_s, tokens, 300, tuple(chunks)))
            chunks[-1:] = [number] if tokens % 512 else chunks[-1:]  # the partial chunk is another one when it is full
            number += 1
            tokens += 300
            time_s += rng.uniform(20, 200)
    return Trace(512, tuple(sorted(uses, key=lambda use: use.time_s)))


def trace(*prompts: tuple[int, ...]) -> Trace:
    return Trace(100, tuple(Use(float(i), 100 * len(chunks), 0, chunks) for i, chunks in enumerate(prompts)))


def test_hits_are_leading_chunks_and_bytes_are_counted() -> None:
    out = replay(trace((1, 2, 3), (1, 2, 4), (9, 2)), "lru", [TierPlan("host", 10_000)], 10)
    assert dict(out.hit_tokens) == {"host": 200}
    assert out.read_bytes["host"] == 2_000
    assert out.written_bytes["host"] == 5_000, "1, 2, 3, 4 and 9: 2 was there, if behind another beginning"
    assert out.hit_rate == 200 / 800
    assert (out.puts, out.gets, out.stored_bytes) == (0, 0, 0)


def test_a_small_tier_holds_what_it_can_and_the_bucket_the_rest() -> None:
    uses = trace((1, 2), (3, 4), (1, 2), (3, 4))
    assert replay(uses, "lru", [TierPlan("host", 200)], 1).hit_rate == 0
    assert replay(uses, "lru", [TierPlan("host", 400)], 1).hit_rate == 0.5
    out = replay(uses, "lru", [TierPlan("host", 200), TierPlan("object", None)], 1)
    assert dict(out.hit_tokens) == {"object": 400}
    assert (out.puts, out.gets, out.stored_bytes) == (6, 2, 400)
    assert out.request_dollars == pytest.approx(6 * 5e-6 + 2 * 0.4e-6)


def test_each_chunk_comes_from_the_fastest_tier() -> None:
    plans = [TierPlan("host", 200), TierPlan("disk", 1_000), TierPlan("object", None)]
    out = replay(trace((1, 2, 3), (1, 2, 3)), "lru", plans, 1)
    assert dict(out.hit_tokens) == {"host": 200, "disk": 100}


def test_second_touch_stores_what_came_twice() -> None:
    out = replay(trace((1, 2), (1, 3), (1, 3)), "lru", [TierPlan("object", None)], 1, admission=SecondTouch(100))
    assert out.written_bytes["object"] == 200, "1 at its second use, 3 at its"
    assert dict(out.hit_tokens) == {"object": 100}


@pytest.mark.parametrize("chunks", [8, 40, 200])
def test_nobody_beats_belady(chunks: int) -> None:
    uses = made_up()
    rates = {policy: replay(uses, policy, [TierPlan("host", 512 * chunks)], 1).hit_rate for policy in OURS}
    assert max(rates, key=lambda policy: rates[policy]) == "belady"
    assert rates["belady"] > rates["lru"] or chunks == 200


def test_the_future_is_known_by_use() -> None:
    policy = BeladyPolicy(trace((1,), (2,), (1,)))
    tier = make_tier("belady", trace((1,), (2,), (1,)), 1, 1)
    assert [tier.serve(use)[0] for use in trace((1,), (2,), (1,)).uses] == [[False], [False], [True]]
    assert policy.victim(0.0) is None


@pytest.mark.parametrize("policy", sorted(STANDARD))
def test_the_standard_ones_run(policy: str) -> None:
    pytest.importorskip("libcachesim")
    uses = made_up()
    everything = replay(uses, policy, [TierPlan("host", 1 << 40)], 1).hit_rate
    assert everything == replay(uses, "lru", [TierPlan("host", 1 << 40)], 1).hit_rate
    assert replay(uses, policy, [TierPlan("host", 512 * 40)], 1).hit_rate < everything


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(Invalid, match="hazard, lru"):
        make_tier("clever", made_up(1), 1, 1)


def test_growth_is_every_chunk_of_chats_once() -> None:
    uses = made_up()
    grown, tokens = growth(uses)
    assert 0 < tokens < uses.input_tokens
    hashes = [one for step in grown for one in step.hashes]
    assert len(set(hashes)) == len(hashes)
    assert [step.time_s for step in grown] == sorted(step.time_s for step in grown)
    followed = {step.parent for step in grown} - {b"root"}
    assert followed & set(hashes), "turns follow one another"


def test_behind_costs_fewer_puts_the_longer_it_waits() -> None:
    grown, _ = growth(made_up())
    at_once = puts_at_once(grown, 64)
    waits = [puts_behind(grown, 64, age_s) for age_s in (1.0, 60.0, 600.0)]
    totals = [at_once.total, *(one.total for one in waits)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < 0.5 * totals[0]
    assert [one.peak_chunks for one in waits] == sorted(one.peak_chunks for one in waits)
    n_chunks = sum(len(step.hashes) for step in grown)
    assert puts_at_once(grown, 1).extents == puts_behind(grown, 1, 1e9).extents == n_chunks
