"""What `transform` quantises: a unit's values times its forward matrix, in integers of 16 bits. For encoders.

Values are turned back, less their mean, weighted by how much the coefficients depend on each, and rounded at a scale of
each token's own; rows of the matrix are rounded likewise. Their lengths are such that no sum leaves int32 (Cauchy and
Schwarz), so its order is free, and processors multiply and add two int16 at once: twice as fast as float32. Rounding
moves a coefficient by about 10⁻⁵ of the two lengths, mostly less than a hundredth of a step; at worst, where all errors
have one sign, by 2.3 · 10⁻⁵ √values of them. All else is one float32 operation a step: the same coefficients on every
machine, in any number of threads.

`transform_reference.py` is the same, written to be read. Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmcache_s3.kernels.float_forms import FloatForm, taken, widen
from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.transform_products import aligned
from lmcache_s3.kernels.transform_tiles import ROWS, TOKENS, multiply
from lmcache_s3.kernels.transform_values import Place, Rotation
from lmcache_s3.kernels.vectors import as_f32, as_i8, as_i16, bits_of_f32, f32_of_bits, load16, select, store

VALUES_LENGTH = np.float32(32_760.0)
"""Of a token's rounded values. With what sums of up to 2²⁰ squares lose in float32, no value is above 32,767."""
WEIGHTS_LENGTH = 63_000.0
"""Of a row of rounded weights: the product is 4 % below 2³¹, more than rounding can add to the two."""
_LARGEST_WEIGHT = 32_767.0
_LANES = 16
_SMALLEST_LENGTH = np.float32(1e-18)
_ROUNDING = np.float32(12_582_912.0)
"""1.5 · 2²³: added to a number of at most 22 bits, it leaves the nearest integer, ties to even, in the lowest bits."""
_ROWS_AT_ONCE = 42 * ROWS
REACH_BEFORE_ROUNDING = np.float32(127.5)
"""What is smaller becomes at most 127; this itself, the even 128."""


class Forward(NamedTuple):
    """A unit's forward matrix as `coefficients` reads it; values are padded to a multiple of 16.

    weights: int32, pairs of int16, flat [tile of `ROWS` rows, pair of values, row]. factors: float32 [row], what a unit
    of a sum is in steps of 1. spread: float32 [value], what a value less its mean is multiplied with before it is
    rounded. mean: float32 [value].
    """

    weights: np.ndarray
    factors: np.ndarray
    spread: np.ndarray
    mean: np.ndarray


