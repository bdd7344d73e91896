"""The calibration that speed is measured with takes about the bits that were asked for, and its cells come back."""

from __future__ import annotations

import numpy as np
import pytest

from lmcache_s3.benchmarks.transform_speed import layerwise_codec, rotary_turns
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.dtypes import to_float32
from lmcache_s3.testing.extents import random_bits


@pytest.mark.parametrize("bits", [1.0, 2.0])
def test_it_takes_about_the_bits_asked_for(bits: float) -> None:
    shape = (2, 3, 512, 2, 32)
    kv = random_bits(shape, "bfloat16", np.random.default_rng(0))
    codec = layerwise_codec([kv], rotary_turns(10_000.0, 32), bits)
    cell, spec = kv[:, :, 256:], CellSpec((2, 3, 256, 2, 32), "bfloat16")
    data = codec.encode(cell, spec, CellPosition(bytes(16), 256, 0, 0))
    assert 8 * len(data) / cell.size == pytest.approx(bits, rel=0.2)
    out = np.empty(spec.shape, np.uint16)
    codec.decode(data, spec, None, out)
    wanted, got = to_float32(cell, "bfloat16"), to_float32(out, "bfloat16")
    spread = wanted - wanted.mean(axis=2, keepdims=True)
    assert ((got - wanted) ** 2).mean() < (spread**2).mean() / 2
