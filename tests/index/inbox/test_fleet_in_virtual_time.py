"""Two dozen instances in virtual time: they hand over, their leader dies, requests go wrong, and nothing is lost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
from ulid import ULID

from lmcache_s3.errors import LMCacheS3Error
from lmcache_s3.index.change import Change
from lmcache_s3.index.follower import Follower, Pacing
from lmcache_s3.index.inbox import PATIENCE_S
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import Verdict, inbox_prefix
from lmcache_s3.testing.simulated_s3 import Misbehaviour, SimulatedS3
from lmcache_s3.testing.stepped import SPACE_ID, make_record
from lmcache_s3.testing.virtual import Signal, Simulation, VirtualExecutor
from lmcache_s3.types import ExtentName


@dataclass
class Instance:
    """One process of the simulation: stores an extent now and then."""

    world: Simulation
    bucket: SimulatedS3
    number: int
    pause_s: float
    until_s: float
    stored: dict[ExtentName, float]
    answered: dict[ExtentName, float]
    """When, by virtual time."""

    def __post_init__(self) -> None:
        rng = self.world.generator(f"instance {self.number}")
        self.log = Log(
            self.bucket.client(f"{self.number}"),
            SPACE_ID,
            writer=_ulid(rng),
            sleep=self.world.sleep,
            rng=rng,
            nonce=lambda: rng.randbytes(16).hex(),
            clock=self.world.clock,
        )
        self.follower = Follower(
            self.log,
            Pacing(poll_s=1.0, hand_over_s=0.5),
            rng=rng,
            ulid=lambda: _ulid(rng),
            executor=VirtualExecutor(self.world, 32),
        )
        self.rng, self.signal = rng, Signal(self.world)
        self.errors: Counter[str] = Counter()

    def store(self) -> None:
        while self.world.clock() < self.until_s:
            self.world.sleep(self.rng.expovariate(1 / self.pause_s))
            record = make_record(self.log.state.version)
            self.stored[record.name] = self.world.clock()
            self.follower.submit(Change(add=(record,)), partial(self.note, record.name))
            self.signal.set()

    def note(self, name: ExtentName, verdicts: list[Verdict]) -> None:
        assert name not in self.answered
        self.answered[name] = self.world.clock()

    def run(self) -> None:
        self.attempt(self.log.open)
        while True:
            left_s = self.follower.due_s() - self.world.clock()
            if left_s > 0:
                self.signal.wait(left_s)
            else:
                self.attempt(self.follower.step)

    def attempt(self, step: Callable[[], object]) -> None:
        try:
            step()
        except LMCacheS3Error as e:
            self.errors[e.kind] += 1


def _ulid(rng: random.Random) -> str:
    return str(ULID.from_bytes(bytes([rng.randrange(0, 256)]) + rng.randbytes(15)))


@pytest.mark.parametrize("faulty", [False, True], ids=["calm", "misbehaving"])
def test_a_fleet_loses_nothing_whoever_leads_and_dies(faulty: bool) -> None:
    wrong = Misbehaviour(throttled=0.01, lost=0.005, late=0.005, repeated=0.005) if faulty else Misbehaviour()
    with Simulation(seed=5) as world:
        bucket = SimulatedS3(world, misbehaviour=wrong)
        stored: dict[ExtentName, float] = {}
        answered: dict[ExtentName, float] = {}
        instances = [Instance(world, bucket, n, 2.0, 60.0, stored, answered) for n in range(24)]
        for instance in instances:
            world.start(instance.run, owner=instance.number)
            world.start(instance.store, owner=instance.number)
        world.run_until(30.0)
        newest = max(instances, key=lambda instance: instance.log.state.version).log.state
        leading = [instance for instance in instances if instance.log.writer == newest.lead]
        assert len(leading) == 1
        handed_over = sum(instance.follower.hand_overs.handed_over for instance in instances)
        assert handed_over > 100
        world.crash(leading[0].number)
        survivors = [instance for instance in instances if instance is not leading[0]]
        lost_with_it = leading[0].follower.pending
        world.run_until(140.0)
        unanswered = [name for name in stored if name not in answered]
        assert len(unanswered) <= lost_with_it + 1
        newest = max(survivors, key=lambda instance: instance.log.state.version).log.state
        live = set(newest.extents)
        assert set(answered) <= live
        if not faulty:
            assert not any(instance.errors for instance in survivors)
            assert not any(key.startswith(inbox_prefix(SPACE_ID)) for key in bucket.objects)
            waits = sorted(answered[name] - stored[name] for name in answered)
            assert waits[len(waits) // 2] < 3
            assert waits[-1] < 2 * PATIENCE_S + 5
            assert not any(instance.follower.leader.leads for instance in survivors), "nothing more was stored"
