"""Samples are kept while a calibration may go on, belong to one model, and take no more room than is there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmcache_s3.errors import Invalid
from lmcache_s3.quality.texts import Document

torch = pytest.importorskip("torch", reason="runs a model: pip install 'lmcache-s3[quality]'")
pytest.importorskip("transformers", reason="runs a model: pip install 'lmcache-s3[quality]'")

from lmcache_s3.calibration import samples as samples_module  # noqa: E402
from lmcache_s3.calibration.rotary import turns_of  # noqa: E402
from lmcache_s3.calibration.samples import KEPT_S, Prompt, Samples, prompts_of  # noqa: E402
from lmcache_s3.quality.model import Model  # noqa: E402
from lmcache_s3.testing.tiny_model import tiny  # noqa: E402

WORDS = ["low", "water", "the", "ferry", "waits", "for", "a", "bell"]


def prompts(model: Model, n: int = 5) -> list[Prompt]:
    rng = np.random.default_rng(6)
    return prompts_of([Document(f"d{i}", "own", " ".join(rng.choice(WORDS, 110))) for i in range(n)], model)


def samples_of(model: Model) -> Samples:
    return Samples(model, turns_of(model), prompts(model))


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lmcache-s3" / "calibration"


class Stop(Exception):
    pass


def stop_behind(n: int) -> Callable[[Prompt], None]:
    met: list[Prompt] = []

    def done(prompt: Prompt) -> None:
        met.append(prompt)
        if len(met) == n:
            raise Stop

    return done


def made_at(samples: Samples) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in samples.directory.glob("*.npy")}


def test_what_was_interrupted_goes_on() -> None:
    model = tiny()
    with pytest.raises(Stop):
        samples_of(model).take(stop_behind(3))
    again = samples_of(model)
    (again.directory / "0003.kv.0.part").write_bytes(b"half")
    before = made_at(again)
    assert len(before) == 2 * 3
    assert len(again.take(lambda _: None)) == 5
    assert before.items() <= made_at(again).items()
    again.forget()
    assert not again.directory.exists()


@pytest.mark.parametrize("harm", ["empty", "cut", "foreign", "shape"])
@pytest.mark.parametrize("what", ["kv", "fisher"])
def test_a_file_that_is_not_whole_is_made_again(harm: str, what: str) -> None:
    samples = samples_of(tiny())
    first = samples.take(lambda _: None)
    wanted = [np.array(one.fisher[0]) for one in first], [np.array(one.kv[0]) for one in first]
    path = samples.directory / f"0002.{what}.0.npy"
    whole = path.read_bytes()
    match harm:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(whole[:-100])
        case "foreign":
            path.write_bytes(b"PK" + bytes(len(whole)))
        case "shape":
            np.save(path, np.zeros((2, 3), np.float32))
    again = samples.take(lambda _: None)
    for i, one in enumerate(again):
        assert np.allclose(one.fisher[0], wanted[0][i], rtol=1e-4, atol=1e-6)
        assert np.array_equal(one.kv[0], wanted[1][i])


def test_other_weights_or_texts_have_samples_of_their_own() -> None:
    model, other = tiny(), tiny()
    with torch.no_grad():
        other.module.model.layers[2].mlp.up_proj.weight += 1e-3
    assert samples_of(model).directory == samples_of(tiny()).directory
    texts = prompts(model)[1:]
    elsewhere = {samples_of(model).directory, samples_of(other).directory, Samples(model, [], texts).directory}
    other = tiny()
    other.module.config.rms_norm_eps *= 2
    elsewhere.add(samples_of(other).directory)
    assert len(elsewhere) == 4
    assert samples_of(tiny(kv_dtype="float16")).directory not in elsewhere


def test_two_processes_do_not_use_one_directory() -> None:
    samples = samples_of(tiny())
    samples.take(lambda _: None)
    holding = (
        "import fcntl, sys; held = open(sys.argv[1], 'ab'); fcntl.flock(held, fcntl.LOCK_EX); print('held', flush=True)"
        "; sys.stdin.read()"
    )
    samples._end()
    command = [sys.executable, "-c", holding, str(samples.directory / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(Invalid, match="another process calibrates this model"):
            samples.take(lambda _: None)
        other.communicate(timeout=10)
    assert len(samples.take(lambda _: None)) == 5


def test_what_nobody_came_back_to_is_removed(root: Path) -> None:
    old, used, young, foreign = (root / name for name in ("0" * 32, "1" * 32, "2" * 32, "made-by-others"))
    for directory in (old, used, young, foreign):
        directory.mkdir(parents=True)
        (directory / "0000.kv.0.npy").write_bytes(b"x")
    held = samples_module._lock(used)
    assert held is not None
    for directory in (old, used, foreign):
        then = time.time() - KEPT_S - 10
        os.utime(directory, (then, then))
    samples_of(tiny()).take(lambda _: None)
    assert [one.exists() for one in (old, used, young, foreign)] == [False, True, True, True]
    os.close(held)


def test_a_disk_too_small_is_told_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(10**9, 10**9, 1000))
    model = tiny()
    samples = samples_of(model)
    monkeypatch.setattr(model, "prefill", None)
    with pytest.raises(Invalid, match=r"cannot be kept in .* GB are needed.* XDG_CACHE_HOME"):
        samples.take(lambda _: None)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Invalid, match="Not a directory"):
        samples_of(tiny()).take(lambda _: None)


def test_texts_too_few_are_refused() -> None:
    with pytest.raises(Invalid, match="too few to calibrate"):
        prompts(tiny(), 3)


def test_prompts_stay_within_the_models_context() -> None:
    model = tiny()
    model.max_tokens = 400
    assert {len(one.tokens) + len(one.asked) for one in prompts(model)} == {400}
