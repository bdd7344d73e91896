"""The benchmark of the codecs runs, on one prompt, and names its figures as it should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lmcache_s3.benchmarks import codecs
from lmcache_s3.benchmarks.shannon import shannon_gap
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.testing.extents import random_bits


@pytest.mark.slow
def test_it_measures_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    codecs.main(path, mutations=2000, prompts=1)
    figures = {figure["name"]: figure for figure in json.loads(path.read_text())["figures"]}
    for name in ("lossless_ratio", "lossless_vs_best", "fuzz_untyped"):
        assert figures[f"codec.{name}"]["ok"]
    goals = {"fast_vs_memcpy", "lossless_decode_vs_fastest", "cachegen_encode_mbps", "cachegen_decode_mbps"}
    assert all(figures[f"codec.{name}"]["goal"] is not None for name in goals)


def test_cells_come_near_what_their_tables_promise() -> None:
    spec = CellSpec((2, 2, 256, 2, 64), "bfloat16")
    cell = random_bits(spec.shape, spec.kv_dtype, np.random.default_rng(0))
    stored = make_codec("cachegen").encode(cell, spec, CellPosition(bytes(16), 0, 0, 0))
    assert 1 < shannon_gap([stored], spec) < 1.02
    # What is stored beside the words counts: twice a row's states, lengths and bases weigh more in half the tokens.
    short = CellSpec((2, 2, 32, 2, 64), "bfloat16")
    beginning = make_codec("cachegen").encode(cell[:, :, :32].copy(), short, CellPosition(bytes(16), 0, 0, 0))
    assert shannon_gap([beginning], short) > shannon_gap([stored], spec)
