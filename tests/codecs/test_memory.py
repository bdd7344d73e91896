"""What coding takes is what codecs say it takes, whatever is in a cell: budgets count with it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.dtypes import from_float32
from lmcache_s3.testing.calibrations import encoder
from lmcache_s3.types import ITEM_BYTES, STORAGE_DTYPE, KVDtype

DTYPES: tuple[KVDtype, ...] = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")
SHAPES = [(2, 4, 256, 4, 64), (2, 1, 256, 8, 64), (1, 1, 64, 1, 576)]
POSITION = CellPosition(bytes(16), 512, 0, 0)


def bell(shape: tuple[int, ...], kv_dtype: KVDtype) -> np.ndarray:
    return from_float32(np.random.default_rng(1).standard_normal(shape).astype(np.float32), kv_dtype)


def spread(shape: tuple[int, ...], kv_dtype: KVDtype) -> np.ndarray:
    """Of all magnitudes: coded where they can be, but hardly smaller."""
    rng = np.random.default_rng(2)
    values = rng.standard_normal(shape) * np.exp(1.5 * rng.standard_normal(shape)) * 2
    return from_float32(values.astype(np.float32), kv_dtype)


def noise(shape: tuple[int, ...], kv_dtype: KVDtype) -> np.ndarray:
    """What no codec makes smaller."""
    bits = np.random.default_rng(3).integers(0, 256, (*shape[:-1], shape[-1] * ITEM_BYTES[kv_dtype]), np.uint8)
    return bits.view(STORAGE_DTYPE[kv_dtype])


def taken(action: Callable[[], object]) -> int:
    action()  # what is compiled is no cell's
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["fast", "torch", "safetensors", "lossless", "cachegen", "transform"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_coding_takes_no_more_memory_than_it_says(
    name: str, shape: tuple[int, int, int, int, int], kv_dtype: KVDtype
) -> None:
    """Of a cell cut out of a prompt's array, as callers have it."""
    if name == "torch":
        pytest.importorskip("torch", reason="needs torch")
    spec = CellSpec(shape, kv_dtype)
    codec = encoder(name, spec, POSITION)
    kv, layers, tokens, heads, channels = shape
    out = np.empty(shape, STORAGE_DTYPE[kv_dtype])
    for made in (bell, spread, noise):
        cell = made((kv, layers, 2 * tokens, heads, channels), kv_dtype)[:, :, tokens:]
        data = codec.encode(cell, spec, POSITION)
        most = max(codec.max_encoded_bytes(spec), codec.encode_memory_bytes(spec)) + 4096
        assert taken(lambda cell=cell: codec.encode(cell, spec, POSITION)) <= most, made.__name__  # type: ignore[misc]
        most = codec.decode_memory_bytes(spec, len(data)) + 4096
        assert taken(lambda data=data: codec.decode(data, spec, POSITION, out)) <= most, made.__name__  # type: ignore[misc]
