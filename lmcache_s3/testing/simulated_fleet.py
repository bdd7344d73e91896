"""Instances of the real index code over a simulated S3, in virtual time: what they store, what is recorded of them.

`Plan` says what a run does, `Instance` is one engine's index with the load that it makes, `Fleet` the world they share:
the store, the one true history, a collector. `simulated_day` runs them. Settings are the defaults.

A run is deterministic in plan and seed. `SharedHistory` raises `Violation` while it goes on, whatever process it is in.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ulid import ULID

from lmcache_s3.errors import LMCacheS3Error
from lmcache_s3.identity import root_hash
from lmcache_s3.index.change import Change
from lmcache_s3.index.follower import Follower
from lmcache_s3.index.gc import Collector, GcReport, GcSettings
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import State, Verdict
from lmcache_s3.index.replica import Replica
from lmcache_s3.index.service import IndexSettings
from lmcache_s3.testing.shared_history import SharedHistory
from lmcache_s3.testing.simulated_s3 import Misbehaviour, Requests, SimulatedClient, SimulatedS3
from lmcache_s3.testing.virtual import Process, Simulation, VirtualExecutor
from lmcache_s3.types import HASH_BYTES, ExtentName, ExtentRecord, Grid, extent_prefix, shard_key

SPACE_ID = "5" * 64
DAY_S = 86_400.0
SEED = 4
_CHUNKS = 4
_CHUNK_TOKENS = 256
_CELL_BYTES = _CHUNK_TOKENS * 128 * 1024 + 4
"""KV of Llama 3.1 8B, codec `fast`."""
EXTENT_BYTES = _CHUNKS * _CELL_BYTES
_OBJECT = b"."
"""Stands for the bytes of shards and zarr.json: only that they exist matters here."""
_SHARE_OF_TURNS = 0.5
"""Extents that go on where the instance's last one ended: the next turn of a conversation."""
_SHARE_OF_TWINS = 0.02
"""Extents of a prompt that another instance stores at about the same time."""


MISBEHAVIOUR = Misbehaviour(throttled=1e-4, lost=5e-5, late=2e-5, repeated=5e-5)
DEFAULTS = IndexSettings()


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens, in seconds of virtual time. past_versions: made by one instance alone before the day begins.

    every_s: an instance stores an extent so often while busy. opening_s: over which the instances start. closing_s: the
    end of the busy while, in which the leader and others are made to stand still; the busy figures are taken between
    the two, with the crashes in it. stray_s: the whole fleet stores one extent so often when idle. crashes: instances
    that crash while busy, besides the leader, and are replaced. gc_busy_s, gc_idle_s: between collections; grace_s: the
    collector's, and how long it keeps history; max_bytes: its budget.
    """

    instances: int = 1000
    past_versions: int = 8150
    busy_s: float = 2100.0
    day_s: float = DAY_S
    every_s: float = 5.0
    opening_s: float = 120.0
    closing_s: float = 180.0
    stray_s: float = 900.0
    crashes: int = 5
    leader_fails: bool = True
    stalls: bool = True
    gc_busy_s: float = 900.0
    gc_idle_s: float = 4 * 3600.0
    grace_s: float = 3600.0
    max_bytes: int | None = 50_000 * EXTENT_BYTES
    misbehaviour: Misbehaviour = MISBEHAVIOUR
    settings: IndexSettings = DEFAULTS
    sampled: int = 20


class WatchedReplica(Replica):
    """Remembers when each version was published."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self.published: list[tuple[float, int]] = []

    def publish(self, state: State) -> None:
        super().publish(state)
        self.published.append((self._clock(), state.version))


@dataclass(slots=True)
class Stored:
    """One extent that an instance wanted in the index. asked_s: when it was uploaded, and its commit was asked."""

    record: ExtentRecord
    asked_s: float
    acknowledged_s: float | None = None
    verdict: Verdict | None = None


