"""Conversions of small floating-point numbers, in both tiles, against ml_dtypes: every number, and those between."""

from __future__ import annotations

import numpy as np
import pytest

from lmcache_s3.codecs.dtypes import from_float32, to_float32
from lmcache_s3.kernels import cachegen_tiles_scalar, cachegen_tiles_wide
from lmcache_s3.kernels.float_forms import FORMS
from lmcache_s3.kernels.vectors import WIDE

TILES = [cachegen_tiles_scalar, *([cachegen_tiles_wide] if WIDE else [])]
SMALL = ["float16", "float8_e4m3fn", "float8_e5m2"]
NO_STRIDES = np.zeros(4, np.int64)


@pytest.mark.parametrize("kv_dtype", SMALL)
def test_every_number_becomes_the_float32_that_it_is(kv_dtype: str) -> None:
    form = FORMS[kv_dtype]
    bits = np.arange(1 << form.bits).astype(f"u{form.bits // 8}")
    expected = to_float32(bits.view("u1" if form.bits == 8 else "f2"), kv_dtype)
    finite = np.isfinite(expected)
    # Blocks of one channel or of sixteen: the smallest that each form takes; and those of one transform nothing.
    wide = np.empty((bits.size, 1), np.float32)
    strides = np.array([0, 0, 1, 1], np.int64)
    cachegen_tiles_scalar.coefficients(bits, form, 0, strides, 1, 1, 0, wide, np.empty(bits.size, np.float32))
    assert (wide[finite, 0].view(np.uint32) == expected[finite].view(np.uint32)).all()
    assert not np.isfinite(wide[~finite]).any()


@pytest.mark.parametrize("kv_dtype", SMALL)
@pytest.mark.parametrize("tiles", TILES, ids=lambda tiles: tiles.__name__.rpartition("_")[2])
def test_what_is_decoded_is_rounded_to_even_and_kept_finite(kv_dtype: str, tiles: object) -> None:
    """A step in the first of 16 coefficients alone: each channel becomes q · step, which is what is rounded."""
    form, vectors = FORMS[kv_dtype], 4096
    rng = np.random.default_rng(0)
    exponents = rng.uniform(np.log2(2.0 ** (-form.bias - form.mantissa - 3)), form.bias + 3, vectors)
    steps = np.exp2(exponents).astype(np.float32)
    # Half of them lie exactly between two numbers, or on one.
    steps[::2] = (steps[::2].view(np.uint32) & np.uint32(2**32 - (1 << (22 - form.mantissa)))).view(np.float32)
    q = np.zeros((vectors, 16), np.int8)
    q[:, 0] = np.where(np.arange(vectors) % 3, 1, -1)
    out = np.empty(vectors * 16, f"u{form.bits // 8}")
    strides = np.array([0, 0, 16, 16], np.int64)
    tiles.restore(  # type: ignore[attr-defined]
        q.reshape(-1), 0, vectors, 1, 16, 16, True, steps, np.zeros(16, np.float32), np.empty(q.size, np.float32),
        np.empty(q.size, np.uint16), out, form, 0, strides,
    )  # fmt: skip
    expected = from_float32(np.repeat(q[:, 0] * steps, 16), kv_dtype)
    assert (out == expected.view(out.dtype)).all()
