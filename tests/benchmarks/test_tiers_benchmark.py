"""`bench tiers`, in small: all figures are there, and those that depend on no clock meet their goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcache_s3.benchmarks import tiers, tiers_disk


def test_all_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in [
        (tiers, "CELL_BYTES", 1 << 14),
        (tiers, "_ROUNDS", 1),
        (tiers, "_DRIFT_STEPS", 1_000),
        (tiers_disk, "_ROUNDS", 1),
        (tiers_disk, "_OPENS", 1),
        (tiers_disk, "_FILES", 40),
    ]:
        monkeypatch.setattr(module, name, value)
    tiers.main(tmp_path / "figures.json", cells=500, rounds=1)
    figures = {one["name"]: one for one in json.loads((tmp_path / "figures.json").read_text())["figures"]}
    goals = {name: one["goal"] for name, one in figures.items() if one["goal"] is not None}
    assert goals == {
        "tiers.host_get_vs_memcpy": 0.8,
        "tiers.host_mapped_over_budget": 0,
        "tiers.disk_get_vs_raw": 0.8,
        "tiers.disk_reopen_100k_s": 1.0,
        "tiers.disk_lost_at_kill": 0,
    }
    assert figures["tiers.disk_lost_at_kill"]["ok"]
    assert figures["tiers.host_mapped_over_budget"]["ok"]
    assert figures["tiers.host_used_share_under_drift"]["value"] > 0.8
