"""The real protocol code under arbitrary interleavings, lost answers, late and repeated writes, stalls and deletion.

`TestWorld` lets hypothesis choose every step (and shrink a failure). The seeded runs are longer and lean towards what
breaks such protocols: a process that stalls just before a write while the others pass by. Each mutant of the protocol
must be caught by the very same runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache_s3.index.log import Log, _Read
from lmcache_s3.index.manifest import State, fence, log_key
from lmcache_s3.testing.manifest_model import (
    Fate,
    Violation,
    World,
    checkpointer,
    collector,
    reader,
    writer,
)
from lmcache_s3.types import Outcome

WRITES = ("put", "create", "delete")


def populate(world: World, log: type[Log] = Log, extents: int = 4) -> None:
    world.add("writer-a", writer(extents), log)
    world.add("writer-b", writer(extents), log, checkpoint_every=2)
    world.add("reader", reader, log)
    world.add("checkpointer", checkpointer, log)
    world.add("collector", collector, log)


class WorldMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        populate(self.world, extents=3)

    @rule(who=st.integers(0, 4), steps=st.integers(1, 12))
    def run(self, who: int, steps: int) -> None:
        process = self.world.processes[who]
        for _ in range(steps):
            if not process.ended:
                process.step()
                self.world.check()

    @rule(who=st.integers(0, 4), fate=st.sampled_from(Fate))
    def strike(self, who: int, fate: Fate) -> None:
        if not self.world.processes[who].ended:
            self.world.processes[who].step(fate)

    @rule(i=st.integers(0, 100))
    def deliver(self, i: int) -> None:
        if self.world.air:
            self.world.deliver(i)

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        try:
            self.world.finish()
        finally:
            self.world.close()


TestWorld = WorldMachine.TestCase
TestWorld.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def play(seed: int, log: type[Log] = Log, steps: int = 500) -> World:
    """One seeded run: random turns, with long stalls, mostly of processes that are about to write."""
    rng = random.Random(seed)
    world = World()
    try:
        populate(world, log)
        asleep = [0] * len(world.processes)
        faults = rng.choice([0.0, 0.05, 0.2])
        for now in range(steps):
            awake = [i for i, p in enumerate(world.processes) if not p.ended and asleep[i] <= now]
            if not awake:
                continue
            i = rng.choice(awake)
            process = world.processes[i]
            verb, key = process.at or ("", "")
            about_to_create = verb == "create" and "/log/" in key
            if rng.random() < (0.3 if about_to_create else 0.02):
                asleep[i] = now + rng.randrange(20, 250)
                continue
            process.step(rng.choice(list(Fate)) if verb in WRITES and rng.random() < faults else Fate.OK)
            if world.air and rng.random() < 0.05:
                world.deliver(rng.randrange(len(world.air)))
            world.check()
        world.finish()
    except Violation as e:
        raise Violation(f"seed {seed}: {e}") from e
    finally:
        world.close()
    return world


SEEDS = 40


def test_seeded_runs_hold() -> None:
    fenced = deleted = 0
    for seed in range(SEEDS):
        world = play(seed)
        fenced += sum(process.log.counters.fenced for process in world.processes)
        deleted += sum(
            1 for key in range(1, len(world.states)) if f"/manifest/log/{key:020d}" not in "".join(world.objects)
        )
    # The runs are worth something only if the fence was met and versions were deleted.
    assert fenced > SEEDS
    assert deleted > SEEDS


@pytest.mark.slow
def test_many_seeded_runs_hold() -> None:
    for seed in range(10_000, 10_600):
        play(seed)


@pytest.mark.slow
def test_long_interleavings() -> None:
    WorldMachine.TestCase.settings = settings(
        max_examples=300, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
    )
    WorldMachine.TestCase("runTest").runTest()


# ---- mutants: each a way to get the protocol wrong ------------------------------------------------------------------


class NoFenceAfterCreate(Log):
    def _settle(self, batch: list[_Read]) -> State:
        if batch:
            self._apply(batch)
            return self.state
        return super()._settle(batch)


class FenceBeforeCreate(Log):
    def _create(self, version: int, body: bytes) -> Outcome:
        object.__setattr__(self, "fenced", self._exists(fence(version, self.limits.milestone)))
        return super()._create(version, body)

    def _settle(self, batch: list[_Read]) -> State:
        if batch and not self.fenced:  # type: ignore[attr-defined]
            self._apply(batch)
            return self.state
        return super()._settle(batch)


class NoFenceForWhatIsRead(Log):
    def _settle(self, batch: list[_Read]) -> State:
        object.__setattr__(self, "read", False)
        return super()._settle(batch)

    def _read_batch(self, first: int):  # type: ignore[no-untyped-def]
        out = super()._read_batch(first)
        object.__setattr__(self, "read", bool(out[0]))
        return out

    def _exists(self, version: int) -> bool:
        return not self.read and super()._exists(version)  # type: ignore[attr-defined]


class FenceOfTheLast(Log):
    def _read_batch(self, first: int):  # type: ignore[no-untyped-def]
        out = super()._read_batch(first)
        object.__setattr__(self, "last", first + max(0, len(out[0]) - 1))
        return out

    def _exists(self, version: int) -> bool:
        last = getattr(self, "last", 0)
        return super()._exists(max(version, fence(last, self.limits.milestone)))


class NeverOnEmptyPolls(Log):
    def _settle(self, batch: list[_Read]) -> State:
        self._empty_polls = 0
        return super()._settle(batch)


class PlainPut(Log):
    def _create(self, version: int, body: bytes) -> Outcome:
        self.store.put(log_key(self.space_id, version), body)
        return Outcome.WON


class ConflictIsWon(Log):
    def _create(self, version: int, body: bytes) -> Outcome:
        outcome = super()._create(version, body)
        return Outcome.WON if outcome is Outcome.LOST else outcome


class NoAnswerIsWon(Log):
    def _create(self, version: int, body: bytes) -> Outcome:
        outcome = super()._create(version, body)
        return Outcome.WON if outcome is Outcome.UNKNOWN else outcome


class IndexBeforeSegments(Log):
    def _put_checkpoint(self, prefix: str, files: dict[str, bytes], key: str, index: bytes) -> None:
        self.store.put(key, index)
        for file, data in files.items():
            self.store.put(prefix + file, data)


@pytest.mark.parametrize(
    "mutant",
    [
        NoFenceAfterCreate,
        FenceBeforeCreate,
        NoFenceForWhatIsRead,
        FenceOfTheLast,
        NeverOnEmptyPolls,
        PlainPut,
        ConflictIsWon,
        NoAnswerIsWon,
        IndexBeforeSegments,
    ],
)
def test_mutants_are_caught(mutant: type[Log]) -> None:
    _caught(lambda seed: play(seed, mutant))


def _caught(run: Callable[[int], object]) -> None:
    for seed in range(10 * SEEDS):
        try:
            run(seed)
        except Violation as e:
            print(e)
            return
    pytest.fail("no run tells this mutant from the protocol")
