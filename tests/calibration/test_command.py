"""`lmcache-s3 calibrate`: what it puts where, and what it refuses before anything is computed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lmcache_s3.calibration_store import read_name
from lmcache_s3.cli.main import app
from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.tiers.stores.open import open_store

pytest.importorskip("torch", reason="runs a model: pip install 'lmcache-s3[quality]'")
pytest.importorskip("transformers", reason="runs a model: pip install 'lmcache-s3[quality]'")

from lmcache_s3.calibration import calibrate
from lmcache_s3.quality import model as model_module
from lmcache_s3.testing.tiny_model import tiny

WEIGHTS = "ab" * 32
WORDS = ["north", "wind", "over", "the", "salt", "flats", "and", "a", "lamp"]


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`MODEL` names a kind of tiny model; nothing is known or kept outside of tmp_path."""
    for name in list(os.environ):
        if name.startswith("LMCACHE_S3_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    fresh = calibrations.Registry(None)
    for name in ("register", "attach", "detach", "known", "find"):
        monkeypatch.setattr(calibrations, name, getattr(fresh, name))
    monkeypatch.setattr(model_module, "Model", lambda kind, device, kv_dtype: tiny(kind, kv_dtype or "bfloat16"))
    monkeypatch.setattr("lmcache_s3.weights.weights_digest", lambda _path: WEIGHTS)
    rng = np.random.default_rng(3)
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 120)))


def run(tmp_path: Path, *arguments: object) -> tuple[int, str, str]:
    texts = [part for i in range(6) for part in ("--text", str(tmp_path / f"{i}.txt"))]
    got = CliRunner().invoke(app, ["calibrate", *map(str, arguments), *texts])
    return got.exit_code, got.stdout, got.stderr


def computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it computes")

    monkeypatch.setattr(calibrate, "Calibrating", refuse)


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "home/lmcache-s3/calibration").glob("*"))


@pytest.mark.parametrize(
    ("kind", "kv_dtype"), [("mha", "bfloat16"), ("deepseek_v3", "bfloat16"), ("llama", "float8_e4m3fn")]
)
def test_a_calibration_is_put_into_the_bucket_under_the_models_name(tmp_path: Path, kind: str, kv_dtype: str) -> None:
    url = f"file://{tmp_path}/bucket"
    stated = () if kv_dtype == "bfloat16" else ("--kv-dtype", kv_dtype)
    code, out, err = run(tmp_path, kind, "--url", url, "--json", *stated)
    assert code == 0, err
    said = json.loads(out)
    store = open_store(url)
    assert read_name(store, WEIGHTS, kv_dtype) == said["calibration"]
    data = store.get(calibrations.key_of(said["calibration"]))
    assert said["bytes"] == len(data)
    assert said["where"].endswith(f"bucket/calibrations/{said['calibration']}.safetensors")
    made = Calibration.from_bytes(data)
    shapes = {"mha": (2, 4, 16), "deepseek_v3": (1, 1, 32), "llama": (2, 2, 16)}
    assert (made.kv_dtype, made.kv, made.heads, made.head_dim) == (kv_dtype, *shapes[kind])
    assert made.about["weights"] == WEIGHTS
    assert kept(tmp_path) == []


def test_a_model_of_several_groups_is_refused_at_once_and_written_to_files_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as quick:
        computes_nothing(quick)
        code, _, err = run(tmp_path, "gemma", "--url", f"file://{tmp_path}/bucket")
    assert code == 2
    assert "2 KV groups (layers: 2 sliding, 1 full)" in err
    assert "--out FILE writes one for each group" in err
    assert len(err.splitlines()) == 1
    code, out, err = run(tmp_path, "gemma", "--out", tmp_path / "made.safetensors")
    assert code == 0, err
    assert "made.0.safetensors of 2 sliding layers" in out
    assert "made.1.safetensors of 1 full layers" in out
    assert "not stored yet" in out
    layers = [Calibration.from_bytes((tmp_path / f"made.{i}.safetensors").read_bytes()).layers for i in range(2)]
    assert layers == [2, 1]
    assert not (tmp_path / "made.safetensors").exists()
    assert kept(tmp_path) == []


def test_a_file_of_one_group_bears_the_name_that_was_given(tmp_path: Path) -> None:
    code, out, err = run(tmp_path, "llama", "--out", tmp_path / "llama.bin")
    assert code == 0, err
    made = Calibration.from_bytes((tmp_path / "llama.bin").read_bytes())
    assert f"codec_calibration={made.digest}" in out.replace("\n", "")
    assert [path.name for path in tmp_path.glob("*llama*")] == ["llama.bin"]


@pytest.mark.parametrize("out", ["nowhere/made.safetensors", "."])
def test_a_place_that_cannot_be_written_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    computes_nothing(monkeypatch)
    code, _, err = run(tmp_path, "llama", "--out", tmp_path / out)
    assert code == 2
    assert "cannot be written" in err


def test_a_dtype_that_is_none_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computes_nothing(monkeypatch)
    code, _, err = run(tmp_path, "llama", "--out", tmp_path / "made", "--kv-dtype", "fp8")
    assert code == 2
    assert "float8_e4m3fn" in err


def test_a_store_that_does_not_answer_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computes_nothing(monkeypatch)
    for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_MAX_ATTEMPTS", "1")):
        monkeypatch.setenv(name, value)
    code, _, err = run(tmp_path, "llama", "--url", "s3://bucket/cache", "--endpoint-url", "http://127.0.0.1:9")
    assert code == 2
    assert "127.0.0.1:9" in err


def test_a_calibration_too_large_to_be_read_is_refused_and_its_samples_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_s3.codecs.calibration.MAX_FILE_BYTES", 1000)
    code, _, err = run(tmp_path, "llama", "--out", tmp_path / "made")
    assert code == 2
    assert "--unit-layers" in err
    assert len(kept(tmp_path)) == 1
