"""Seeded mutations of stored cells, with right and wrong checksums: `Unusable` or a whole array, nothing else.

A failure prints codec, seed and round.
"""

from __future__ import annotations

import tracemalloc
from typing import get_args

import numpy as np
import pytest

from lmcache_s3.codecs.base import CellSpec
from lmcache_s3.codecs.header import HEADER_BYTES
from lmcache_s3.codecs.registry import CODEC_IDS
from lmcache_s3.testing.calibrations import encoder
from lmcache_s3.testing.extents import random_bits
from lmcache_s3.testing.fuzz import POSITION, SHAPE, count_untyped, fuzz
from lmcache_s3.types import KVDtype

QUICK = {"fast": 6000, "torch": 3000, "safetensors": 5000, "lossless": 6000, "cachegen": 6000, "transform": 6000}
SLOW_FACTOR = 12


@pytest.mark.parametrize("codec_id", CODEC_IDS)
def test_changed_cells_are_unusable_or_whole(codec_id: str) -> None:
    fuzz(codec_id, QUICK[codec_id], seed=1)


@pytest.mark.parametrize("codec_id", ["lossless", "cachegen", "transform"])
def test_what_is_changed_is_coded_and_not_raw(codec_id: str) -> None:
    for kv_dtype in get_args(KVDtype):
        spec = CellSpec(SHAPE, kv_dtype)
        cell = random_bits(SHAPE, kv_dtype, np.random.default_rng(0))
        assert encoder(codec_id, spec, POSITION).encode(cell, spec, POSITION)[HEADER_BYTES + 1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("codec_id", CODEC_IDS)
def test_of_every_dtype(codec_id: str) -> None:
    assert count_untyped(codec_id, 1000, seed=0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 2 + SLOW_FACTOR))
@pytest.mark.parametrize("codec_id", CODEC_IDS)
def test_many_more_changed_cells(codec_id: str, seed: int) -> None:
    fuzz(codec_id, QUICK[codec_id], seed)


@pytest.mark.parametrize("codec_id", CODEC_IDS)
def test_decoding_lies_takes_no_memory_to_speak_of(codec_id: str) -> None:
    """Sizes are checked before memory is allocated: a cell of a kilobyte cannot make its reader take a megabyte."""
    fuzz(codec_id, 50, seed=0)  # whatever is imported and compiled once
    tracemalloc.start()
    try:
        fuzz(codec_id, 600, seed=99)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
