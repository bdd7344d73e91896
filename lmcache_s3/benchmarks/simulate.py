"""`lmcache-s3 bench simulate`: a fleet for a day, in virtual time: the real index code over a simulated S3.

A space with a past (one instance alone, more than 8,192 versions), then 1,000 instances that share it: a busy while in
which each stores an extent each 5 s, and the rest of the day idle. Settings are the defaults. The store answers with
S3's latencies, refuses some requests, loses answers, and carries out writes late or twice. Instances crash (the leader
too) and stall, one past the fence, others past the grace; a collector keeps a byte budget.

Every replica is held against the one true history while it runs; at the end a cold open, which shares nothing with the
run, must say the same, and name every extent that was acknowledged, or the collection that removed it.
"""

from __future__ import annotations

import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from ulid import ULID

from lmcache_s3.benchmarks.figures import Figure, report
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.errors import LMCacheS3Error
from lmcache_s3.identity import root_hash
from lmcache_s3.index.change import Change
from lmcache_s3.index.follower import Follower
from lmcache_s3.index.gc import Collector, GcReport, GcSettings
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import State, Verdict
from lmcache_s3.index.replica import Replica
from lmcache_s3.index.service import IndexSettings
from lmcache_s3.testing.shared_history import SharedHistory, Violation
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


