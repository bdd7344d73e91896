"""The GPU's coder and decoder of `transform` against the CPU's, in Triton's interpreter: small, for it is slow."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_s3.testing.interpreted import Interpreter

if missing := Interpreter.missing():
    pytest.skip(f"{missing} not installed: pip install lmcache-s3[gpu]", allow_module_level=True)

import torch

from lmcache_s3.kernels import device_transform_encode
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


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 20, 1, 7), {"kv_dtype": "float32", "rotary": 2}),  # an odd number of channels
        # streams that go on in the next unit; a token that is not finite
        pytest.param((2, 2, 12, 1, 16), {"level": "coarse"}, marks=pytest.mark.slow),
        # K and V in one unit
        pytest.param((2, 2, 33, 2, 16), {"joint": True, "unit_layers": 2, "streams": (3,)}, marks=pytest.mark.slow),
        # some channels are turned; two tiles of tokens
        pytest.param((2, 1, 70, 1, 18), {"kv_dtype": "float32", "rotary": 6}, marks=pytest.mark.slow),
        pytest.param((2, 1, 40, 1, 16), {"kv_dtype": "float8_e4m3fn", "level": "coarse"}, marks=pytest.mark.slow),
    ],
)
def test_encodes_to_the_cpus_coefficients_but_few(
    interpreter: Interpreter, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    interpreter.run(device_transform_checks.check_encode_transform, CPU, shape, **options)


def test_what_would_not_become_smaller_is_stored_raw(interpreter: Interpreter) -> None:
    interpreter.run(device_transform_checks.check_encode_raw, CPU)


def test_sums_are_good_with_tf32_too(monkeypatch: pytest.MonkeyPatch) -> None:
    device_transform_checks.check_product(CPU)
    multiply, add = torch.matmul, torch.addmm

    def rounded(x: torch.Tensor) -> torch.Tensor:
        """As a GPU takes float32 for TF32: 10 bits of mantissa, to nearest."""
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & -(1 << 13)).view(torch.float32)

    monkeypatch.setattr(torch, "matmul", lambda a, b: multiply(rounded(a), rounded(b)))
    monkeypatch.setattr(torch, "addmm", lambda c, a, b: add(c, rounded(a), rounded(b)))
    device_transform_checks.check_product(CPU)
    monkeypatch.setattr(device_transform_encode, "in_parts", lambda x: (x, torch.zeros_like(x)))
    with pytest.raises(AssertionError, match="wrong by"):
        device_transform_checks.check_product(CPU)


def test_damaged_cells_get_the_cpus_verdict(interpreter: Interpreter) -> None:
    interpreter.run(device_transform_checks.check_transform_damage, CPU, 6)


@pytest.mark.slow
def test_many_damaged_cells_get_the_cpus_verdict(interpreter: Interpreter) -> None:
    interpreter.run(device_transform_checks.check_transform_damage, CPU, 300, seed=1)
