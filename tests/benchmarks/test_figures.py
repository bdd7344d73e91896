"""Figures: a goal is met or missed, and the JSON is what programs were promised."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lmcache_s3.benchmarks.figures import Figure, report
from lmcache_s3.errors import Invalid


@pytest.mark.parametrize(
    ("value", "goal", "better", "ok"),
    [(8, 8, "higher", True), (7.9, 8, "higher", False), (3, 3, "lower", True), (3.1, 3, "lower", False),
     (99, None, "lower", True)],
)  # fmt: skip
def test_goals(value: float, goal: float | None, better: Any, ok: bool) -> None:
    assert Figure("f", value, "s", goal, better).ok is ok


def test_table_and_json(tmp_path: Path) -> None:
    figures = [
        Figure("e2e.ttft_speedup", 9.5, "×", 8, "higher"),
        Figure("e2e.store_puts_per_4096_tokens", 4, "PUTs", 3, "lower"),
        Figure("e2e.ttft_cold", 12.25, "s", None, "lower"),
    ]
    out = io.StringIO()
    assert report(figures, tmp_path / "f.json", console=Console(file=out, width=120)) is False
    assert report(figures[:1], console=Console(file=out)) is True
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[1] == ["e2e.ttft_speedup", "9.5", "≥", "8", "×", "ok"]
    assert lines[2] == ["e2e.store_puts_per_4096_tokens", "4", "≤", "3", "PUTs", "missed"]
    document = json.loads((tmp_path / "f.json").read_bytes())
    assert set(document) == {"figures", "machine", "version"}
    assert document["figures"][1] == {
        "name": "e2e.store_puts_per_4096_tokens", "value": 4, "unit": "PUTs", "goal": 3, "better": "lower", "ok": False,
    }  # fmt: skip
    assert document["figures"][2]["goal"] is None
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["memory_bytes"] > 1 << 20


def test_figures_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no measurement"):
        Figure("f", float("nan"), "s", 1, "lower")
    with pytest.raises(Invalid, match="neither lower nor higher"):
        Figure("f", 1, "s", 1, "bigger")  # type: ignore[arg-type]
    figure = Figure("f", 1, "s", 1, "lower")
    with pytest.raises(Invalid, match="a name twice"):
        report([figure, figure])
    with pytest.raises(Invalid, match="cannot be written"):
        report([figure], tmp_path / "none" / "f.json", console=Console(file=io.StringIO()))