DAY = Plan()


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
        self.ulid = _ulid(self.rng)
        settings = fleet.plan.settings
        readers = VirtualExecutor(self.sim, settings.read_ahead)
        log = _log(fleet.sim, self.store, self.ulid, self.rng, readers, replica=self.replica)
        self.follower = Follower(
            log,
            settings.pacing(),
            rng=self.rng,
            ulid=lambda: _ulid(self.rng),
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
        log = _log(self.sim, self.s3.client("collector"), _ulid(rng), rng, executor)
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


@dataclass(slots=True)
class Result:
    """What a run gave. dollars: index requests per instance-day. visible_s: for each extent stored in the busy window
    and each replica of a sample."""

    lost: int
    without_bytes: int
    acknowledged: int
    verdicts: Counter[str]
    visible_s: np.ndarray
    busy_dollars: float
    idle_dollars: float
    busy_gets_per_hour: float
    busy_versions_per_s: float
    leaders: int
    counters: Counter[str]
    injected: Counter[str]
    failed: Counter[str]
    errors: Counter[str]
    extents: int
    collections: int
    removed: int
    deleted: int
    wall_s: float


def simulate(plan: Plan, steps: Steps, seed: int = SEED) -> Result:
    """Run it. Deterministic in plan and seed."""
    began_s = time.monotonic()
    fleet = Fleet(plan, seed)
    sim = fleet.sim
    with fleet.running():
        if plan.past_versions:
            with steps(f"the past: one instance makes {plan.past_versions:,} versions") as tick:
                _past(fleet, tick)
        begin_s = sim.clock()
        end_s = begin_s + plan.busy_s
        fleet.collect(lambda: plan.gc_busy_s if sim.clock() < end_s + 2 * 3600.0 else plan.gc_idle_s)
        with steps(f"busy: {plan.instances:,} instances store an extent each {plan.every_s:g} s") as tick:
            for i in range(plan.instances):
                after_s = fleet.rng.uniform(0.0, plan.opening_s / 2) if plan.instances > 100 else 0.0
                fleet.add(f"i{i}", after_s).store_regularly(plan.every_s, end_s)
            sim.run_until(begin_s + plan.opening_s, every_s=10.0, tick=lambda: tick(0))
            window_s, before = sim.clock(), fleet.requests()
            first_version = fleet.history.tip.version
            _crashes(fleet, end_s)
            sim.run_until(end_s - plan.closing_s, every_s=10.0, tick=lambda: tick(0))
            busy, busy_s = fleet.requests() - before, sim.clock() - window_s
            versions = fleet.history.tip.version - first_version
            if plan.stalls:
                _stalls(fleet)
            sim.run_until(end_s, every_s=10.0, tick=lambda: tick(0))
        sim.run_until(end_s + min(300.0, plan.day_s / 10))  # what was under way comes to rest, the leader steps down
        idle_from_s, before = sim.clock(), fleet.requests()
        day_end_s = max(begin_s + plan.day_s, idle_from_s + 30.0)
        with steps(f"idle: the other {(day_end_s - idle_from_s) / 3600:.1f} hours") as tick:
            _stray(fleet, day_end_s - 60.0)
            sim.run_until(day_end_s, every_s=30.0, tick=lambda: tick(0))
            idle, idle_s = fleet.requests() - before, sim.clock() - idle_from_s
        visible_s = _visible(fleet, window_s, window_s + busy_s)
    with steps("cold open, and everything acknowledged looked for"):
        lost, without_bytes, acknowledged = _verify(fleet)
    prices, days = fleet.s3.prices, plan.instances / DAY_S
    return Result(
        lost=lost,
        without_bytes=without_bytes,
        acknowledged=acknowledged,
        verdicts=Counter(s.verdict.value for s in fleet.stored if s.verdict is not None),
        visible_s=visible_s,
        busy_dollars=busy.dollars(prices) / (days * busy_s),
        idle_dollars=idle.dollars(prices) / (days * idle_s),
        busy_gets_per_hour=busy.get / plan.instances / (busy_s / 3600),
        busy_versions_per_s=versions / busy_s,
        leaders=sum(1 for _, lead in fleet.history.leads if lead),
        counters=_counters(fleet),
        injected=Counter(fleet.s3.injected),
        failed=Counter(fleet.failed),
        errors=sum((i.errors for i in fleet.instances), Counter()),
        extents=fleet.history.tip.n_extents,
        collections=len(fleet.collections),
        removed=len(fleet.history.removed),
        deleted=sum(round_.objects["extent"] for round_ in fleet.collections),
        wall_s=time.monotonic() - began_s,
    )


def _past(fleet: Fleet, tick: Callable[[float], None]) -> None:
    """One instance alone, until the log is long. Half way a sleeper opens, and wakes when the fleet is busy: by then
    the versions it wants are deleted."""
    plan, sim = fleet.plan, fleet.sim
    alone = fleet.add("alone")
    alone.store_regularly(plan.every_s, 2 * plan.past_versions * plan.every_s)
    while fleet.history.tip.version < plan.past_versions // 2:
        sim.sleep(60.0)
        tick(0)
    if plan.stalls:
        fleet.add("sleeper")
        sim.sleep(60.0)
        asleep_s = plan.past_versions * plan.every_s - sim.clock() + plan.busy_s / 2
        sim.stall("sleeper", asleep_s)
    while fleet.history.tip.version < plan.past_versions:
        sim.sleep(60.0)
        tick(0)
    fleet.out |= {"alone", "sleeper"}
    sim.crash("alone")


def _crashes(fleet: Fleet, end_s: float) -> None:
    """Instances crash and are replaced: some at random, and the leader."""
    plan, sim = fleet.plan, fleet.sim
    left_s = end_s - plan.closing_s - sim.clock()

    def leader_fails() -> None:
        sim.sleep(left_s / 4)
        leader = fleet.leader()
        if leader is not None:
            fleet.replace(leader, plan.every_s, end_s)

    def others_crash() -> None:
        for _ in range(plan.crashes):
            sim.sleep(left_s / (plan.crashes + 1))
            fleet.replace(fleet.any_instance(), plan.every_s, end_s)

    if plan.leader_fails:
        sim.start(leader_fails, owner="trouble")
    sim.start(others_crash, owner="trouble")


def _stalls(fleet: Fleet) -> None:
    """The leader stands still for so long that another takes over, and wakes as a second one. Three others stand still
    past the grace, with whatever they were about to commit."""
    leader = fleet.leader()
    if leader is not None:
        fleet.sim.stall(leader.name, 20.0)
        fleet.out.add(leader.name)
    for _ in range(3):
        instance = fleet.any_instance()
        fleet.sim.stall(instance.name, 3 * 3600.0)
        fleet.out.add(instance.name)


def _stray(fleet: Fleet, until_s: float) -> None:
    def stray() -> None:
        while fleet.sim.clock() < until_s:
            fleet.sim.sleep(fleet.rng.expovariate(1 / fleet.plan.stray_s))
            fleet.any_instance().store_one()

    fleet.sim.start(stray, owner="stray")


def _visible(fleet: Fleet, from_s: float, to_s: float) -> np.ndarray:
    """Seconds from "commit asked" until published, for each extent stored in the window and each sampled replica."""
    sample = [i for i in fleet.instances if i.opened_s is not None and i.opened_s <= from_s and i.name not in fleet.out]
    sample = sample[:: max(1, len(sample) // fleet.plan.sampled)][: fleet.plan.sampled]
    rows = [
        (stored.asked_s, fleet.history.added[stored.record.name])
        for stored in fleet.stored
        if from_s <= stored.asked_s <= to_s and stored.record.name in fleet.history.added
    ]
    if not rows:
        return np.zeros(0)
    asked_s, versions = np.array(rows).T
    out = []
    for instance in sample:
        times_s, published = np.array(instance.replica.published).T
        at = np.searchsorted(published, versions)
        seen = at < len(published)
        out.append(times_s[at[seen]] - asked_s[seen])
    return np.concatenate(out) if out else np.zeros(0)


def _verify(fleet: Fleet) -> tuple[int, int, int]:
    """(lost, live extents without their bytes, acknowledged). Raises `Violation` if the cold open differs."""
    with Simulation(fleet.sim.seed) as sim:
        cold = SimulatedS3(sim)
        cold.adopt(fleet.s3)
        rng = sim.generator("cold")
        log = _log(sim, cold.client("cold"), _ulid(rng), rng, VirtualExecutor(sim, fleet.plan.settings.read_ahead))
        state = log.open()
        if state != fleet.history.tip:
            raise Violation(f"a cold open at version {state.version} is not what the versions say")
        live = {extent.record.name for extent in state.in_order()}
        held = [s for s in fleet.stored if s.verdict is Verdict.LIVE]
        lost = sum(1 for s in held if s.record.name not in live and s.record.name not in fleet.history.removed)
        without = sum(1 for name in live if f"{extent_prefix(SPACE_ID, name)}/zarr.json" not in cold.objects)
        return lost, without, sum(1 for s in fleet.stored if s.acknowledged_s is not None)


def _counters(fleet: Fleet) -> Counter[str]:
    out: Counter[str] = Counter()
    for instance in fleet.instances:
        counters = instance.follower.log.counters
        for name in ("polls", "commits", "creates", "lost", "unknown", "fenced", "checkpoints"):
            out[name] += getattr(counters, name)
        out["hand_overs"] += instance.follower.hand_overs.handed_over
    return out


def _log(
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


def _ulid(rng: random.Random) -> str:
    return str(ULID.from_bytes(rng.randbytes(16)))


def measure(steps: Steps, plan: Plan = DAY) -> list[Figure]:
    """The day, and what the sizes of fleet cost."""
    result = simulate(plan, steps)
    counted = result.counters
    steps.console.print(
        f"verdicts {dict(result.verdicts)}, errors {dict(result.errors)}, failed {dict(result.failed)}, "
        f"injected {dict(result.injected)}",
        markup=False,
    )
    return [
        Figure("simulate.lost", result.lost, "acknowledged extents", 0, "lower"),
        Figure("simulate.without_bytes", result.without_bytes, "live extents", 0, "lower"),
        Figure("simulate.visible_p99_s", _percentile(result.visible_s, 99), "s", 5, "lower"),
        Figure("simulate.dollars_per_instance_day_busy", result.busy_dollars, "$, index only", 0.20, "lower"),
        Figure("simulate.dollars_per_instance_day_idle", result.idle_dollars, "$, index only", 0.02, "lower"),
        Figure("simulate.visible_p50_s", _percentile(result.visible_s, 50), "s", None, "lower"),
        Figure("simulate.visible_max_s", _percentile(result.visible_s, 100), "s", None, "lower"),
        Figure("simulate.acknowledged", result.acknowledged, "extents", None, "higher"),
        Figure("simulate.void", result.verdicts["void"], "extents", None, "lower"),
        Figure("simulate.versions_per_s", result.busy_versions_per_s, "1/s, busy", None, "lower"),
        Figure("simulate.gets_per_instance_hour", result.busy_gets_per_hour, "GETs, busy", None, "lower"),
        Figure("simulate.leader_changes", result.leaders, "leaders", None, "lower"),
        Figure("simulate.hand_overs", counted["hand_overs"], "objects", None, "lower"),
        Figure("simulate.creates_lost", counted["lost"], "creates", None, "lower"),
        Figure("simulate.fenced", counted["fenced"], "restarts from a checkpoint", None, "lower"),
        Figure("simulate.checkpoints", counted["checkpoints"], "checkpoints", None, "lower"),
        Figure("simulate.evicted", result.removed, "extents", None, "lower"),
        Figure("simulate.objects_deleted", result.deleted, "objects of extents", None, "higher"),
        Figure("simulate.throttled", result.injected["throttled"], "503s", None, "lower"),
        Figure("simulate.polls", counted["polls"], "polls", None, "lower"),
        Figure("simulate.wall_s", result.wall_s, "s", None, "lower"),
    ]


def sizes(steps: Steps) -> None:
    """Print what fleets of other sizes see and pay while busy."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("writers", "versions/s", "creates lost", "visible p50 s", "visible p99 s", "$ per instance-day"):
        table.add_column(name, justify="right")
    for n in (1, 3, 10, 30, 100):
        quiet = replace(DAY, instances=n, past_versions=0, busy_s=900.0, day_s=900.0, crashes=0, leader_fails=False)
        r = simulate(replace(quiet, stalls=False, misbehaviour=Misbehaviour()), steps)
        table.add_row(
            str(n),
            f"{r.busy_versions_per_s:.2f}",
            f"{r.counters['lost'] / max(1, r.counters['creates']):.1%}",
            f"{_percentile(r.visible_s, 50):.2f}",
            f"{_percentile(r.visible_s, 99):.2f}",
            f"{r.busy_dollars:.3f}",
        )
    steps.console.print(table)


def _percentile(values: np.ndarray, q: float) -> float:
    return float(np.percentile(values, q)) if len(values) else 0.0


def main(json_path: Path | None = None) -> bool:
    """Measure, print the tables, write the JSON; whether every goal was met."""
    console = Console(highlight=False)
    steps = Steps(console)
    figures = measure(steps)
    sizes(steps)
    return report(figures, json_path, console=console)
