"""How `bench quality` judges, what the peers' formulas give, and what it draws and saves. (Its runs need a model.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_s3.benchmarks import quality, rate_distortion
from lmcache_s3.benchmarks.calibrated import CalibratedCoder
from lmcache_s3.benchmarks.peers import Fp8, LMCacheCacheGen
from lmcache_s3.benchmarks.quality import Found, Results, cheapest, coders, figures_of, levels_of, measurements
from lmcache_s3.benchmarks.quality_state import State
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.dtypes import from_float32, to_float32
from lmcache_s3.errors import Invalid
from lmcache_s3.quality.measure import Score
from lmcache_s3.quality.texts import KINDS
from lmcache_s3.testing.calibrations import made_calibration

SPEC = CellSpec((2, 12, 256, 3, 16), "bfloat16")
POSITION = CellPosition(bytes(16), 0, 0, 0)
LEVELS = levels_of("cachegen")
OURS = coders("cachegen", ())


def cell(seed: int = 0) -> np.ndarray:
    return from_float32(np.random.default_rng(seed).standard_normal(SPEC.shape, np.float32), "bfloat16")


def results(kls: dict[str, float], bits: dict[str, float]) -> Results:
    made = Results("small", "0" * 16)
    made.scores = [
        Score(coder, f"{kind}-{i}", kind, kls[coder] * (1 + kind_number), 0.01, 0.9, 32, bits[coder])
        for coder in kls
        for kind_number, kind in enumerate(KINDS)
        for i in range(2)
    ]
    return made


def three(kl: list[float], bits: list[float]) -> Results:
    """Of our first levels and LMCache's default, in this order."""
    names = [one.name for one in OURS[: len(kl) - 1]] + ["lmcache-cachegen"]
    return results(dict(zip(names, kl, strict=True)), dict(zip(names, bits, strict=True)))


def test_the_cheapest_level_within_a_bound_is_chosen() -> None:
    found = three([0.003, 0.017, 0.035], [3.3, 2.2, 4.6])
    assert cheapest(found, OURS, 0.018) == (OURS[1].name, 2.2)
    assert cheapest(found, OURS, 0.01) == (OURS[0].name, 3.3)
    assert cheapest(found, OURS, 0.001) is None


def test_figures_compare_at_no_more_than_the_peers_error() -> None:
    found = three([0.003, 0.017, 0.035], [3.3, 2.3, 4.6])
    found.needles = [
        Found(4096, 16, {"uncoded": 12, OURS[1].name: 12}),
        Found(8192, 16, {"uncoded": 8, OURS[1].name: 7}),
    ]
    figures = {f.name: f for f in figures_of(found, OURS)}
    assert figures["codec.cachegen_bits"].value == 2.3
    assert figures["codec.cachegen_bits"].ok
    assert figures["codec.cachegen_vs_lmcache"].value == pytest.approx(0.5)
    assert figures["codec.needle_found"].value == pytest.approx(19 / 20)
    assert not figures["codec.needle_found"].ok
    assert figures[f"quality.{OURS[0].name}.chat.kl"].value == pytest.approx(0.012)


def test_transform_is_judged_by_its_own_bounds_and_its_narrow_units_apart() -> None:
    made = [made_calibration(SPEC)]
    wide, narrow = (CalibratedCoder(name, "medium", made) for name in ("transform", "transform-layerwise"))
    kls, bits = {wide.name: 0.009, narrow.name: 0.012}, {wide.name: 0.5, narrow.name: 0.9}
    figures = {f.name: f for f in figures_of(results(kls, bits), [wide, narrow])}
    assert figures["codec.transform_bits"].value == 0.5
    assert figures["codec.transform_bits_fine"].value == 16  # neither is within 0.004
    assert figures["codec.transform_layerwise_bits"].value == 0.9
    assert "codec.cachegen_bits" not in figures


def test_calibrated_coders_code_each_group_with_its_own_calibration() -> None:
    small = CellSpec((2, 2, 32, 1, 16), "bfloat16")
    coder = CalibratedCoder("transform", "medium", [made_calibration(SPEC), made_calibration(small)])
    for spec in (SPEC, small):
        values = from_float32(np.random.default_rng(1).standard_normal(spec.shape, np.float32), "bfloat16")
        n_bytes, decoded = coder.code(values, spec, POSITION)
        assert n_bytes < values.nbytes
        error = to_float32(decoded, "bfloat16") - to_float32(values, "bfloat16")
        assert 0 < np.abs(error).mean() < 0.2


