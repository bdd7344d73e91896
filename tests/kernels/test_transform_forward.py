"""What encoders of `transform` multiply: the readable's bits, exact sums at their bound, and no error that counts."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from lmcache_s3.codecs.dtypes import from_float32, to_float32
from lmcache_s3.kernels import transform_reference as reference
from lmcache_s3.kernels.float_forms import FORMS
from lmcache_s3.kernels.strided import flat_view
from lmcache_s3.kernels.transform_forward import Forward, coefficients, pack_forward
from lmcache_s3.kernels.transform_tiles import ROWS, TOKENS, multiply
from lmcache_s3.kernels.transform_turns import cos_sin
from lmcache_s3.kernels.transform_values import Place, Rotation
from lmcache_s3.types import KVDtype


def weights_of(forward: Forward, rows: int, width: int) -> np.ndarray:
    """int16 [row, value]."""
    tiles = forward.weights.view(np.int16).reshape(-1, forward.mean.size // 2, ROWS, 2)
    return tiles.transpose(0, 2, 1, 3).reshape(-1, forward.mean.size)[:rows, :width]


def found(
    forward: Forward,
    factors: np.ndarray,
    values: np.ndarray,
    tokens: np.ndarray,
    turns: tuple[np.ndarray, np.ndarray],
    turned: int,
    kv_dtype: KVDtype = "float32",
) -> tuple[np.ndarray, np.ndarray]:
    """(q [coefficient, token], coded) of stored bits [plane, layer, token, head, channel]."""
    layout = flat_view(values)
    assert layout is not None
    planes, layers, _, heads, channels = values.shape
    plane, layer, token, head = (int(stride) for stride in layout[1])
    q = np.full((factors.size, -(-tokens.size // TOKENS) * TOKENS), 99, np.int8)
    coded = np.empty(tokens.size, np.bool_)
    coefficients(
        forward, factors, planes * layers * heads, channels,
        Rotation(turns[0].reshape(-1), turns[1].reshape(-1), turns[0].shape[1], turned), tokens, layout[0],
        FORMS[kv_dtype], Place(0, plane, layer, token, head, layers, heads), q, coded,
    )  # fmt: skip
    return q[:, : tokens.size], coded


NO_TURNS = (np.empty((1, 0), np.float32), np.empty((1, 0), np.float32))


def of_tokens(forward: Forward, factors: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of float32 [token, value] that nothing turns."""
    return found(forward, factors, x[None, None, :, None].copy(), np.arange(len(x)), NO_TURNS, 0)


