"""The benchmark of the codecs runs, on one prompt, and names its figures as it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcache_s3.benchmarks import codecs


@pytest.mark.slow
def test_it_measures_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    codecs.main(path, mutations=2000, prompts=1)
    figures = {figure["name"]: figure for figure in json.loads(path.read_text())["figures"]}
    for name in ("lossless_ratio", "lossless_vs_best", "fuzz_untyped"):
        assert figures[f"codec.{name}"]["ok"]
    goals = {"fast_vs_memcpy", "lossless_decode_vs_fastest", "cachegen_encode_mbps", "cachegen_decode_mbps"}
    assert all(figures[f"codec.{name}"]["goal"] is not None for name in goals)
