"""The benchmark of the GPU kernels: all it does, in miniature, where there is no GPU; and what it says there."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmcache_s3.benchmarks import gpu
from lmcache_s3.cli.main import app
from lmcache_s3.codecs.base import CellSpec
from lmcache_s3.testing.interpreted import Interpreter

torch = pytest.importorskip("torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_that_nothing_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    done = CliRunner().invoke(app, ["bench", "gpu", "--json", str(path)])
    assert done.exit_code == gpu.NOT_MEASURED
    assert "nothing was measured" in done.output
    assert not path.exists()


@pytest.mark.skipif(bool(Interpreter.missing()), reason=f"{Interpreter.missing()} not installed")
def test_it_measures_what_it_says() -> None:
    with Interpreter() as interpreter:
        ratio, measured = interpreter.run(
            gpu.measure, torch.device("cpu"), CellSpec((2, 1, 24, 2, 16), "bfloat16"), [1, 2]
        )
    assert ratio > 1
    assert [m.cells for m in measured] == [1, 2]
    named = {figure.name: figure for figure in gpu.figures("NVIDIA H100 80GB HBM3", ratio, measured)}
    assert named["codec.gpu_decode_gbps"].goal == gpu.GOAL_GBPS
    assert not named["codec.gpu_decode_gbps"].ok
    assert all(figure.goal is None for figure in gpu.figures("NVIDIA L4", ratio, measured))
