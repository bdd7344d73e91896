"""The real protocol code under arbitrary interleavings: lost answers, late and repeated writes, stalls, crashes,
deletion, rebuilds.

`TestWorld` lets hypothesis choose every step (and shrink a failure). The seeded runs are longer and lean towards what
breaks such protocols: a process that stalls just before a write while the others pass by. Each mutant of the protocol
must be caught by the very same runs.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmcache_s3.testing.manifest_model import CASTS, halt, play, populate
from lmcache_s3.testing.manifest_process import Fate, Process, Violation
from lmcache_s3.testing.manifest_world import World
from lmcache_s3.testing.mutants import MUTANTS, Mutant, caught


class WorldMachine(RuleBasedStateMachine):
    world: World

    @initialize(cast=st.sampled_from(CASTS), seed=st.integers(0, 2**16))
    def begin(self, cast: str, seed: int) -> None:
        self.world = World(seed=seed)
        populate(self.world, cast, extents=3)

    def _process(self, who: int) -> Process:
        return self.world.processes[who % len(self.world.processes)]

    @rule(who=st.integers(0, 6), steps=st.integers(1, 20))
    def run(self, who: int, steps: int) -> None:
        process = self._process(who)
        for _ in range(steps):
            if not process.ended:
                process.step()
                self.world.check()

    @rule(who=st.integers(0, 6), fate=st.sampled_from(Fate))
    def strike(self, who: int, fate: Fate) -> None:
        if not self._process(who).ended:
            self._process(who).step(fate)

    @rule(i=st.integers(0, 100))
    def deliver(self, i: int) -> None:
        if self.world.air:
            self.world.deliver(i)

    @rule(writes=st.none() | st.integers(0, 9))
    def rebuild(self, writes: int | None) -> None:
        if len(self.world.states) > 1 and len(self.world.processes) < 8:
            self.world.rebuild(writes)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                self.world.finish()
            finally:
                self.world.close()


TestWorld = WorldMachine.TestCase
TestWorld.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)

SEEDS = 40


def test_seeded_runs_hold() -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        world = play(seed)
        seen += world.seen
        seen["fenced"] += sum(process.log.counters.fenced for process in world.processes)
        seen["rebuilt"] += world.rebuilt
    # The runs are worth something only if what is dangerous happens in them, often.
    assert seen["fenced"] > 2 * SEEDS, seen
    assert seen["deleted manifest/log"] > SEEDS, seen
    assert seen["deleted extents"] > SEEDS, seen
    assert seen["handed over"] > SEEDS, seen
    assert seen["led"] > SEEDS // 2, seen
    assert seen["access"] > SEEDS // 4, seen
    assert seen["rebuilt"] > 2, seen


@pytest.mark.slow
@pytest.mark.parametrize("cast", CASTS)
def test_many_seeded_runs_hold(cast: str) -> None:
    """The runs in which `test_mutants_are_caught` catches them: without a mutation they hold."""
    for seed in range(5_000, 5_200):
        play(seed, cast=cast)


@pytest.mark.slow
def test_long_interleavings() -> None:
    WorldMachine.TestCase.settings = settings(
        max_examples=250, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
    )
    WorldMachine.TestCase("runTest").runTest()


def _halts(seed: int, every: int, cast: str) -> int:
    """Each process of a run halts at each `every`-th of its requests, for ever and for long; how many did."""
    halted = 0
    for who in range(6 if cast == "followers" else 5):
        for forever in (True, False):
            request = seed % every
            while halt(seed, who, request, forever=forever, cast=cast):
                halted += 1
                request += every
    return halted


def test_a_crash_or_stall_now_and_then() -> None:
    assert _halts(3, 40, "followers") > 20


@pytest.mark.slow
@pytest.mark.parametrize(("cast", "every"), [("followers", 1), ("direct", 3), ("log", 3)])
def test_a_crash_or_stall_at_every_request(cast: str, every: int) -> None:
    assert _halts(3, every, cast) > 800 // every


def test_the_same_seed_is_the_same_run() -> None:
    first, second = play(7, cast="followers"), play(7, cast="followers")
    assert first.bodies == second.bodies
    assert first.objects == second.objects


QUICK_MUTANTS = (
    "no_fence_reader",
    "milestone_deleted",
    "plain_put",
    "conflict_is_success",
    "unknown_is_success",
    "commit_first",
    "same_name",
    "sweep_by_age",
    "no_void_rule",
    "delete_before_confirm",
    "inbox_early",
    "index_first",
    "sweep_newest",
    "covered_swept",
)
"""Those that are caught within a few runs."""


def _name(mutant: Mutant) -> str:
    return mutant.name


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in QUICK_MUTANTS], ids=_name)
def test_some_mutants_are_caught(mutant: Mutant) -> None:
    assert isinstance(caught(mutant), Violation), mutant.why


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=_name)
def test_mutants_are_caught(mutant: Mutant) -> None:
    """By other runs than those of the quick set: that they are caught is no luck of a seed."""
    assert isinstance(caught(mutant, range(5_000, 5_400)), Violation), mutant.why
