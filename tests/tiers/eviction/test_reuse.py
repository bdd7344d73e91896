"""What is learned of reuse: hazards are events over exposure, and Gittins' index looks ahead."""

from __future__ import annotations

import numpy as np

from lmcache_s3.tiers.eviction.reuse import AGES_S, BINS, WIDTHS_S, ReuseTable


def gittins(reused: list[float], widths_s: list[float], first: int) -> float:
    """As it is defined: the best of all ways to keep on from `first` and then give up."""
    best, alive, gained, spent_s = 0.0, 1.0, 0.0, 0.0
    for p, width_s in zip(reused[first:], widths_s[first:], strict=True):
        gained += alive * p
        spent_s += alive * width_s * (1 - p / 2)
        alive *= 1 - p
        best = max(best, gained / spent_s)
    return best


def test_nothing_seen_is_worth_nothing() -> None:
    assert not ReuseTable(3, 2).worth().any()


def test_the_index_is_gittins() -> None:
    rng = np.random.default_rng(3)
    table = ReuseTable(4, 3)
    table.reuses[:] = rng.integers(0, 3000, (4, BINS))
    table.exposure_s[:] = rng.uniform(1e3, 1e6, (4, BINS))
    reused = 1 - np.exp(-table.hazards() * WIDTHS_S)
    for kind, worth in enumerate(table.worth()):
        for first in range(BINS):
            expected = gittins(reused[kind].tolist(), WIDTHS_S.tolist(), first)
            assert np.isclose(worth[first], expected)


def test_what_comes_back_in_a_minute_is_worth_more_before_than_after() -> None:
    table = ReuseTable(1, 1)
    minute = AGES_S.index(60)
    table.exposure_s[:] = 1e6
    table.reuses[0, minute] = 20_000
    worth = table.worth()[0]
    assert (np.diff(worth[: minute + 1]) > 0).all(), "the nearer the better"
    assert worth[minute + 1] < 0.01 * worth[0]


def test_much_evidence_overrules_the_usual_and_little_does_not() -> None:
    table = ReuseTable(2, 2)
    table.exposure_s[:] = 1e6
    table.reuses[0] = 10_000
    table.exposure_s[1] = 1e3
    table.reuses[1] = 0
    table.reuses[1, 4] = 10
    usual, rare = table.hazards()
    assert np.allclose(usual, 0.01, rtol=0.05)
    assert rare.max() < 2 * rare.min(), "ten reuses say how many, not yet when"
    table.exposure_s[1], table.reuses[1] = 1e6, 0
    table.reuses[1, 4] = 30_000
    rare = table.hazards()[1]
    assert rare.argmax() == 4
    assert rare[4] > 10 * np.delete(rare, 4).max()


def test_the_past_fades() -> None:
    table = ReuseTable(1, 1)
    table.exposure_s[:] = 1e9
    table.reuses[:] = 1e6
    before = table.hazards()
    table.forget()
    assert table.reuses.sum() < 3e5
    assert np.allclose(table.hazards(), before, rtol=0.05)
