"""The arithmetic of a calibration: transforms that undo themselves, coefficients that are independent, exact sums."""

from __future__ import annotations

import numpy as np
import pytest

from lmcache_s3.calibration import fit
from lmcache_s3.calibration.calibrate import Cut
from lmcache_s3.calibration.fit import Box, Vectors
from lmcache_s3.codecs.calibration import Calibration, Level
from lmcache_s3.codecs.dtypes import from_float32
from lmcache_s3.identity import KVGroup
from lmcache_s3.kernels.rans_tables import all_tables
from lmcache_s3.quality.model import LayerGroup

LAYERS, HEADS, CHANNELS, TOKENS = 2, 2, 8, 600
TURNS = np.array([0.16, 0.05, 0.011, 0.002])


def kv(seed: int = 0) -> np.ndarray:
    """float32 [2, layer, token, head, channel], values of different sizes that depend on one another."""
    rng = np.random.default_rng(seed)
    width = 2 * LAYERS * HEADS * CHANNELS
    mixing = np.random.default_rng(9).standard_normal((width, width)) * np.geomspace(3, 0.1, width)
    flat = (rng.standard_normal((TOKENS, width)) @ mixing.T + 2).astype(np.float32)
    return np.ascontiguousarray(flat.reshape(TOKENS, 2, LAYERS, HEADS, CHANNELS).transpose(1, 2, 0, 3, 4))


def fisher(seed: int = 3) -> np.ndarray:
    gradient = np.random.default_rng(seed).standard_normal((2, LAYERS, 200, HEADS, CHANNELS)).astype(np.float32)
    return fit.fisher_sum(gradient * np.geomspace(5, 0.1, CHANNELS, dtype=np.float32))


def fitted(box: Box) -> tuple[Vectors, fit.Transform]:
    bits = from_float32(fit.rotated(kv(), TURNS, 0), "bfloat16")
    vectors = Vectors([bits], "bfloat16", TURNS, box)
    return vectors, fit.klt(*fit.moments(vectors), *fit.weighting(fisher(), box, 2.0))


WHOLE = Box((0, 1), range(LAYERS), range(HEADS))


def test_rotation_is_undone_to_rounding() -> None:
    values = kv()
    there = fit.rotated(values, TURNS, 37)
    back = fit.unrotated(there, TURNS, 37)
    assert np.abs(back - values).max() < 1e-5 * np.abs(values).max()
    assert np.array_equal(there[1], values[1])  # V is not rotated
    assert not np.allclose(there[0], values[0], atol=0.1)


@pytest.mark.parametrize("box", [WHOLE, Box((0, 1), range(1, 2), range(HEADS)), Box((1,), range(LAYERS), range(1))])
def test_a_transform_undoes_itself_and_its_coefficients_are_uncorrelated(box: Box) -> None:
    vectors, transform = fitted(box)
    assert np.allclose(transform.inverse @ transform.forward, np.eye(len(transform.mean)), atol=1e-4)
    (x,) = vectors
    coefficients = (x - transform.mean) @ transform.forward.T
    covariance = coefficients.T @ coefficients / len(x)
    spread = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(spread, spread) - np.eye(len(spread))
    assert np.abs(correlation).max() < 0.02
    assert (np.diff(transform.variance) <= 0).all()


def test_errors_cost_what_their_fisher_matrix_says() -> None:
    """Of a unit error in any coefficient the weighted square is 1: so that one step suits all."""
    _, transform = fitted(WHOLE)
    root, _ = fit.weighting(fisher(), WHOLE, 2.0)
    n = CHANNELS
    weighted = np.concatenate([root[i] @ transform.inverse[i * n : i * n + n] for i in range(len(root))])
    assert np.allclose(np.linalg.norm(weighted, axis=0), 1, atol=1e-3)


def test_coefficients_beyond_reach_take_a_coarser_step_and_no_other_does() -> None:
    vectors, transform = fitted(WHOLE)
    deviation = np.sqrt(transform.variance)
    step = float(deviation[0] / 100)  # of the first coefficients many tokens are beyond 127 steps
    before = np.concatenate([one.coded for one in fit.quantised(transform, vectors, step, len(deviation))])
    reaching = fit.within_reach(transform, vectors, step)
    after = np.concatenate([one.coded for one in fit.quantised(reaching, vectors, step, len(deviation))])
    assert before.mean() < 0.9
    assert after.mean() > 0.99
    assert np.allclose(reaching.inverse @ reaching.forward, np.eye(len(transform.mean)), atol=1e-4)
    coarser = reaching.variance < 0.999 * transform.variance
    assert coarser[0]
    assert not coarser[deviation < 10 * step].any()
    assert fit.within_reach(transform, vectors, 20 * step) is transform


