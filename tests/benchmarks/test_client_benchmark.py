"""`bench client`, small: the figures are there, and the ratios compare what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcache_s3.benchmarks import client
from lmcache_s3.benchmarks.transfer_raw import Spent


def test_a_ratio_above_one_means_that_we_are_faster() -> None:
    turns: client.Turns = {
        "ours": [Spent(1.0, 1.0, 10), Spent(2.0, 1.0, 10), Spent(1.0, 1.0, 10)],
        "obstore": [Spent(2.0, 1.0, 10), Spent(3.0, 1.0, 10), Spent(1.0, 1.0, 10)],
    }
    figure = client.over("get", turns, "obstore", 0.9)
    assert (figure.name, figure.value, figure.ok) == ("client.get_over_obstore", 1.5, True)


@pytest.mark.slow
@pytest.mark.s3
def test_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    client.main(path, total_bytes=32 << 20, small=20, rounds=1)
    figures = {figure["name"]: figure["value"] for figure in json.loads(path.read_text())["figures"]}
    for name in ("put_8mib", "get_8mib", "put_32mib", "get_32mib"):
        assert figures[f"client.{name}_over_obstore"] > 0
        assert figures[f"client.{name}_ours_cpu_s_per_gb"] > 0
    assert figures["client.get_8mib_busy_over_obstore"] > 0
    assert figures["client.get_1kib_boto3_cpu_ms"] > 0
