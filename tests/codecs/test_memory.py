"""What encoding takes is what codecs say it takes: budgets count with it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.types import Geometry, Grid


@pytest.mark.parametrize("name", ["fast", "lossless", "cachegen", "safetensors"])
def test_encoding_takes_no_more_memory_than_it_says(name: str) -> None:
    """Of a cell of usual size, cut out of a prompt's array, as callers have it."""
    spec = CellSpec.of(Geometry(2, 4, 4, 64, "bfloat16", 256), Grid())
    kv = np.random.default_rng(1).standard_normal((2, 4, 512, 4, 64)).astype(np.float32)
    cell = (kv.view(np.uint32) >> 16).astype(np.uint16)[:, :, 256:]
    codec, position = make_codec(name), CellPosition(bytes(16), 512, 0, 0)
    codec.encode(cell, spec, position)  # what is compiled is no cell's
    tracemalloc.start()
    try:
        codec.encode(cell, spec, position)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    most = max(codec.max_encoded_bytes(spec), codec.encode_memory * cell.nbytes)
    assert peak_bytes <= most + 65_536
