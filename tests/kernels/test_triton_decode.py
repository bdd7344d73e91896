"""The GPU's decoder of `cachegen` against the CPU's, in Triton's interpreter: small, for it is slow."""

from __future__ import annotations

import numpy as np
import pytest

from lmcache_s3.testing.interpreted import Interpreter

if missing := Interpreter.missing():
    pytest.skip(f"{missing} not installed: pip install lmcache-s3[gpu]", allow_module_level=True)

import torch

from lmcache_s3.kernels.device_cachegen import Places
from lmcache_s3.kernels.paged import PlaneMap
from lmcache_s3.testing import device_checks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "level"),
    [
        ((2, 2, 9, 2, 32), "medium"),  # pairs; K and V; a batch in which one cell begins a prompt
        ((1, 2, 9, 1, 32), "fine"),  # no V; escaped values
        # blocks of 4 channels in vectors of 12; a last half pair
        pytest.param((2, 1, 31, 3, 12), "coarse", marks=pytest.mark.slow),
        ((2, 1, 65, 1, 5), "coarse"),  # channels that are not transformed
    ],
)
def test_decodes_to_the_cpus_bits(interpreter: Interpreter, shape: device_checks.Shape, level: str) -> None:
    interpreter.run(device_checks.check_decode_dense, CPU, shape, level=level)


@pytest.mark.parametrize(
    ("kv_dtype", "exponent"),
    [("float32", 0), ("float16", -17), ("float8_e4m3fn", -5), ("float8_e4m3fn", 8), ("float8_e5m2", -14)],
)
def test_rounds_as_the_cpu_does(interpreter: Interpreter, kv_dtype: str, exponent: int) -> None:
    """Also where numbers are denormal, or beyond the largest."""
    check = device_checks.check_decode_dense
    interpreter.run(check, CPU, (2, 1, 24, 2, 16), kv_dtype, level="coarse", exponent=exponent)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e5m2"])
def test_raw_cells_stand_beside_coded_ones(interpreter: Interpreter, kv_dtype: str) -> None:
    interpreter.run(device_checks.check_decode_raw, CPU, kv_dtype)


@pytest.mark.parametrize("transposed", [False, True])
def test_decodes_into_an_engines_blocks(interpreter: Interpreter, transposed: bool) -> None:
    interpreter.run(device_checks.check_decode_paged, CPU, transposed=transposed)


def test_a_layout_without_even_steps_has_no_places() -> None:
    plane = PlaneMap.standard(2, 4, 8)
    plane.index[1, 2, [3, 4]] = plane.index[1, 2, [4, 3]]
    layer = torch.zeros((3, 2, 4, 16), dtype=torch.uint8)
    assert Places.paged([layer], np.array([[0, 1]]), plane, range(2)) is None


def test_damaged_cells_get_the_cpus_verdict(interpreter: Interpreter) -> None:
    interpreter.run(device_checks.check_damage, CPU, 8)


@pytest.mark.slow
def test_many_damaged_cells_get_the_cpus_verdict(interpreter: Interpreter) -> None:
    interpreter.run(device_checks.check_damage, CPU, 300, seed=1)
