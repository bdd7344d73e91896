"""Conversions of stored bits: exact one way, to nearest and saturating the other."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from lmcache_s3.codecs.dtypes import LARGEST, TRUE_DTYPE, from_float32, to_float32
from lmcache_s3.types import ITEM_BYTES, STORAGE_DTYPE

SMALL = [name for name in TRUE_DTYPE if ITEM_BYTES[name] <= 2]


@pytest.mark.parametrize("kv_dtype", SMALL)
def test_every_bit_pattern_there_and_back(kv_dtype: str) -> None:
    bits = np.arange(2 ** (8 * ITEM_BYTES[kv_dtype]), dtype=f"u{ITEM_BYTES[kv_dtype]}").view(STORAGE_DTYPE[kv_dtype])
    values = to_float32(bits, kv_dtype)
    expected = bits.view(TRUE_DTYPE[kv_dtype]).astype(np.float32)
    assert np.array_equal(values, expected, equal_nan=True)
    finite = np.isfinite(values)
    back = from_float32(values, kv_dtype)
    assert back.dtype == bits.dtype
    assert (back[finite].view(f"u{ITEM_BYTES[kv_dtype]}") == bits[finite].view(f"u{ITEM_BYTES[kv_dtype]}")).all()
    assert np.isnan(to_float32(back, kv_dtype)[np.isnan(values)]).all()


@pytest.mark.parametrize("kv_dtype", list(TRUE_DTYPE))
def test_nothing_finite_becomes_infinite(kv_dtype: str) -> None:
    values = np.array([3e38, -3e38, 1e5, -70000, 500, 0], np.float32)
    limit = LARGEST[kv_dtype]
    got = to_float32(from_float32(values, kv_dtype), kv_dtype)
    assert np.isfinite(got).all()
    assert (got[np.abs(values) >= limit] == np.sign(values[np.abs(values) >= limit]) * limit).all()


def test_ties_go_to_even() -> None:
    one, tiny = np.float32(1), np.float32(2**-8)
    values = np.array([one + tiny, one + 3 * tiny, -one - tiny], np.float32)
    assert from_float32(values, "bfloat16").tolist() == [0x3F80, 0x3F82, 0xBF80]


def test_strided_input_is_read_as_it_lies() -> None:
    bits = np.arange(64, dtype=np.uint16).reshape(8, 8)[::2, 1::3]
    assert (to_float32(bits, "bfloat16") == bits.copy().view(ml_dtypes.bfloat16).astype(np.float32)).all()
