"""What `cachegen` promises beyond the suite: sizes, levels, and when it keeps a cell as it is."""

from __future__ import annotations

import numpy as np
import pytest

from lmcache_s3.codecs.arrays import raw_bytes
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.cachegen import LEVELS, QUANTISED, RAW, CachegenCodec
from lmcache_s3.codecs.dtypes import from_float32, to_float32
from lmcache_s3.codecs.header import HEADER_BYTES
from lmcache_s3.errors import Invalid
from lmcache_s3.testing.extents import random_bits

SPEC = CellSpec((2, 6, 256, 2, 64), "bfloat16")
FIRST = CellPosition(bytes(16), 0, 0, 0)
LATER = CellPosition(bytes(16), 256, 0, 0)


def mode(data: bytes) -> int:
    return data[HEADER_BYTES + 1]


def round_trip(codec: CachegenCodec, cell: np.ndarray, position: CellPosition, spec: CellSpec = SPEC) -> np.ndarray:
    out = np.empty_like(cell)
    codec.decode(codec.encode(cell, spec, position), spec, position, out)
    return out


def test_coarser_levels_are_smaller_and_less_exact() -> None:
    cell = random_bits(SPEC.shape, SPEC.kv_dtype, np.random.default_rng(0))
    sizes, errors = [], []
    for level in LEVELS:
        codec = CachegenCodec(level)
        sizes.append(8 * len(codec.encode(cell, SPEC, LATER)) / cell.size)
        off = to_float32(round_trip(codec, cell, LATER), "bfloat16") - to_float32(cell, "bfloat16")
        errors.append(float(np.sqrt((off**2).mean())))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert sizes[0] < 4
    assert sizes[1] < 2.8, "bits a value at the default level, of normally distributed values"
    assert sizes[2] < 2.2


def test_the_prompts_first_token_is_exact_and_only_that() -> None:
    cell = random_bits(SPEC.shape, SPEC.kv_dtype, np.random.default_rng(1))
    first, later = round_trip(CachegenCodec(), cell, FIRST), round_trip(CachegenCodec(), cell, LATER)
    assert (first[:, :, 0] == cell[:, :, 0]).all()
    assert (later[:, :, 0] != cell[:, :, 0]).any()


def test_the_sink_does_not_spoil_the_others() -> None:
    """The first token is often far off: it must not widen the other tokens' steps."""
    values = np.random.default_rng(2).standard_normal(SPEC.shape).astype(np.float32)
    quiet = from_float32(values, "bfloat16")
    values[:, :, 0] *= 1000
    loud = from_float32(values, "bfloat16")
    assert (
        round_trip(CachegenCodec(), quiet, FIRST)[:, :, 1:] == round_trip(CachegenCodec(), loud, FIRST)[:, :, 1:]
    ).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_kept_to_the_bit(value: float) -> None:
    values = np.ones(SPEC.shape, np.float32)
    values[1, 3, 7, 1, 5] = value
    cell = values.view(np.uint32).__rshift__(16).astype(np.uint16)
    assert mode(CachegenCodec().encode(cell, SPEC, LATER)) == RAW
    assert (round_trip(CachegenCodec(), cell, LATER) == cell).all()


def test_a_cell_that_would_not_shrink_is_kept() -> None:
    spec = CellSpec((2, 1, 1, 1, 1), "float8_e4m3fn")
    cell = random_bits(spec.shape, spec.kv_dtype, np.random.default_rng(3))
    data = CachegenCodec().encode(cell, spec, LATER)
    assert mode(data) == RAW
    assert len(data) == CachegenCodec().max_encoded_bytes(spec) == HEADER_BYTES + 12 + raw_bytes(spec)


def test_large_values_stay_finite() -> None:
    for kv_dtype in ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"):
        spec = CellSpec((2, 3, 64, 1, 32), kv_dtype)
        signs = np.random.default_rng(4).choice([-1e25, 1e25, 1e20, 0], spec.shape).astype(np.float32)
        cell = from_float32(signs, kv_dtype)
        data = CachegenCodec().encode(cell, spec, LATER)
        assert mode(data) == QUANTISED
        out = np.empty_like(cell)
        CachegenCodec().decode(data, spec, LATER, out)
        assert np.isfinite(to_float32(out, kv_dtype)).all()


def test_values_too_large_to_transform_are_kept() -> None:
    cell = from_float32(np.full(SPEC.shape, 3e38, np.float32), "bfloat16")
    assert mode(CachegenCodec().encode(cell, SPEC, LATER)) == RAW


def test_an_all_zero_cell_is_tiny_and_zero() -> None:
    cell = np.zeros(SPEC.shape, np.uint16)
    data = CachegenCodec().encode(cell, SPEC, LATER)
    assert len(data) < raw_bytes(SPEC) / 20
    assert (round_trip(CachegenCodec(), cell, LATER) == 0).all()


@pytest.mark.parametrize("level", ["", "best", "Medium", 3])
def test_unknown_levels_are_refused_by_name(level: object) -> None:
    with pytest.raises(Invalid, match="fine, medium, coarse"):
        CachegenCodec(level)  # type: ignore[arg-type]