def test_tokens_far_out_do_not_shape_the_transform() -> None:
    values = kv()
    values[:, :, 5] *= 1000
    box = Box((1,), range(LAYERS), range(HEADS))
    with_sink = fit.moments(Vectors([from_float32(values, "bfloat16")], "bfloat16", TURNS, box))
    without = fit.moments(Vectors([from_float32(kv(), "bfloat16")], "bfloat16", TURNS, box))
    assert np.allclose(with_sink[1], without[1], rtol=0.1, atol=0.1 * np.abs(without[1]).max())


def test_a_fitted_unit_is_what_the_file_format_admits() -> None:
    vectors, transform = fitted(WHOLE)
    step = float(np.sqrt(transform.variance[8]))
    live = fit.live_at(transform, step)
    assert 8 < live <= len(transform.mean)
    tables, bits = fit.best_tables(fit.histograms(fit.quantised(transform, vectors, step, live)))
    assert len(tables) == len(bits) == live
    unit = fit.unit_of(WHOLE, transform, [tables], 1)
    assert np.abs(unit.inverse.astype(np.int64)).sum(axis=1).max() * 127 < 1 << 24
    made = Calibration("bfloat16", 2, LAYERS, HEADS, CHANNELS, (Level("medium", step),), TURNS, (unit,))
    assert Calibration.from_bytes(made.to_bytes()).units[0].inverse.shape == (len(transform.mean), live)


def test_the_chosen_table_is_the_cheapest() -> None:
    rng = np.random.default_rng(5)
    q = np.rint(rng.laplace(0, [0.2, 1.5, 9.0], (4000, 3))).clip(-127, 127).astype(np.int8)
    histogram = fit.histograms([fit.Quantised(q, np.ones(4000, bool))])
    tables, bits = fit.best_tables(histogram)
    for c in range(3):
        costs = all_tables().costs[:, np.abs(q[:, c].astype(int))].sum(axis=1)
        assert costs[tables[c]] == costs.min()
        assert bits[c] == pytest.approx(costs.min() / 256 / 4000)


def test_histograms_leave_out_tokens_that_are_kept_exactly() -> None:
    q = np.array([[1, 2], [127, 0], [1, 3]], np.int8)
    histogram = fit.histograms([fit.Quantised(q, np.array([True, False, True]))])
    assert histogram.sum() == 4
    assert histogram[0, 1] == 2
    assert histogram[0, 127] == 0


def group(layers: int, heads: int, head_dim: int) -> LayerGroup:
    return LayerGroup(KVGroup("full", layers, 2, heads, head_dim), tuple(range(layers)))


def test_cuts_stay_within_cells_and_are_even() -> None:
    assert [len(box.layers) for box in Cut(16).boxes(group(30, 3, 64))] == [15, 15]
    assert [len(box.layers) for box in Cut().boxes(group(30, 3, 64))] == [15, 15]
    widest = max(2 * len(box.layers) * 8 * 128 for box in Cut().boxes(group(32, 8, 128)))
    assert widest <= 6144
    cut = Cut(4, stages=2, head_groups=3).boxes(group(30, 3, 64))
    assert {box.heads.start for box in cut} == {0, 1, 2}
    assert all(box.layers.stop <= 15 or box.layers.start >= 15 for box in cut)
    assert sum(len(box.layers) * len(box.heads) * len(box.planes) for box in cut) == 2 * 30 * 3
    latents = LayerGroup(KVGroup("mla", 61, 1, 1, 576), tuple(range(61)))
    assert {box.planes for box in Cut().boxes(latents)} == {(0,)}
    assert max(len(box.layers) * 576 for box in Cut().boxes(latents)) <= 6144


def test_the_file_of_a_large_model_stays_within_what_is_read() -> None:
    """Half of a unit's coefficients are coded at the finest level, or fewer; each of them takes 4 bytes a value."""
    for layers, heads in ((30, 3), (32, 8), (80, 8)):
        widths = [2 * len(box.layers) * heads * 128 for box in Cut().boxes(group(layers, heads, 128))]
        assert sum(4 * width * width * 0.55 for width in widths) < 1 << 30
