"""The readable quantiser: what the transform and steps promise; `test_cachegen_rows.py` compares the fast one."""

from __future__ import annotations

import numpy as np
import pytest

from lmcache_s3.kernels import quantise_reference as reference
from lmcache_s3.kernels.quantise import MAX_CODE, MIN_CODE, REACH, block_of, hadamard


@pytest.mark.parametrize(("channels", "block"), [(1, 1), (3, 1), (64, 64), (80, 16), (96, 32), (576, 64)])
def test_the_transform_undoes_itself(channels: int, block: int) -> None:
    assert block_of(channels) == block
    values = np.random.default_rng(0).standard_normal((5, 2, channels)).astype(np.float32)
    y = reference.coefficients(values)
    assert np.allclose(reference.hadamard(y).reshape(values.shape), values, atol=1e-5)
    assert np.isclose((y**2).sum() * block, (values**2).sum(), rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 6, 8, 64, 96])
def test_many_vectors_at_once_are_transformed_as_one(channels: int) -> None:
    values = np.random.default_rng(1).standard_normal((7, channels)).astype(np.float32)
    y = np.ascontiguousarray(values.T).ravel()
    hadamard(y, block_of(channels), 7)
    assert y.reshape(channels, 7).T.tobytes() == reference.hadamard(values).reshape(values.shape).tobytes()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("step", [0.1, 0.8, 2.0])
def test_no_coefficient_is_off_by_more_than_half_a_step(per_token: bool, step: float) -> None:
    values = np.random.default_rng(2).standard_t(3, (64, 2, 32)).astype(np.float32) + np.float32(3)
    row = reference.quantise(values, step, per_token=per_token)
    assert row is not None
    steps = reference.steps_of(row.base, row.codes)
    half = (steps[:, :, None] if per_token else steps[None]) / 2
    off = reference.coefficients(reference.dequantise(row)) - reference.coefficients(values)
    assert (np.abs(off) <= half * 1.001 + 1e-5).all()
    assert np.abs(row.q).max() < REACH, "no value is clipped"


def test_steps_never_vanish_or_overflow() -> None:
    for wanted in (np.zeros(4), np.full(4, 1e-300), np.array([0.0, 1e25, 1.0, 1e-30]), np.full(4, 2.0**90)):
        coded = reference.code_steps(wanted)
        assert coded is not None
        codes = coded[0] + coded[1].astype(int)
        assert (codes >= MIN_CODE).all()
        assert (codes <= MAX_CODE).all()
    assert reference.code_steps(np.array([1.0, 2.0**91])) is None
    assert reference.code_steps(np.array([1.0, np.nan])) is None
