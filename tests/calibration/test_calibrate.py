"""A whole calibration of a small random model, and what it finds out about the model by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmcache_s3.calibration.levels import TARGETS, find_step
from lmcache_s3.codecs.dtypes import to_float32
from lmcache_s3.errors import Invalid
from lmcache_s3.quality.texts import Document

torch = pytest.importorskip("torch", reason="runs a model: pip install 'lmcache-s3[quality]'")
pytest.importorskip("transformers", reason="runs a model: pip install 'lmcache-s3[quality]'")

from lmcache_s3.calibration.calibrate import Calibrating, Cut  # noqa: E402
from lmcache_s3.calibration.rotary import turns_of  # noqa: E402
from lmcache_s3.calibration.samples import Samples, prompts_of  # noqa: E402
from lmcache_s3.codecs import calibrations  # noqa: E402
from lmcache_s3.codecs.transform import TransformCodec  # noqa: E402
from lmcache_s3.quality.coding import CodecCoder, through  # noqa: E402
from lmcache_s3.testing.tiny_model import tiny  # noqa: E402

WORDS = ["the", "tide", "turns", "the", "mill", "and", "the", "miller", "counts", "every", "sack"]


def documents(n: int = 8) -> list[Document]:
    rng = np.random.default_rng(4)
    return [Document(f"d{i}", "own", " ".join(rng.choice(WORDS, 120))) for i in range(n)]


class Heard:
    """Progress that is remembered."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.steps = 0

    def begin(self, stage: str, steps: int) -> None:
        self.stages.append(stage)

    def advance(self) -> None:
        self.steps += 1

    def say(self, text: str) -> None:
        assert text


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_rotation_of_keys_is_found() -> None:
    model = tiny()
    (turns,) = turns_of(model)
    expected = 1 / (10_000 ** (np.arange(0, 16, 2) / 16)) / (2 * np.pi)
    assert np.allclose(turns, expected, rtol=1e-6)


def test_each_kind_of_layer_has_its_own_rotation() -> None:
    sliding, full = turns_of(tiny("gemma"))
    assert sliding.size == full.size == 8
    assert not np.allclose(sliding, full)


def test_the_gradient_is_that_of_the_labels_likelihood() -> None:
    """Along the gradient the log-likelihood of the same labels rises as fast as its length says."""
    model = tiny(kv_dtype="float32")
    tokens = [int(t) for t in np.random.default_rng(2).integers(0, 300, 40)]
    kv = model.prefill(tokens[:32])
    (gradient,) = model.sampled_gradients(kv, tokens[32:], seed=7)
    size = 1e-3 / np.linalg.norm(gradient)

    def likelihood(values: np.ndarray) -> float:
        log_p = model.primed([values.view(kv[0].dtype)]).predict(tokens[32:])
        drawn = torch.Generator().manual_seed(7)
        base = model.primed(kv).predict(tokens[32:])
        labels = torch.multinomial(base.exp(), 1, generator=drawn)
        return float(log_p.double().gather(1, labels).sum())

    values = to_float32(kv[0], "float32")
    rise = likelihood((values + size * gradient).astype(np.float32)) - likelihood(
        (values - size * gradient).astype(np.float32)
    )
    assert rise == pytest.approx(2 * size * float((gradient.astype(np.float64) ** 2).sum()), rel=0.1)


def test_a_calibrated_model_is_coded_within_what_was_promised() -> None:
    model, heard = tiny(), Heard()
    calibrating = Calibrating(model, documents(), heard)
    (made,) = calibrating.run(Cut(unit_layers=2), {"weights": "none"})
    calibrating.forget()
    assert heard.stages == ["KV and gradients", "transforms", "levels", "tables"]
    assert [level.name for level in made.levels] == list(TARGETS)
    for level, target in zip(made.levels, TARGETS.values(), strict=True):
        assert level.kl is not None
        assert level.kl <= target
    assert [len(range(unit.first_layer, unit.first_layer + unit.layers)) for unit in made.units] == [2, 1]
    tokens = prompts_of(documents(), model)[0].tokens[:256]
    kv = model.prefill(tokens)
    digest, sizes = calibrations.register(made), []
    for level in made.levels:
        coder = CodecCoder(TransformCodec(level.name, digest))
        decoded, stored = through(coder, kv, model.groups, tokens, model.kv_dtype, chunk_tokens=64)
        sizes.append(stored)
        assert np.array_equal(decoded[0][:, :, 0], kv[0][:, :, 0])  # the first token is exact
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < kv[0].nbytes / 2


def test_a_calibration_that_was_interrupted_goes_on() -> None:
    model = tiny()
    prompts = prompts_of(documents(), model)
    samples = Samples(model, turns_of(model), prompts)

    class Stop(Exception):
        pass

    def stop_at_the_third(_: object) -> None:
        if len(list(samples.directory.glob("*.kv.0.npy"))) == 3:
            raise Stop

    with pytest.raises(Stop):
        samples.take(stop_at_the_third)
    (samples.directory / "0003.kv.0.part").write_bytes(b"half")
    before = {path.name: path.stat().st_mtime_ns for path in samples.directory.glob("*.npy")}
    again = Samples(model, turns_of(model), prompts)
    taken = again.take(lambda _: None)
    assert len(taken) == len(prompts)
    assert all((again.directory / name).stat().st_mtime_ns == at for name, at in before.items())
    again.forget()
    assert not again.directory.exists()


def test_texts_too_few_are_refused() -> None:
    with pytest.raises(Invalid, match="too few to calibrate"):
        prompts_of(documents(3), tiny())


class Quadratic:
    """Stands for a model: KL grows as a power of the step."""

    def __init__(self, power: float) -> None:
        self.power, self.asked = power, 0

    def kl(self, step: float) -> float:
        self.asked += 1
        return float(0.01 * step**self.power)


@pytest.mark.parametrize("power", [1.2, 2.0, 3.5])
@pytest.mark.parametrize("guess", [0.1, 1.0, 3.0])
def test_the_step_found_keeps_the_kl_and_wastes_little(power: float, guess: float) -> None:
    judge = Quadratic(power)
    step, kl = find_step(judge, 0.02, guess, lambda _step, _kl: None)  # type: ignore[arg-type]  # only kl is asked
    assert kl == judge.kl(step) <= 0.02
    assert kl > 0.015