def pack_forward(forward: np.ndarray, scale: np.ndarray, mean: np.ndarray) -> Forward:
    """forward: float16 [row, value], scale: float32 [row], mean: float32 [value]. As large as `forward`."""
    rows, width = forward.shape
    padded = -(-width // _LANES) * _LANES
    squares = np.zeros(width)
    for first in range(0, rows, _ROWS_AT_ONCE):
        squares += _lengths(_block(forward, scale, first)) ** 2
    spread = np.sqrt(squares)
    inverse = np.divide(1.0, spread, out=np.zeros(width), where=spread > 0)
    packed = np.zeros((-(-rows // ROWS), padded // 2, ROWS, 2), np.int16)
    factors = np.zeros(len(packed) * ROWS, np.float32)
    for first in range(0, rows, _ROWS_AT_ONCE):
        block = _block(forward, scale, first) * inverse
        n, tiles = len(block), -(-len(block) // ROWS)
        unit = np.maximum(np.abs(block).max(axis=1) / _LARGEST_WEIGHT, _lengths(block.T) / WEIGHTS_LENGTH)
        unit[unit == 0] = 1.0  # a row of zeros
        whole = np.zeros((tiles * ROWS, padded), np.int16)
        whole[:n, :width] = np.rint(block / unit[:, None])
        tile = first // ROWS
        packed[tile : tile + tiles] = whole.reshape(tiles, ROWS, padded // 2, 2).transpose(0, 2, 1, 3)
        factors[first : first + n] = unit
    weights = aligned(packed.reshape(-1)).view(np.int32)
    return Forward(weights, factors, _padded(spread, padded), _padded(mean, padded))


def _block(forward: np.ndarray, scale: np.ndarray, first: int) -> np.ndarray:
    some = slice(first, first + _ROWS_AT_ONCE)
    product: np.ndarray = forward[some].astype(np.float64) * scale[some, None]
    return product


def _lengths(matrix: np.ndarray) -> np.ndarray:
    """Of its columns; added up row after row, the same on every machine."""
    lengths: np.ndarray = np.sqrt(np.ascontiguousarray(matrix**2).sum(axis=0))
    return lengths


def _padded(per_value: np.ndarray, width: int) -> np.ndarray:
    whole = np.zeros(width, np.float32)
    whole[: per_value.size] = per_value
    return whole


@kernel
def _turn_back(y: np.ndarray, at: int, pairs: int, rotation: Rotation, token: int) -> None:
    angles = token * pairs
    if pairs & 15 == 0:
        for j in range(0, pairs, 16):
            a = load16(y, at + j)
            b = load16(y, at + pairs + j)
            cosine = load16(rotation.cosine, angles + j)
            sine = load16(rotation.sine, angles + j)
            store(y, at + j, a * cosine + b * sine)
            store(y, at + pairs + j, b * cosine - a * sine)
    else:
        for j in range(pairs):
            x = y[at + j]
            z = y[at + pairs + j]
            y[at + j] = x * rotation.cosine[angles + j] + z * rotation.sine[angles + j]
            y[at + pairs + j] = z * rotation.cosine[angles + j] - x * rotation.sine[angles + j]


@kernel
def _take(flat: np.ndarray, form: FloatForm, at: int, channels: int, y: np.ndarray, bits: np.ndarray, to: int) -> None:
    """A vector's values to y[to:]; `bits` is the same memory as u32."""
    j = 0
    while j + 16 <= channels:
        store(y, to + j, taken(flat, form, at + j))
        j += 16
    while j < channels:
        number = np.uint32(flat[at + j])
        if form.bias == 127:
            bits[to + j] = number << np.uint32(32 - form.bits)
        else:
            widen(number, form, y, bits, to + j)
        j += 1


@kernel
def _rounded(forward: Forward, y: np.ndarray, z: np.ndarray, squares: np.ndarray) -> np.float32:
    """Values centred, weighted and rounded to `z`, int16; returns their unit, −1 where one is not finite.

    y: float32, overwritten; squares: float32 [16], scratch.
    """
    squares[:] = np.float32(0.0)
    total = load16(squares, 0)
    for w in range(0, y.size, 16):
        x = (load16(y, w) - load16(forward.mean, w)) * load16(forward.spread, w)
        store(y, w, x)
        total = total + x * x
    store(squares, 0, total)
    square = np.float32(0.0)
    for lane in range(16):
        square += squares[lane]
    if not square < np.float32(np.inf):  # infinite, or no number
        z[:] = np.int16(0)
        return np.float32(-1.0)
    length = max(np.sqrt(square), _SMALLEST_LENGTH)
    scale = VALUES_LENGTH / length
    for w in range(0, y.size, 16):
        store(z, w, as_i16(bits_of_f32(load16(y, w) * scale + _ROUNDING)))
    return np.float32(length / VALUES_LENGTH)


@kernel
def _quantise(
    totals: np.ndarray, units: np.ndarray, factors: np.ndarray, q: np.ndarray, length: int, at: int, most: np.ndarray
) -> None:
    """Coefficients of a panel, rounded, to q[row · length + at + token], int8; units: float32 [token].

    most: float32 [token], the largest magnitude before rounding.
    """
    for token in range(0, TOKENS, 16):
        unit = load16(units, token)
        largest = load16(units, token) * np.float32(0.0)
        for row in range(factors.size):
            x = as_f32(load16(totals, row * TOKENS + token)) * unit * factors[row]
            store(q, row * length + at + token, as_i8(bits_of_f32(x + _ROUNDING)))
            magnitude = f32_of_bits(bits_of_f32(x) & 0x7FFFFFFF)
            largest = select(magnitude > largest, magnitude, largest)
        store(most, token, largest)


@kernel
def coefficients(
    forward: Forward,
    factors: np.ndarray,
    vectors: int,
    channels: int,
    rotation: Rotation,
    tokens: np.ndarray,
    flat: np.ndarray,
    form: FloatForm,
    place: Place,
    q: np.ndarray,
    coded: np.ndarray,
) -> None:
    """A unit's first coefficients of some of a cell's tokens, int8 to q [coefficient, token padded to whole panels].

    factors: float32 [coefficient], `Forward.factors` ÷ step. vectors, channels: of the unit. tokens: int64, which of
    the cell's. flat: bits of numbers of this form, where the unit's values lie as `place` says. coded: bool [token],
    whether the token's values are finite and its coefficients within reach; those of another are undefined.
    """
    width = forward.mean.size
    pairs = width // 2
    tiles = (factors.size + ROWS - 1) // ROWS
    y = np.zeros(width, np.float32)
    bits = y.view(np.uint32)
    z = np.empty(width, np.int16)
    by_pair = z.view(np.int32)
    panel = np.empty(pairs * TOKENS, np.int32)
    totals = np.empty(tiles * ROWS * TOKENS, np.int32)
    units = np.empty(TOKENS, np.float32)
    most = np.empty(TOKENS, np.float32)
    squares = np.empty(16, np.float32)
    flat_q = q.reshape(-1)
    for first in range(0, tokens.size, TOKENS):
        n = min(TOKENS, tokens.size - first)
        for i in range(n):
            token = tokens[first + i]
            for vector in range(vectors):
                row = vector // place.heads
                at = place.start + row // place.layers * place.plane + row % place.layers * place.layer
                at += vector % place.heads * place.head + token * place.token
                _take(flat, form, at, channels, y, bits, vector * channels)
                if vector < rotation.vectors:
                    _turn_back(y, vector * channels, rotation.pairs, rotation, token)
            y[vectors * channels :] = np.float32(0.0)
            units[i] = _rounded(forward, y, z, squares)
            for pair in range(pairs):
                panel[pair * TOKENS + i] = by_pair[pair]
        for i in range(n, TOKENS):
            units[i] = np.float32(0.0)
            for pair in range(pairs):
                panel[pair * TOKENS + i] = 0
        multiply(forward.weights, pairs, tiles, panel, totals)
        _quantise(totals, units, factors, flat_q, q.shape[1], first, most)
        for i in range(n):
            coded[first + i] = units[i] >= np.float32(0.0) and most[i] < REACH_BEFORE_ROUNDING