def test_a_codec_that_is_never_good_enough_counts_as_uncoded() -> None:
    figures = {f.name: f for f in figures_of(three([0.1, 0.2, 0.035], [3.3, 2.3, 4.6]), OURS)}
    assert figures["codec.cachegen_bits"].value == 16
    assert not figures["codec.cachegen_bits"].ok
    assert figures["codec.cachegen_vs_lmcache"].value == pytest.approx(16 / 4.6)


def test_what_is_saved_is_the_kind_of_text_that_suffers_most() -> None:
    found = three([0.003, 0.017, 0.035], [3.3, 2.3, 4.6])
    fine, medium = measurements(found, OURS[:2], "ab" * 32, "bfloat16")
    assert (fine.subject.level, medium.subject.level) == tuple(LEVELS[:2])
    assert medium.kl == pytest.approx(4 * 0.017)
    assert medium.about["kl"]["prose"] == pytest.approx(0.017)
    json.loads(medium.to_json())
    found.scores = [score for score in found.scores if score.kind != "chat"]
    with pytest.raises(Invalid, match="not every kind"):
        measurements(found, OURS[:1], "ab" * 32, "bfloat16")


def test_unknown_levels_are_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(Invalid, match="level"):
        quality.main(levels=["finest"], needles=False)


# --- the peers --------------------------------------------------------------------------------------------------------


def test_lmcaches_side_information_alone_takes_more_than_two_bits_a_value() -> None:
    """Its tables: 33 × 16 bits and a length of 32 for each 256 values; its maxima: 16 bits for a token's channels."""
    zeros = np.zeros(SPEC.shape, np.uint16)
    n_bytes, decoded = LMCacheCacheGen().code(zeros, SPEC, POSITION)
    assert 8 * n_bytes / zeros.size == pytest.approx((33 * 16 + 32 + 8) / 256 + 16 / 48)
    assert not decoded.any()


def test_lmcaches_symbols_are_steps_of_a_tokens_largest_value() -> None:
    original = cell()
    n_bytes, decoded = LMCacheCacheGen().code(original, SPEC, POSITION)
    values, got = (to_float32(bits, "bfloat16") for bits in (original, decoded))
    for plane, layer, limit in ((0, 0, 15), (0, 9, 15), (0, 10, 7), (1, 1, 15), (1, 2, 7)):
        most = np.abs(values[plane, layer]).reshape(256, -1).max(-1)[:, None, None]
        error = np.abs(got[plane, layer] - values[plane, layer])
        assert (error <= most * (0.5 / limit + 0.01)).all()
        steps = got[plane, layer] / most * limit
        assert np.abs(steps - np.rint(steps)).max() < 0.05 * limit
    more, finer = LMCacheCacheGen(2).code(original, SPEC, POSITION)
    assert more > n_bytes
    assert np.abs(to_float32(finer, "bfloat16") - values).mean() < np.abs(got - values).mean()


def test_fp8_takes_a_byte_and_keeps_three_bits_of_mantissa() -> None:
    n_bytes, decoded = Fp8().code(cell(), SPEC, POSITION)
    values, got = to_float32(cell(), "bfloat16"), to_float32(decoded, "bfloat16")
    assert n_bytes == values.size
    large = np.abs(values) > 0.1
    assert (np.abs(got - values)[large] / np.abs(values)[large]).max() < 1 / 14


# --- going on, drawing ------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_a_finished_one_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "quality" / "run.jsonl"
    state = State(path)
    rows: list[dict[str, Any]] = [{"coder": "fast", "kl": 0.0}]
    state.add("bread", "prose", rows)
    again = State(path)
    assert again.documents == 1
    assert again.rows("bread", "prose") == rows
    assert again.rows("bread", "code") is None
    again.forget()
    assert State(path).documents == 0
    path.write_text("torn")
    assert State(path).documents == 0


def test_the_figure_is_drawn_from_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws: pip install 'lmcache-s3[analysis]'")
    found = three([0.003, 0.017, 0.035], [3.3, 2.3, 4.6])
    source, target = tmp_path / "f.json", tmp_path / "docs" / "figure.svg"
    source.write_text(json.dumps({"rows": [score.row() for score in found.scores], "model": "small"}))
    assert rate_distortion.main([str(source), str(target)]) == 0
    first = target.read_bytes()
    assert len(first) < 100_000
    assert rate_distortion.main([str(source), str(target)]) == 0
    assert target.read_bytes() == first
    source.write_text("{}")
    assert rate_distortion.main([str(source), str(target)]) == 2
    assert rate_distortion.main([]) == 2