@pytest.mark.parametrize(
    ("planes", "layers", "heads", "channels", "live", "rotary", "kv_dtype"),
    [
        (1, 1, 3, 64, 150, 64, "bfloat16"),
        (2, 2, 1, 64, 255, 32, "float16"),
        (1, 2, 2, 80, 60, 0, "float32"),
        (2, 1, 3, 12, 40, 6, "float8_e4m3fn"),
        (1, 5, 3, 1, 15, 0, "float8_e5m2"),
        (1, 1, 1, 576, 12, 64, "bfloat16"),
    ],
)
@pytest.mark.parametrize("cell_tokens", [30, 150])
def test_coefficients_have_the_references_bits(
    planes: int, layers: int, heads: int, channels: int, live: int, rotary: int, kv_dtype: KVDtype, cell_tokens: int
) -> None:
    rng = np.random.default_rng(live)
    vectors, width = planes * layers * heads, planes * layers * heads * channels
    tokens = np.sort(rng.choice(cell_tokens, cell_tokens - 3, replace=False))
    matrix = (rng.standard_normal((live, width)) * rng.lognormal(0, 2, width)).astype(np.float16)
    matrix[:, 3] = 0
    matrix[live // 2] = 0
    scale = rng.lognormal(-3, 1, live).astype(np.float32)
    mean = rng.standard_normal(width).astype(np.float32)
    around = from_float32(
        rng.standard_normal((planes, layers + 1, cell_tokens, heads + 1, channels)).astype(np.float32) * 4, kv_dtype
    )
    cell = around[:, 1:, :, 1:]
    infinite = {
        "bfloat16": 0x7F80,
        "float16": 0x7C00,
        "float32": 0x7F800000,
        "float8_e4m3fn": 0x7F,
        "float8_e5m2": 0x7C,
    }
    cell.view(f"u{cell.itemsize}")[-1, -1, tokens[5], -1, -1] = infinite[kv_dtype]
    turned = layers * heads if rotary else 0
    cosine, sine = cos_sin(rng.random(rotary // 2), 1000, cell_tokens)

    forward = pack_forward(matrix, scale, mean)
    some = live - live // 3
    values = to_float32(cell[:, :, tokens].transpose(2, 0, 1, 3, 4), kv_dtype).reshape(tokens.size, vectors, channels)
    with np.errstate(invalid="ignore"):
        x = reference.centred(values, mean, cosine[tokens], sine[tokens], turned)
        weights = weights_of(forward, some, width)
        unscaled, _ = reference.coefficients(x, forward.spread[:width], weights, forward.factors[:some])
        step = np.quantile(np.abs(unscaled).max(axis=0), 0.8) / 127  # for which most tokens are within reach
        factors = forward.factors[:some] / np.float32(step)
        wanted, within = reference.coefficients(x, forward.spread[:width], weights, factors)
    q, coded = found(forward, factors, cell, tokens, (cosine, sine), turned, kv_dtype)
    assert (coded == within).all()
    assert not coded[5]
    assert coded.any()
    assert np.count_nonzero(~coded) > 1
    assert (q[:, coded] == np.rint(wanted[:, coded])).all()


def test_what_is_out_of_reach_is_told() -> None:
    forward = pack_forward(np.eye(16, dtype=np.float16), np.ones(16, np.float32), np.zeros(16, np.float32))
    x = np.zeros((7, 16), np.float32)
    x[0, 3], x[1, 3], x[2, 3], x[3, 3] = 127.4, -127.4, 127.6, -127.6
    x[4, 3], x[5, 3] = 3e38, 1e-38
    q, coded = of_tokens(forward, forward.factors[:16], x)
    assert coded.tolist() == [True, True, False, False, False, True, True]
    assert q[3, coded].tolist() == [127, -127, 0, 0]
    assert (np.delete(q, 3, axis=0)[:, coded] == 0).all()


@pytest.mark.parametrize("width", [1, 16, 400, 5760])
def test_sums_stay_within_their_bound(width: int) -> None:
    """Tokens along a row are the longest sums there are: all in one value, spread out evenly, and at random."""
    rng = np.random.default_rng(width)
    rows = np.stack((np.eye(1, width)[0], np.ones(width), rng.standard_normal(width), rng.standard_t(1, width)))
    matrix = np.clip(rows, -1000, 1000).astype(np.float16)
    forward = pack_forward(matrix, np.ones(4, np.float32), np.zeros(width, np.float32))
    weights = weights_of(forward, 4, width).astype(np.int64)
    lengths = (weights**2).sum(axis=1)
    rounded = np.rint(weights * (32_760 / np.sqrt(lengths))[:, None]).astype(np.int64)
    assert max(np.abs(weights).max(), np.abs(rounded).max()) <= 32_767
    assert np.abs(weights @ rounded.T).max() < 2**31
    x = np.concatenate((weights, -weights)) / np.where(forward.spread[:width] > 0, forward.spread[:width], 1)
    q, _ = of_tokens(forward, (100 / lengths).astype(np.float32), x.astype(np.float32))
    assert np.diag(q[:, :4]).tolist() == [100] * 4
    assert np.diag(q[:, 4:]).tolist() == [-100] * 4


@pytest.mark.parametrize("width", [48, 384, 3000])
def test_rounding_moves_a_coefficient_by_no_more_than_a_hundredth(width: int) -> None:
    """Of vectors with as many and as large coefficients as real ones, whatever the scales of their channels."""
    rng = np.random.default_rng(width)
    turn = np.linalg.qr(rng.standard_normal((width, width)))[0]
    scales = rng.lognormal(0, 2, width)
    wanted = rng.standard_normal((64, width)) * np.maximum(30 * 0.9 ** np.arange(width), 0.3)
    x = (wanted @ turn) * scales
    matrix = turn / scales
    scale = (np.abs(matrix).max(axis=1) / 1000).astype(np.float32)
    halves = (matrix / scale[:, None]).astype(np.float16)
    forward = pack_forward(halves, scale, np.zeros(width, np.float32))
    stored = halves.astype(np.float64) * scale[:, None]
    exact = stored @ x.astype(np.float32).astype(np.float64).T
    got, _ = reference.coefficients(
        x.astype(np.float32), forward.spread[:width], weights_of(forward, width, width), forward.factors[:width]
    )
    assert np.sqrt(((got - exact) ** 2).mean()) < 0.01 / 3
    q, coded = of_tokens(forward, forward.factors[:width], x.astype(np.float32))
    assert coded.all()
    assert (np.abs(q - exact) < 0.51).all()


def test_products_are_those_of_integers() -> None:
    rng = np.random.default_rng(0)
    for pairs, tiles in ((1, 1), (8, 3), (300, 2)):
        weights = rng.integers(-32_767, 32_768, (tiles, pairs, ROWS, 2), np.int64)
        panel = rng.integers(-32_767, 32_768, (pairs, TOKENS, 2), np.int64)
        totals = np.full((tiles + 1) * ROWS * TOKENS, 7, np.int32)
        flat = [np.ascontiguousarray(of, np.int16).reshape(-1).view(np.int32) for of in (weights, panel)]
        multiply(flat[0], pairs, tiles, flat[1], totals)
        wanted = np.einsum("npri,pti->nrt", weights, panel).astype(np.int32).reshape(-1)  # wraps around, as sums do
        assert (totals[: wanted.size] == wanted).all()
        assert (totals[wanted.size :] == 7).all()


@pytest.mark.slow
def test_any_processor_gives_the_same_bits() -> None:
    """These tests once more, as they are compiled for a processor without AVX-512."""
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "x86-64-v3",
        "NUMBA_CPU_FEATURES": "+avx2,+fma",
        "NUMBA_CACHE_DIR": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", __file__],
        env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