class Instance:
    """One engine's index, and the load that it makes."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet, self.name, self.sim = fleet, name, fleet.sim
        self.rng = fleet.sim.generator(name)
        self.store: SimulatedClient = fleet.s3.client(name)
        self.replica = WatchedReplica(self.sim.clock)
        self.errors: Counter[str] = Counter()
        self.last: ExtentRecord | None = None
        self.ulid = new_ulid(self.rng)
        settings = fleet.plan.settings
        readers = VirtualExecutor(self.sim, settings.read_ahead)
        log = new_log(fleet.sim, self.store, self.ulid, self.rng, readers, replica=self.replica)
        self.follower = Follower(
            log,
            settings.pacing(),
            rng=self.rng,
            ulid=lambda: new_ulid(self.rng),
            executor=VirtualExecutor(self.sim, settings.merge_parallel),
        )
        self._process: Process | None = None
        self._waiting = False
        self.opened_s: float | None = None

    def start(self, after_s: float = 0.0) -> None:
        self._process = self.sim.start(self._follow, after_s=after_s, owner=self.name)

    def _follow(self) -> None:
        sim, follower = self.sim, self.follower
        while self.opened_s is None:
            try:
                follower.log.open()
                self.opened_s = sim.clock()
            except LMCacheS3Error as e:
                self.errors[e.kind] += 1
                sim.sleep(self.rng.uniform(1.0, 5.0))
        while True:
            pause_s = follower.due_s() - sim.clock()
            if pause_s > 0:
                self._waiting = True
                sim.sleep(pause_s)
                if not self._waiting:
                    continue  # woken: something was submitted
                self._waiting = False
            try:
                follower.step()
            except LMCacheS3Error as e:
                self.errors[e.kind] += 1

    def store_regularly(self, every_s: float, until_s: float) -> None:
        """A process: an extent each `every_s` seconds, its moment at random within each interval."""

        def work() -> None:
            begin_s = self.sim.clock()
            while begin_s < until_s:
                self.sim.sleep(max(0.0, begin_s + self.rng.uniform(0.0, every_s) - self.sim.clock()))
                if self.opened_s is not None:
                    self.store_one()
                begin_s += every_s

        self.sim.start(work, owner=self.name)

    def store_one(self) -> None:
        """Upload an extent, then ask for its commit; look up what others stored, too."""
        record = self.fleet.make(self)
        for key in (
            shard_key(SPACE_ID, record.name, record.grid, 0),
            f"{extent_prefix(SPACE_ID, record.name)}/zarr.json",
        ):
            while True:
                try:
                    self.store.put(key, _OBJECT)
                    break
                except LMCacheS3Error as e:
                    self.errors[e.kind] += 1
                    self.sim.sleep(0.5)
        self.last = record
        stored = Stored(record, self.sim.clock())
        self.fleet.stored.append(stored)

        def done(verdicts: list[Verdict]) -> None:
            stored.acknowledged_s, stored.verdict = self.sim.clock(), verdicts[0]

        def failed(error: BaseException) -> None:
            self.fleet.failed[type(error).__name__] += 1

        self.follower.submit(Change(add=(record,)), done, failed)
        self._wake()
        self._look_up()

    def _look_up(self) -> None:
        recent = self.fleet.recent
        if recent:
            refs = self.replica.match(list(recent[self.rng.randrange(len(recent))].chunk_hashes()))
            if refs:
                self.follower.touch([refs[0].extent.name])
                self._wake()

    def _wake(self) -> None:
        if self._waiting and self._process is not None:
            self._waiting = False
            self.sim.wake(self._process)


class VirtualCollector(Collector):
    """`concurrent.futures.wait` waits for threads; ours are greenlets."""

    def _each(self, function, items) -> None:  # type: ignore[no-untyped-def]
        assert self.executor is not None
        for future in [self.executor.submit(function, item) for item in items]:
            future.result()


class Fleet:
    """The simulated world and what is recorded of it."""

    def __init__(self, plan: Plan, seed: int = SEED) -> None:
        self.plan = plan
        self.sim = Simulation(seed)
        self.s3 = SimulatedS3(self.sim, misbehaviour=plan.misbehaviour, attempts=3)
        self.history = SharedHistory(self.sim.clock)
        self.rng = self.sim.generator("fleet")
        self.instances: list[Instance] = []
        self.stored: list[Stored] = []
        self.failed: Counter[str] = Counter()
        self.recent: list[ExtentRecord] = []
        self.collections: list[GcReport] = []
        self.out: set[str] = set()
        """Instances that crashed or stand still."""
        self._root = root_hash(SPACE_ID, "")[:HASH_BYTES]
        self._lengths = struct.pack(f"<{_CHUNKS}I", *[_CELL_BYTES] * _CHUNKS)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.history.sharing():
            try:
                yield
            finally:
                self.sim.close()

    def add(self, name: str, after_s: float = 0.0) -> Instance:
        instance = Instance(self, name)
        self.instances.append(instance)
        instance.start(after_s)
        return instance

    def make(self, instance: Instance) -> ExtentRecord:
        """The next extent of an instance: a new prompt, a further turn, or what another one stores just now."""
        rng, last, dice = instance.rng, instance.last, instance.rng.random()
        born = instance.replica.state.version
        nonce = rng.randbytes(16).hex()
        if self.recent and dice < _SHARE_OF_TWINS:
            twin = self.recent[rng.randrange(len(self.recent))]
            return replace(twin, name=replace(twin.name, born=born, nonce=nonce))
        hashes = rng.randbytes(HASH_BYTES * _CHUNKS)
        turn = last is not None and dice > 1 - _SHARE_OF_TURNS
        record = ExtentRecord(
            name=ExtentName(hashes[-HASH_BYTES:], _CHUNKS, "fast", born, nonce),
            grid=Grid(),
            parent=last.name.last_hash if last is not None and turn else self._root,
            first_token=last.first_token + _CHUNKS * _CHUNK_TOKENS if last is not None and turn else 0,
            hashes=hashes,
            lengths=self._lengths,
            sums=rng.randbytes(8 * _CHUNKS),
            raw_bytes=_CHUNKS * (_CELL_BYTES - 4),
        )
        self.recent.append(record)
        if len(self.recent) > 4096:
            del self.recent[:2048]
        return record

    def leader(self) -> Instance | None:
        return next((i for i in self.instances if i.ulid == self.history.tip.lead), None)

    def replace(self, instance: Instance, every_s: float, until_s: float) -> None:
        """It crashes; another machine takes its place half a minute later."""
        self.sim.crash(instance.name)
        self.out.add(instance.name)
        new = self.add(f"{instance.name}'", after_s=30.0)
        new.store_regularly(every_s, until_s)

    def collect(self, every_s: Callable[[], float]) -> None:
        """A process: a round of collection so often."""
        settings = GcSettings(max_bytes=self.plan.max_bytes, grace_s=self.plan.grace_s, history_s=self.plan.grace_s)
        rng = self.sim.generator("collector")
        executor = VirtualExecutor(self.sim, self.plan.settings.merge_parallel)
        log = new_log(self.sim, self.s3.client("collector"), new_ulid(rng), rng, executor)
        collector = VirtualCollector(log, settings, executor=executor)

        def rounds() -> None:
            opened = False
            while True:
                self.sim.sleep(every_s())
                try:
                    if not opened:
                        log.open()
                        opened = True
                    self.collections.append(collector.run())
                except LMCacheS3Error as e:
                    self.failed[f"collection: {e.kind}"] += 1
                    self.sim.sleep(60.0)

        self.sim.start(rounds, owner="collector")

    def any_instance(self) -> Instance:
        """One at random that is up."""
        up = [i for i in self.instances if i.opened_s is not None and i.name not in self.out]
        return up[self.rng.randrange(len(up))]

    def requests(self) -> Requests:
        """Of the index, by everybody."""
        total = Requests()
        for client in self.s3.clients.values():
            total = total + client.index
        return total


def new_log(
    sim: Simulation,
    store: SimulatedClient,
    ulid: str,
    rng: random.Random,
    executor: Executor,
    *,
    replica: Replica | None = None,
) -> Log:
    return Log(
        store,
        SPACE_ID,
        ulid,
        sim.sleep,
        rng,
        lambda: rng.randbytes(16).hex(),
        replica=replica or Replica(),
        readers=executor,
        clock=sim.clock,
    )


def new_ulid(rng: random.Random) -> str:
    return str(ULID.from_bytes(rng.randbytes(16)))
