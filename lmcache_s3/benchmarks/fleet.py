"""`lmcache-s3 bench fleet`: writers, readers and collectors as processes over Ceph with two gateways.

1. 64 writers, each 100 chunks of 4 KiB a second as extents of 64 chunks, really uploaded, for a minute; polls each
   second, hand-overs each half second. Every extent is looked for in another instance until it is hit there; then
   another process opens the index cold, reads every cell and compares it with what was stored.
2. The same with 50 ms added to every request.
3. Ten minutes of collection at its most eager: grace of seconds, room for a few extents, two collectors without a
   pause, writers that commit after the grace and whole processes that stand still past it, at any step. What the index
   names must exist: a look at the bytes of every live extent, again and again.
4. The interleavings that must catch every mutant of the protocol.

All on one machine: gateways, cluster, writers and readers share its cores. So in 1 and 2 the writers' requests go
through a client that costs little (`testing.lean_store`), and the writers of a process decode a version once; what
reads everything back goes through our own store, as do 3's.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import secrets
import signal
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lmcache_s3.benchmarks import fleet_worker
from lmcache_s3.benchmarks.figures import Figure, report
from lmcache_s3.benchmarks.fleet_worker import Collected, Done, Load, Looked, Where
from lmcache_s3.benchmarks.steps import Steps, Tick
from lmcache_s3.index.service import IndexSettings
from lmcache_s3.testing.mutants import missed
from lmcache_s3.testing.servers import CephRGW

BUCKET = "lmcache-fleet"
CHUNKS = 64
CHUNKS_PER_S = 100.0
SLOW_S = 0.05
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 26), "MALLOC_TRIM_THRESHOLD_": str(1 << 28), "MALLOC_ARENA_MAX": "4"}
"""For glibc in the writers' processes: fresh pages cost more than what is written to them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """processes: of writers, half on each gateway. store_s: how long they store, after `warm_up_s` in which the fleet
    finds its leader: stored and read back like the rest, but timed apart. collect_s: of the collection."""

    writers: int = 64
    processes: int = 4
    warm_up_s: float = 10.0
    store_s: float = 60.0
    collect_s: float = 600.0
    grace_s: float = 3.0
    settings: IndexSettings = IndexSettings(poll_s=1.0, hand_over_s=0.5, single_writer=True)  # noqa: RUF009
    seed: int = 4


FULL = Plan()


@dataclass(slots=True)
class Result:
    """wrong: what was acknowledged and cannot be read. visible_s: of every extent that was hit elsewhere;
    start_visible_s: of those stored while warming up."""

    stored: int
    acknowledged: int
    wrong: list[str]
    unseen: int
    visible_s: np.ndarray
    start_visible_s: np.ndarray
    commit_s: np.ndarray
    index_puts: int
    verdicts: Counter[str]
    errors: Counter[str]
    requests: Counter[str]
    behind_s: float
    cpu_s: float

    @property
    def puts_per_1000_chunks(self) -> float:
        return 1000 * self.index_puts / max(1, self.stored * CHUNKS)


class Fleet:
    """A cluster, and runs on it, each in a place of its own."""

    def __init__(self, server: CephRGW, plan: Plan) -> None:
        self.server, self.plan = server, plan
        self._processes = multiprocessing.get_context("spawn")
        server.make_bucket(BUCKET)
        os.environ.update(server.env())  # the processes' credentials
        os.environ.update(_KEEP_MEMORY)

    def places(self, *, slow_s: float = 0.0, lean: bool = False) -> list[Where]:
        """One run's bucket and prefix, through each gateway."""
        url = f"s3://{BUCKET}/{secrets.token_hex(4)}"
        return [Where(url, endpoint, slow_s, lean) for endpoint in self.server.endpoint_urls]

    def store(self, tick: Tick, slow_s: float = 0.0) -> Result:
        """All writers store; then everything is read back."""
        plan, places, run = self.plan, self.places(slow_s=slow_s, lean=True), secrets.token_hex(8)
        every_s = CHUNKS / CHUNKS_PER_S
        begin_s = time.monotonic() + 8.0 + 0.12 * plan.writers + 40 * slow_s
        groups = [tuple(range(i, plan.writers, plan.processes)) for i in range(plan.processes)]
        with ProcessPoolExecutor(plan.processes, mp_context=self._processes) as pool:
            futures = [
                pool.submit(
                    fleet_worker.work,
                    places[i % 2],
                    Load(
                        run=run,
                        writers=writers,
                        watched=groups[(i + 1) % plan.processes] if plan.processes > 1 else writers,
                        chunks=CHUNKS,
                        every_s=every_s,
                        begin_s=begin_s,
                        end_s=begin_s + plan.warm_up_s + plan.store_s,
                        settings=plan.settings,
                        seed=plan.seed,
                    ),
                )
                for i, writers in enumerate(groups)
            ]
            while wait(futures, timeout=0.5).not_done:
                tick(0)
            done = [future.result() for future in futures]
            names = {key: name for one in done for key, name in one.names.items()}
            verifying = pool.submit(
                fleet_worker.read_back, replace(places[1], slow_s=0.0, lean=False), run, CHUNKS, names
            )
            while wait([verifying], timeout=0.5).not_done:
                tick(0)
            return _result(done, verifying.result(), begin_s + plan.warm_up_s)

    def collect(self, tick: Tick) -> tuple[Looked, list[Collected], list[Done]]:
        """Collectors, writers and readers of one small cache; writers' processes stand still now and then."""
        plan, places, run = self.plan, self.places(), secrets.token_hex(8)
        rng = random.Random(plan.seed)
        begin_s = time.monotonic() + 8.0
        end_s = begin_s + plan.collect_s
        milestone = 64
        with ProcessPoolExecutor(plan.processes + 3, mp_context=self._processes) as pool:
            writing = [
                pool.submit(
                    fleet_worker.work,
                    places[i % 2],
                    Load(
                        run=run,
                        writers=(2 * i, 2 * i + 1),
                        watched=(),
                        chunks=4,
                        every_s=0.5,
                        begin_s=begin_s,
                        end_s=end_s,
                        settings=plan.settings,
                        seed=plan.seed,
                        stall=0.1,
                        stall_s=2 * plan.grace_s,
                        milestone=milestone,
                    ),
                )
                for i in range(plan.processes)
            ]
            collecting = [
                pool.submit(fleet_worker.collect, places[i], plan.grace_s, 40, milestone, end_s) for i in range(2)
            ]
            looking = pool.submit(fleet_worker.look, places[0], milestone, end_s)
            children = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
            others: list[Future[Any]] = [*collecting, looking]
            while time.monotonic() < end_s and not any(f.done() for f in others):
                time.sleep(rng.uniform(0.5, 2.0))
                tick(0)
                if time.monotonic() > begin_s + 2:
                    _stand_still(rng.choice(children), rng.uniform(0.5, 2.5) * plan.grace_s, tick)
            return looking.result(), [f.result() for f in collecting], [f.result() for f in writing]


