"""`lmcache-s3 bench simulate`: a fleet for a day, in virtual time: the real index code over a simulated S3.

A space with a past (one instance alone, more than 8,192 versions), then 1,000 instances that share it: a busy while in
which each stores an extent each 5 s, and the rest of the day idle. Settings are the defaults. The store answers with
S3's latencies, refuses some requests, loses answers, and carries out writes late or twice. Instances crash (the leader
too) and stall, one past the fence, others past the grace; a collector keeps a byte budget.

Every replica is held against the one true history while it runs; at the end a cold open, which shares nothing with the
run, must say the same, and name every extent that was acknowledged, or the collection that removed it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lmcache_s3.benchmarks.figures import Figure, report
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.testing.simulated_day import simulate
from lmcache_s3.testing.simulated_fleet import Plan
from lmcache_s3.testing.simulated_s3 import Misbehaviour

DAY = Plan()


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
