"""A small fleet, some minutes of virtual time: the real followers and collector, with everything that goes wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.index.manifest import Delta, apply, decode_delta, encode_delta
from lmcache_s3.testing.shared_history import SharedHistory, Violation
from lmcache_s3.testing.simulated_day import simulate
from lmcache_s3.testing.simulated_fleet import EXTENT_BYTES, Plan
from lmcache_s3.testing.simulated_s3 import Misbehaviour

SMALL = Plan(
    instances=20,
    past_versions=0,
    busy_s=240.0,
    day_s=360.0,
    opening_s=30.0,
    closing_s=60.0,
    stray_s=30.0,
    crashes=2,
    gc_busy_s=60.0,
    gc_idle_s=60.0,
    grace_s=45.0,
    max_bytes=200 * EXTENT_BYTES,
    misbehaviour=Misbehaviour(throttled=2e-3, lost=1e-3, late=1e-3, repeated=1e-3),
)
QUIET = Steps(Console(quiet=True))


def test_a_small_fleet_loses_nothing_though_much_goes_wrong() -> None:
    result = simulate(SMALL, QUIET, seed=1)
    assert result.lost == 0
    assert result.without_bytes == 0
    assert result.acknowledged > 600
    assert result.removed > 300  # the collector kept to its budget
    assert result.extents <= 300
    assert result.deleted > 300  # and objects went, once the grace was over
    assert result.leaders >= 2  # one crashed, one stood still
    assert result.counters["hand_overs"] > 200
    assert min(result.injected.values()) > 0
    assert len(result.injected) == 4
    assert np.percentile(result.visible_s, 50) < 5
    assert 0.05 < result.busy_dollars < 1


def test_one_seed_is_one_run() -> None:
    plan = replace(SMALL, instances=5, busy_s=100.0, day_s=130.0, crashes=1)
    one, same, other = (simulate(plan, QUIET, seed=seed) for seed in (1, 1, 2))
    assert one.visible_s.tolist() == same.visible_s.tolist()
    assert one.counters == same.counters
    assert one.visible_s.tolist() != other.visible_s.tolist()


WRITERS = "01JDXB4Z5T8V6Q2W3E4R5T6Y01", "01JDXB4Z5T8V6Q2W3E4R5T6Y02"


def test_shared_states_are_those_of_the_real_functions() -> None:
    history = SharedHistory(lambda: 0.0)
    state = history.tip
    bodies = [encode_delta(Delta(writer, lead=writer)) for writer in WRITERS]
    for version, body in enumerate(bodies, 1):
        delta = history.decode(body, version)
        assert delta == decode_delta(body, version)
        assert history.decode(bytes(bytearray(body)), version) is delta
        real = apply(state, delta)
        shared = history.apply(state, delta)
        assert shared == real
        assert history.apply(state, decode_delta(body, version)) is shared  # another instance's
        state = shared
    assert history.leads == [(1, WRITERS[0]), (2, WRITERS[1])]


def test_a_version_with_two_contents_is_a_violation() -> None:
    history = SharedHistory(lambda: 0.0)
    start = history.tip
    history.apply(start, Delta(WRITERS[0]))
    with pytest.raises(Violation, match="two contents"):
        history.apply(start, Delta(WRITERS[1]))


def test_a_replica_that_is_no_prefix_is_a_violation() -> None:
    history = SharedHistory(lambda: 0.0)
    start = history.tip
    first = history.apply(start, Delta(WRITERS[0]))
    second = Delta(WRITERS[0])
    history.apply(first, second)
    astray = apply(start, Delta(WRITERS[0], lead=WRITERS[0]))
    with pytest.raises(Violation, match="no prefix"):
        history.apply(astray, second)
