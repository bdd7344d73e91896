"""A simulated fleet's day: a past, a busy while with everything that goes wrong, idle hours, and what it all came to.

`simulate` is deterministic in plan and seed. Every replica is held against the one true history while it runs; at the
end a cold open, which shares nothing with the run, must say the same, and name every extent that was acknowledged, or
the collection that removed it. Raises `Violation` where a state is not what the versions say; what was lost is counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from lmcache_s3.index.manifest import Verdict
from lmcache_s3.testing.shared_history import Violation
from lmcache_s3.testing.simulated_fleet import DAY_S, SEED, SPACE_ID, Fleet, Plan, new_log, new_ulid
from lmcache_s3.testing.simulated_s3 import SimulatedS3
from lmcache_s3.testing.virtual import Simulation, VirtualExecutor
from lmcache_s3.types import extent_prefix

Steps = Callable[[str], AbstractContextManager[Callable[[float], None]]]
"""Shows progress: `with steps("what is done") as tick`, then `tick(seconds)` now and then."""


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
        log = new_log(
            sim, cold.client("cold"), new_ulid(rng), rng, VirtualExecutor(sim, fleet.plan.settings.read_ahead)
        )
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
