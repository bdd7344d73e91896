"""Workers whose device decodes into its blocks itself, in Triton's interpreter: always the host's bits, or the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the real vLLM is needed: make setup")

from lmcache_s3.testing.interpreted import Interpreter

if missing := Interpreter.missing():
    pytest.skip(f"{missing} not installed: pip install lmcache-s3[gpu]", allow_module_level=True)

from lmcache_s3.testing import device_loads

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["cachegen", "transform"])
def test_loads_are_the_hosts_bit_for_bit(interpreter: Interpreter, codec: str, tmp_path: Path) -> None:
    interpreter.run(device_loads.check_loads, str(tmp_path), codec)


@pytest.mark.parametrize("how", device_loads.MISBEHAVIOURS)
def test_a_device_that_is_wrong_or_fails_costs_no_bit(interpreter: Interpreter, how: str, tmp_path: Path) -> None:
    interpreter.run(device_loads.check_misbehaviour, str(tmp_path), how)


def test_damaged_streams_fail_the_load(interpreter: Interpreter, tmp_path: Path) -> None:
    interpreter.run(device_loads.check_damage, str(tmp_path))


def test_decoding_comes_after_what_was_queued_before(interpreter: Interpreter, tmp_path: Path) -> None:
    interpreter.run(device_loads.check_order, str(tmp_path))


def test_what_waits_is_decoded_together(interpreter: Interpreter, tmp_path: Path) -> None:
    interpreter.run(device_loads.check_together, str(tmp_path))


@pytest.mark.slow
def test_engines_on_cpus_draw_in_no_triton(tmp_path: Path) -> None:
    with Interpreter() as fresh:
        fresh.run(device_loads.check_without_triton, str(tmp_path))
