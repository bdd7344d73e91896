"""Figures: what a benchmark measured, against its goal, as a table for people and JSON for programs.

`{"figures": [{"name", "value", "unit", "goal", "better", "ok"}], "machine": {…}, "version"}`. A figure without a goal
has `goal: null` and is always ok. Raises `Invalid` for figures that make no sense (a name twice, a value that is no
number) and for a path that cannot be written.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from lmcache_s3.errors import Invalid
from lmcache_s3.extent import package_version


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number. better: which side of the goal is good; meeting the goal exactly is good."""

    name: str
    value: float
    unit: str
    goal: float | None
    better: Literal["lower", "higher"]

    def __post_init__(self) -> None:
        if self.better not in ("lower", "higher"):
            raise Invalid(f"figure {self.name}: better is {self.better!r}, neither lower nor higher", kind="argument")
        for number in (self.value, self.goal):
            if number is not None and not math.isfinite(number):
                raise Invalid(f"figure {self.name}: {number} is no measurement", kind="argument")

    @property
    def ok(self) -> bool:
        if self.goal is None:
            return True
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores this process may use, memory, system, Python."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": pages * page_bytes,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def document(figures: Sequence[Figure], gpu: str | None = None) -> dict[str, Any]:
    """The JSON document of these figures. gpu: the name of the one they were measured on."""
    names = [f.name for f in figures]
    if len(set(names)) != len(names):
        raise Invalid(f"figures: a name twice in {', '.join(names)}", kind="argument")
    return {
        "figures": [asdict(f) | {"ok": f.ok} for f in figures],
        "machine": machine() | ({} if gpu is None else {"gpu": gpu}),
        "version": package_version(),
    }


def report(
    figures: Sequence[Figure],
    json_path: Path | None = None,
    *,
    console: Console | None = None,
    gpu: str | None = None,
) -> bool:
    """Print the table, write the JSON if asked to; whether every figure met its goal."""
    written = document(figures, gpu)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("figure")
    for name in ("value", "goal", "unit", ""):
        table.add_column(name, justify="right" if name in ("value", "goal") else "left")
    for f in figures:
        sign = "≤" if f.better == "lower" else "≥"
        goal = "–" if f.goal is None else f"{sign} {f.goal:g}"
        mark = "" if f.goal is None else "[green]ok[/green]" if f.ok else "[red]missed[/red]"
        table.add_row(f.name, f"{f.value:.4g}", goal, f.unit, mark)
    (console or Console(highlight=False)).print(table)
    if json_path is not None:
        try:
            json_path.write_text(json.dumps(written, indent=2) + "\n", "utf-8")
        except OSError as e:
            raise Invalid(f"{json_path}: cannot be written ({e.strerror})", kind="argument") from e
    return all(f.ok for f in figures)
