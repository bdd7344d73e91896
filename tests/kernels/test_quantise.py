"""The fast quantiser against the readable one, bit for bit, and what it promises of its errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_s3.kernels import quantise_reference
from lmcache_s3.kernels.quantise import (
    MIN_STEP_CODE,
    Quantised,
    bfloat16_values,
    code_steps,
    dequantise,
    quantise,
    steps_of,
)
from lmcache_s3.kernels.rans_tables import ESCAPE


def same(a: Quantised, b: Quantised) -> bool:
    return a.base == b.base and all(
        getattr(a, name).dtype == getattr(b, name).dtype and (getattr(a, name) == getattr(b, name)).all()
        for name in ("symbols", "escapes", "means", "codes")
    )


def values_of(shape: tuple[int, int, int], seed: int, exponent: int) -> np.ndarray:
    """Heavy-tailed values with offsets, some channels constant, over the whole range of float32."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, shape) * np.exp(2 * rng.standard_normal((1, *shape[1:]))) + rng.standard_normal(
        shape[1:]
    )
    values[:, :, 0] = rng.standard_normal()
    return np.asarray(np.clip(values * 10.0**exponent, -3e38, 3e38), np.float32)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 17)),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.sampled_from([-44, -38, -20, -3, 0, 5, 30, 38]),
    sixteenths=st.integers(1, 32),
    per_token=st.booleans(),
)
def test_both_forms_give_the_same_bits(
    shape: tuple[int, int, int], seed: int, exponent: int, sixteenths: int, per_token: bool
) -> None:
    values = values_of(shape, seed, exponent)
    fast = quantise(values, sixteenths, per_token=per_token)
    slow = quantise_reference.quantise(values, sixteenths, per_token=per_token)
    assert same(fast, slow)
    out = np.empty_like(values)
    dequantise(fast, out, per_token=per_token)
    assert out.tobytes() == quantise_reference.dequantise(slow, per_token=per_token).tobytes()
    assert len(fast.escapes) == np.count_nonzero(fast.symbols == ESCAPE)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("sixteenths", [4, 8, 16])
def test_no_value_is_off_by_more_than_half_a_step(per_token: bool, sixteenths: int) -> None:
    values = values_of((64, 2, 32), 1, 0)
    done = quantise(values, sixteenths, per_token=per_token)
    out = np.empty_like(values)
    dequantise(done, out, per_token=per_token)
    steps = steps_of(done.base, done.codes)
    half = (steps[:, :, None] if per_token else steps[None]) / 2
    slack = 1e-6 * (np.abs(values) + np.abs(bfloat16_values(done.means)))
    assert (np.abs(out - values) <= half + slack).all()


def test_steps_are_within_an_eighth_of_what_was_asked() -> None:
    deviations = np.exp(np.linspace(-8, 8, 1000))
    base, codes = code_steps(deviations, 16)
    ratio = steps_of(base, codes) / deviations
    assert (np.abs(ratio - 1) <= 1 / 15).all()


def test_steps_never_vanish_or_overflow() -> None:
    for deviations in (np.zeros(4), np.full(4, 1e-300), np.array([0.0, 3e38, 1.0, 1e-30]), np.full(4, 1e300)):
        base, codes = code_steps(deviations, 32)
        steps = steps_of(base, codes)
        assert base >= MIN_STEP_CODE
        assert (steps > 0).all()
        assert np.isfinite(steps).all()
