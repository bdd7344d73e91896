"""The GPU's encoder of `cachegen` against the CPU's, in Triton's interpreter; and what all kernels compile to."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from lmcache_s3.testing.interpreted import Interpreter

if missing := Interpreter.missing():
    pytest.skip(f"{missing} not installed: pip install lmcache-s3[gpu]", allow_module_level=True)

import torch

from lmcache_s3.testing import device_checks, triton_compile

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "level"),
    [
        ((2, 1, 9, 2, 32), "medium"),  # pairs; K and V; one cell of the batch begins a prompt
        ((1, 2, 9, 1, 32), "fine"),  # no V; escaped values
        # blocks of 4 channels in vectors of 12; a last half pair
        pytest.param((2, 1, 31, 3, 12), "coarse", marks=pytest.mark.slow),
        # channels that are not transformed
        pytest.param((2, 1, 65, 1, 5), "coarse", marks=pytest.mark.slow),
    ],
)
def test_encodes_to_the_cpus_bytes(interpreter: Interpreter, shape: device_checks.Shape, level: str) -> None:
    interpreter.run(device_checks.check_encode, CPU, shape, level=level)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_dtype", "exponent"), [("float32", 0), ("float16", -17), ("float8_e4m3fn", -5), ("float8_e5m2", -14)]
)
def test_reads_numbers_as_the_cpu_does(interpreter: Interpreter, kv_dtype: str, exponent: int) -> None:
    check = device_checks.check_encode
    interpreter.run(check, CPU, (2, 1, 24, 2, 16), kv_dtype, level="coarse", exponent=exponent)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn", "float32"])
def test_compiles_for_gpus_without_fused_arithmetic(
    capability: int, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(triton_compile.check_compiles, capability, kv_dtype).result()
