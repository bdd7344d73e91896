"""Tiers under several threads that share prompts with common beginnings, with the policies that there are."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from lmcache_s3.errors import Missing
from lmcache_s3.testing.cells import Cells, make_cells, plain, refs
from lmcache_s3.tiers.budgeted import BudgetedTier
from lmcache_s3.tiers.device import DeviceTier
from lmcache_s3.tiers.disk import DiskTier
from lmcache_s3.tiers.eviction.base import EvictionPolicy
from lmcache_s3.tiers.eviction.hazard import HazardPolicy
from lmcache_s3.tiers.eviction.lru import LRUPolicy
from lmcache_s3.tiers.host import HostTier
from lmcache_s3.tiers.places import parent_of, place_of

BUDGET = 2 << 20

MakeTier = Callable[[EvictionPolicy, Path], "BudgetedTier[object]"]
TIERS: dict[str, MakeTier] = {
    "host": lambda policy, path: HostTier(BUDGET, eviction=policy),  # type: ignore[dict-item,return-value]
    "device": lambda policy, path: DeviceTier(BUDGET, "cpu", eviction=policy),  # type: ignore[dict-item,return-value]
    "disk": lambda policy, path: DiskTier(path, BUDGET, eviction=policy, segment_bytes=300_000),  # type: ignore[dict-item,return-value]
}


def branches(seed: int) -> list[Cells]:
    """Prompts that go on from one beginning."""
    rng = random.Random(seed)
    beginning = make_cells(rng, [rng.randrange(1, 60_000) for _ in range(4)])
    out = [beginning]
    for _ in range(3):
        at = rng.randrange(4)
        (first, data), *rest = make_cells(rng, [rng.randrange(1, 60_000) for _ in range(3)])
        ends = [(replace(first, parent=beginning[at][0].prefix_hash), data), *rest]
        first_token = (at + 1) * 256
        out.append(beginning[: at + 1] + [(replace(cell, first_token=first_token), data) for cell, data in ends])
    return out


@pytest.mark.parametrize("policy", [LRUPolicy, HazardPolicy])
@pytest.mark.parametrize("kind", sorted(TIERS))
def test_no_chunk_without_the_one_before_it(kind: str, policy: Callable[[], EvictionPolicy], tmp_path: Path) -> None:
    tier = TIERS[kind](policy(), tmp_path)
    prompts = [prompt for seed in range(25) for prompt in branches(seed)]

    def work(seed: int) -> int:
        rng, hits, kept = random.Random(seed), 0, []
        for _ in range(80):
            prompt = rng.choice(prompts[:50])
            if rng.random() < 0.5:
                tier.put(prompt)
            else:
                n = tier.match_prefix(refs(prompt))
                try:
                    kept.append((tier.get(refs(prompt)[:n]), prompt))
                    hits += n
                except Missing:  # evicted in between
                    pass
            for got, right in kept[-2:]:
                assert plain(got) == [data for _, data in right[: len(got)]]
            del kept[:-2]
            assert tier.stats().used_bytes <= BUDGET
        return hits

    with ThreadPoolExecutor(5) as pool:
        hits = sum(pool.map(work, range(5)))
    assert hits > 50
    assert tier.stats().evicted_cells > 50
    assert tier.stats().bad_cells == 0
    held = dict.fromkeys(tier._entries)
    for cell, _ in (one for prompt in prompts for one in prompt):
        if place_of(cell) in held and cell.parent != bytes(16):
            assert parent_of(cell) in held
    tier.close()
    if kind == "disk":
        tier = TIERS[kind](policy(), tmp_path)
        assert dict.fromkeys(tier._entries) == held
        tier.close()
