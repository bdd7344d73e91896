"""The benchmark of the index runs, at a hundredth of its size, and names its figures as it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcache_s3.benchmarks import index


@pytest.mark.slow
def test_it_measures_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    index.main(path, entries=64_000, versions=5)
    figures = {figure["name"]: figure for figure in json.loads(path.read_text())["figures"]}
    assert figures["index.lookup_requests"]["value"] == 0
    assert figures["index.stored_bytes_per_entry"]["ok"]
    assert figures["index.memory_bytes_per_entry"]["ok"]
    goals = {"hash_128k_tokens_ms", "lookup_64_ms", "lookup_512_of_10m_ms", "cold_open_10m_s", "apply_entries_per_s"}
    assert all(figures[f"index.{name}"]["goal"] is not None for name in goals)
