"""`lmcache-s3 bench policy TRACE`: eviction, admission and write-behind on a recorded trace of requests.

Eviction: token hit rates of one tier of 1, 4 and 16 M tokens, in chunks of the trace's size. A chunk counts as a hit if
its whole prefix is held. LRU, Belady, ours and libcachesim's are all judged on every request of the trace. Ours starts
knowing nothing and learns as it goes: nothing is trained beforehand, on no part of the trace.

Write-behind: PUTs of all prompts of several turns and their answers, in chunks of 256 tokens that rest for a quarter of
an hour at most. The figure with a goal is for extents of 128 chunks: a model of 8 KiB a token at the default
`extent_bytes`, or a larger `extent_bytes`. Shorter extents stand beside it and save less, whatever the plan: the first
prompts of chats are long and fill several of them at once. (An 8B model has 8 to 16 chunks an extent by default.)
"""

from __future__ import annotations

from pathlib import Path

from lmcache_s3.benchmarks.figures import Figure, report
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.replay.growing import growth, puts_at_once, puts_behind
from lmcache_s3.replay.run import OBJECT, TierPlan, replay
from lmcache_s3.replay.trace import Trace, read_trace
from lmcache_s3.tiers.eviction.admission import SecondTouch

CAPACITIES = {"1m": 1_000_000, "4m": 4_000_000, "16m": 16_000_000}
"""Tokens."""
GOALS = {"1m": 0.22, "4m": 0.15, "16m": 0.0}
STANDARD = ("w-tinylfu", "arc", "s3-fifo")
EXTENT_CHUNKS = (128, 64, 32, 16)
AGE_S = 900.0


def measure(steps: Steps, trace: Trace) -> list[Figure]:
    return [*_eviction(steps, trace), *_admission(steps, trace), *_write_behind(steps, trace)]


def main(json_path: Path | None, trace_path: Path) -> bool:
    return report(measure(Steps(), read_trace(trace_path)), json_path)


def _eviction(steps: Steps, trace: Trace) -> list[Figure]:
    figures = []
    for name, tokens in CAPACITIES.items():
        rates = {}
        for policy in ("lru", "belady", "hazard", *STANDARD):
            with steps(f"{policy}, {tokens // 1_000_000} M tokens"):
                rates[policy] = replay(trace, policy, [TierPlan("tier", tokens)], 1).hit_rate
        room = rates["belady"] - rates["lru"]
        for policy, rate in rates.items():
            if policy not in ("lru", "belady", "hazard") and room > 0:
                gap = (rate - rates["lru"]) / room
                figures.append(Figure(f"policy.gap_closed_{name}_{policy}", gap, "ratio", None, "higher"))
        gap = (rates["hazard"] - rates["lru"]) / room if room > 0 else 0.0
        figures.append(Figure(f"policy.gap_closed_{name}", gap, "ratio", GOALS[name], "higher"))
        figures += [
            Figure(f"policy.hit_rate_{name}_{policy}", rate, "ratio", None, "higher") for policy, rate in rates.items()
        ]
    return figures


def _admission(steps: Steps, trace: Trace) -> list[Figure]:
    bucket = [TierPlan(OBJECT, None)]
    with steps("the bucket, all admitted and on second touch"):
        every = replay(trace, "lru", bucket, 1)
        second = replay(trace, "lru", bucket, 1, admission=SecondTouch())
    writes = second.written_bytes[OBJECT] / max(1, every.written_bytes[OBJECT])
    kept = second.hit_rate / every.hit_rate if every.hit_rate else 0.0
    return [
        Figure("policy.second_touch_writes", writes, "ratio", None, "lower"),
        Figure("policy.second_touch_reuses_kept", kept, "ratio", None, "higher"),
    ]


def _write_behind(steps: Steps, trace: Trace) -> list[Figure]:
    figures = []
    grown, tokens = growth(trace)
    for chunks in EXTENT_CHUNKS:
        with steps(f"write-behind, extents of {chunks} chunks"):
            at_once, behind = puts_at_once(grown, chunks), puts_behind(grown, chunks, AGE_S)
        main_one = chunks == EXTENT_CHUNKS[0]
        suffix = "" if main_one else f"_{chunks}_chunks"
        ratio = behind.total / max(1, at_once.total)
        name = f"policy.puts_vs_no_write_behind{suffix}"
        figures.append(Figure(name, ratio, "ratio", 0.3 if main_one else None, "lower"))
        for how, puts in (("without", at_once), ("with", behind)):
            per_m = 1e6 * puts.total / max(1, tokens)
            name = f"policy.puts_per_m_tokens_{how}{suffix}"
            figures.append(Figure(name, per_m, "requests", None, "lower"))
        peak = behind.peak_chunks * 256 / 1e6
        figures.append(Figure(f"policy.rests_at_most_m_tokens{suffix}", peak, "M tokens", None, "lower"))
    return figures
