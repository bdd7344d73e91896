"""The GPU's decoder of `transform` against the CPU's, in Triton's interpreter: small, for it is slow."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_s3.testing.interpreted import Interpreter

if missing := Interpreter.missing():
    pytest.skip(f"{missing} not installed: pip install lmcache-s3[gpu]", allow_module_level=True)

import torch

from lmcache_s3.testing import device_transform_checks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 2, 12, 1, 16), {"level": "coarse"}),  # streams that go on in the next unit; cells that begin a prompt
        # K and V in one unit
        pytest.param((2, 2, 33, 2, 16), {"joint": True, "unit_layers": 2, "streams": (3,)}, marks=pytest.mark.slow),
        # some channels are turned; two tiles of tokens
        pytest.param((2, 1, 70, 1, 18), {"kv_dtype": "float32", "rotary": 6}, marks=pytest.mark.slow),
        ((1, 1, 20, 1, 7), {"kv_dtype": "float32", "rotary": 2}),  # an odd number of channels
        pytest.param((2, 1, 40, 1, 16), {"kv_dtype": "float8_e4m3fn", "level": "coarse"}, marks=pytest.mark.slow),
    ],
)
def test_decodes_to_the_cpus_bits(interpreter: Interpreter, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    interpreter.run(device_transform_checks.check_decode_transform, CPU, shape, **options)


def test_damaged_cells_get_the_cpus_verdict(interpreter: Interpreter) -> None:
    interpreter.run(device_transform_checks.check_transform_damage, CPU, 6)


@pytest.mark.slow
def test_many_damaged_cells_get_the_cpus_verdict(interpreter: Interpreter) -> None:
    interpreter.run(device_transform_checks.check_transform_damage, CPU, 300, seed=1)