def _stand_still(pid: int, seconds: float, tick: Tick) -> None:
    """Stop a process wherever it is, for a while: a writer, a collector, or who looks."""
    os.kill(pid, signal.SIGSTOP)
    try:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            time.sleep(0.1)
            tick(0)
    finally:
        os.kill(pid, signal.SIGCONT)


def _result(done: Sequence[Done], wrong: list[str], from_s: float) -> Result:
    asked = {key: at_s for one in done for key, at_s in one.asked_s.items()}
    answered = {key: at_s for one in done for key, at_s in one.acknowledged_s.items()}
    names = {key for one in done for key in one.names}
    seen = {key: at_s for one in done for key, at_s in one.seen_s.items()}
    requests = sum((one.requests for one in done), Counter[str]())
    return Result(
        stored=len(asked),
        acknowledged=len(answered),
        wrong=wrong,
        unseen=len(names - seen.keys()),
        visible_s=np.array([seen[key] - at_s for key, at_s in asked.items() if key in seen and at_s >= from_s]),
        start_visible_s=np.array([seen[key] - at_s for key, at_s in asked.items() if key in seen and at_s < from_s]),
        commit_s=np.array([answered[key] - asked[key] for key in answered]),
        index_puts=requests["put"] + requests["create"],
        verdicts=sum((one.verdicts for one in done), Counter[str]()),
        errors=sum((one.errors for one in done), Counter[str]()),
        requests=requests,
        behind_s=max(one.behind_s for one in done),
        cpu_s=sum(one.cpu_s for one in done),
    )


def _percentile(values: np.ndarray, q: float) -> float:
    """A day where nothing was seen, which misses every goal."""
    return float(np.percentile(values, q)) if len(values) else 86_400.0


