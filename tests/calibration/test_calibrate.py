"""A whole calibration of a small random model, and what it finds out about the model by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_s3.cache import Cache
from lmcache_s3.calibration.levels import TARGETS, Judge, find_step
from lmcache_s3.calibration_store import publish
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.codecs.dtypes import to_float32
from lmcache_s3.errors import Invalid
from lmcache_s3.quality.texts import Document
from lmcache_s3.testing.small import small_settings, small_space
from lmcache_s3.tiers.stores.open import open_store

torch = pytest.importorskip("torch", reason="runs a model: pip install 'lmcache-s3[quality]'")
pytest.importorskip("transformers", reason="runs a model: pip install 'lmcache-s3[quality]'")

from lmcache_s3.calibration.calibrate import Calibrating, Cut  # noqa: E402
from lmcache_s3.calibration.rotary import turns_of  # noqa: E402
from lmcache_s3.calibration.samples import Prompt, Sample, prompts_of  # noqa: E402
from lmcache_s3.codecs import calibrations  # noqa: E402
from lmcache_s3.codecs.transform import TransformCodec  # noqa: E402
from lmcache_s3.quality.coding import CodecCoder, through  # noqa: E402
from lmcache_s3.quality.measure import compare  # noqa: E402
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


@pytest.mark.parametrize("kind", ["llama", "mha", "gemma", "deepseek_v2", "deepseek_v3"])
def test_a_calibrated_model_is_coded_within_what_was_promised(kind: str) -> None:
    """Grouped and multi-head attention, two KV groups, latents: coded cells cost what the levels say, or little more,
    and the less the finer the level."""
    model, heard = tiny(kind), Heard()
    calibrating = Calibrating(model, documents(), heard)
    made = calibrating.run(Cut(unit_layers=2), {"weights": "none"})
    calibrating.forget()
    assert heard.stages == ["KV and gradients", "transforms", "levels", "tables"]
    for one, group in zip(made, model.groups, strict=True):
        assert [level.name for level in one.levels] == list(TARGETS)
        assert all(level.kl is not None and level.kl <= TARGETS[level.name] for level in one.levels)
        assert [unit.layers for unit in one.units] == ([2, 1] if group.group.layers == 3 else [group.group.layers])
    prompt = prompts_of(documents(), model)[0]
    tokens, asked = prompt.tokens[:256], prompt.tokens[256:320]
    kv = model.prefill(tokens)
    log_p = model.primed(kv).predict(asked[:-1])
    sizes, costs = [], []
    for name in TARGETS:
        decoded, stored = through(Calibrated(name, made), kv, model.groups, tokens, model.kv_dtype, chunk_tokens=64)
        sizes.append(stored)
        costs.append(compare(log_p, model.primed(decoded).predict(asked[:-1]), asked[1:])[0])
        assert all(np.array_equal(a[:, :, 0], b[:, :, 0]) for a, b in zip(decoded, kv, strict=True))  # the first token
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sum(bits.nbytes for bits in kv) / 8
    assert costs == sorted(costs)
    assert 0 < costs[0] < costs[-1] < 0.1


class Calibrated:
    """A level of the calibrations of a model's groups, by the number of their layers and planes."""

    name = "calibrated"

    def __init__(self, level: str, made: list[Calibration]) -> None:
        self._of = {(one.kv, one.layers): TransformCodec(level, calibrations.register(one)) for one in made}

    def code(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> tuple[int, np.ndarray]:
        return CodecCoder(self._of[spec.shape[0], spec.shape[1]]).code(cell, spec, position)


def test_a_latent_is_taken_as_it_is() -> None:
    """Of its channels only the last are rotated, in other pairs than a calibration can name."""
    assert [turns.size for turns in turns_of(tiny("deepseek_v2"))] == [0]


def test_a_cache_stores_latents_by_a_calibration(tmp_path: Path) -> None:
    """From calibrating to a bucket and back, as vLLM's geometry of such a model is: kv 1, one head."""
    model = tiny("deepseek_v3")
    (made,) = Calibrating(model, documents(), Heard()).run(Cut(), {})
    group = model.groups[0].group
    space = replace(small_space(fidelity=f"kl{made.levels[-1].kl}"), groups=(group,))
    store = open_store(str(tmp_path / "cache"))
    publish(store, made, space.weights)
    tokens = list(prompts_of(documents(), model)[0].tokens[:64])
    (kv,) = model.prefill(tokens)
    with Cache.open(store.url, space, small_settings(store.url, codec="transform", codec_level="coarse")) as cache:
        cache.store(tokens, kv).result(20)
    with Cache.open(store.url, space, small_settings(store.url, read_only=True)) as cache:
        got = cache.retrieve(cache.lookup(tokens)).result(20)
    assert got.tokens == 64
    asked = tokens[:16]
    log_p, log_q = (model.primed([bits]).predict(asked[:-1]) for bits in (kv, got.array))
    assert 0 < compare(log_p, log_q, asked[1:])[0] < 0.1
    stored = sum(one.size_bytes for one in store.list("spaces/") if "/c/" in one.key)
    assert stored < kv.nbytes / 4


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


def test_a_step_far_from_the_guess_is_found() -> None:
    step, kl = find_step(Quadratic(2.0), 0.02, 1e-3, lambda _step, _kl: None)  # type: ignore[arg-type]
    assert 0.01 < kl <= 0.02, step


class Numbers:
    """Stands for a model: its KL at any step is the same."""

    def __init__(self, kl: float) -> None:
        self._kl = kl

    def primed(self, _kv: object) -> Numbers:
        return self

    def predict(self, tokens: list[int]) -> Any:
        return torch.full((len(tokens), 6), self._kl)


def test_a_model_that_predicts_no_numbers_is_refused() -> None:
    sample = Sample(Prompt("a", (1, 2), (3, 4, 5)), [], [])
    with pytest.raises(Invalid, match="predicts no numbers"):
        Judge(Numbers(float("nan")), [sample], []).kl(0.1)  # type: ignore[arg-type]
    assert Judge(Numbers(-1.0), [sample], []).kl(0.1) == 0  # type: ignore[arg-type]
