"""`bench policy` and `replay`, on a small trace of their own: the figures are there, with their goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lmcache_s3.benchmarks import policy
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.cli.main import app
from lmcache_s3.cli.replay import parse_tiers
from lmcache_s3.errors import Invalid
from lmcache_s3.replay.run import TierPlan
from lmcache_s3.replay.trace import read_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two chats of two turns; each turn comes a minute after the last."""
    lines = []
    for i, ids in enumerate(([0, 1, 2], [0, 3, 4], [0, 1, 2, 5], [0, 3, 4, 6, 7])):
        request = {"timestamp": 60_000 * i, "input_length": 512 * len(ids), "output_length": 5, "hash_ids": ids}
        lines.append(json.dumps(request))
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_every_figure_of_the_goals_is_measured(trace: Path) -> None:
    pytest.importorskip("libcachesim")
    with Path("/dev/null").open("w") as nowhere:
        figures = policy.measure(Steps(Console(file=nowhere)), read_trace(trace))
    goals = {figure.name: figure.goal for figure in figures if figure.goal is not None}
    assert goals == {
        "policy.gap_closed_1m": 0.22,
        "policy.gap_closed_4m": 0.15,
        "policy.gap_closed_16m": 0.0,
        "policy.puts_vs_no_write_behind": 0.3,
    }
    values = {figure.name: figure.value for figure in figures}
    assert values["policy.hit_rate_1m_lru"] == pytest.approx(7 / 15)


def test_replay_prints_json_and_a_table_and_draws(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "hits.svg"
    tiers = ["--tiers", "host=1MB,object", "--bytes-per-token", "100"]
    done = CliRunner().invoke(app, ["replay", str(trace), *tiers, "--json", "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["policy"] for row in found["policies"]] == ["hazard", "lru"]
    assert found["input_tokens"] == 15 * 512
    assert all(row["hit_rate"] == pytest.approx(7 / 15) for row in found["policies"])
    assert plot.read_text("utf-8").startswith("<?xml")
    done = CliRunner().invoke(app, ["replay", str(trace), *tiers, "--policy", "belady"])
    assert done.exit_code == 0, done.output
    assert "belady" in done.stdout
    assert f"requests of {15 * 512} prompt tokens in" in done.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--policy", "lru", "--policy", "clever"], "'clever' is no policy"),
        (["--tiers", "host=40,object"], "tier host: 40 bytes hold no chunk of 64.0 MiB"),
        (["--plot", "hits"], "hits: write a file name that ends in .svg, .png or .pdf"),
        (["--plot", "/none/hits.svg"], "/none/hits.svg: there is no directory /none"),
    ],
)
def test_what_a_replay_is_asked_wrongly_is_said_before_it_runs(trace: Path, options: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["replay", str(trace), *options])
    assert done.exit_code == 2
    assert says in done.stderr


def test_tiers_are_written_as_the_help_says() -> None:
    assert parse_tiers("host=40GB, disk=1TB,object") == [
        TierPlan("host", 40 * 10**9),
        TierPlan("disk", 10**12),
        TierPlan("object", None),
    ]
    for wrong in ("", "host", "object,host=1GB", "object=1GB", "host=1GB,host=2GB", "host=big"):
        with pytest.raises(Invalid):
            parse_tiers(wrong)