def figures_of(name: str, r: Result, visible_goal_s: float, puts_goal: float | None) -> list[Figure]:
    """name: with what its figures begin."""
    lost = len(r.wrong) + r.stored - r.acknowledged + r.verdicts["void"]
    return [
        Figure(f"{name}lost", lost, "extents", 0, "lower"),
        Figure(f"{name}visible_p99_s", _percentile(r.visible_s, 99), "s", visible_goal_s, "lower"),
        Figure(f"{name}puts_per_1000_chunks", r.puts_per_1000_chunks, "PUTs, index only", puts_goal, "lower"),
        Figure(f"{name}unseen", r.unseen, "extents never hit elsewhere", 0, "lower"),
        Figure(f"{name}visible_p50_s", _percentile(r.visible_s, 50), "s", None, "lower"),
        Figure(f"{name}start_visible_p99_s", _percentile(r.start_visible_s, 99), "s, first seconds", None, "lower"),
        Figure(f"{name}commit_p99_s", _percentile(r.commit_s, 99), "s", None, "lower"),
        Figure(f"{name}extents", r.stored, "extents", None, "higher"),
        Figure(f"{name}behind_s", r.behind_s, "s, latest start of a store", None, "lower"),
        Figure(f"{name}client_cpu_s", r.cpu_s, "s", None, "lower"),
    ]


def measure(steps: Steps, plan: Plan = FULL) -> list[Figure]:
    """Run it all."""
    figures: list[Figure] = []
    with ExitStack() as stack:
        with steps("starting Ceph: a cluster of one machine, two gateways"):
            fleet = Fleet(stack.enter_context(CephRGW(capacity_bytes=8 << 30)), plan)
        with steps(f"{plan.writers} writers store for {plan.store_s:g} s, then everything is read back") as tick:
            plain = fleet.store(tick)
        _tell(steps, plain)
        figures += figures_of("fleet.", plain, 3, 22)
        with steps(f"the same with {SLOW_S * 1000:g} ms added to every request") as tick:
            slow = fleet.store(tick, SLOW_S)
        _tell(steps, slow)
        figures += figures_of("fleet.slow_", slow, 5, None)
        with steps(f"{plan.collect_s:g} s of collection at its most eager") as tick:
            looked, collected, done = fleet.collect(tick)
        figures += collection_figures(looked, collected, done, steps)
    with steps("mutants of the protocol"):
        names = missed()
        for name in names:
            steps.console.print(f"[red]missed:[/red] {name}")
    figures.append(Figure("fleet.mutants_missed", len(names), "mutants", 0, "lower"))
    return figures


def collection_figures(
    looked: Looked, collected: Sequence[Collected], done: Sequence[Done], steps: Steps
) -> list[Figure]:
    for line in looked.gone:
        steps.console.print(f"[red]deleted live:[/red] {line}", markup=True)
    verdicts = sum((one.verdicts for one in done), Counter[str]())
    steps.console.print(f"verdicts {dict(verdicts)}, errors {dict(sum((c.errors for c in collected), Counter[str]()))}")
    return [
        Figure("fleet.gc_deleted_live", len(looked.gone), "objects of live extents", 0, "lower"),
        Figure("fleet.gc_looks", looked.looks, "objects looked at", 1, "higher"),
        Figure("fleet.gc_rounds", sum(c.rounds for c in collected), "rounds", 1, "higher"),
        Figure("fleet.gc_objects_deleted", sum(c.deleted for c in collected), "objects", 1, "higher"),
        Figure("fleet.gc_versions_deleted", sum(c.versions for c in collected), "versions", 1, "higher"),
        Figure("fleet.gc_void", verdicts["void"], "extents", 1, "higher"),
        Figure("fleet.gc_live", verdicts["live"], "extents", 1, "higher"),
    ]


def _tell(steps: Steps, r: Result) -> None:
    for line in r.wrong[:20]:
        steps.console.print(f"[red]lost:[/red] {line}")
    steps.console.print(
        f"{r.stored} extents, verdicts {dict(r.verdicts)}, index requests {dict(r.requests)}, errors {dict(r.errors)}",
        markup=False,
    )


def main(json_path: Path | None = None) -> bool:
    """Measure, print the table, write the JSON; whether every goal was met."""
    console = Console(highlight=False)
    figures = measure(Steps(console))
    return report(figures, json_path, console=console)
