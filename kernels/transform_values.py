"""Values of a `transform` unit from its quantised coefficients, straight into the caller's array. FORMAT.md §7.3.

Sums of products of integers below 2²⁴ are exact in float32 in any order, and most coefficients are 0: so each token
adds up only the columns of those that are not, some hundred values wide at a time, so that they stay in its cache. What follows is one float32 operation a step, uncontracted: the same bits on every machine. `transform_reference.py` is
the same, written to be read. Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmcache_s3.kernels.jit import kernel

_BLOCK_VALUES = 256


class Inverse(NamedTuple):
    """columns: int16 [coefficient, value], value contiguous. scale, mean: float32 [value]."""

    columns: np.ndarray
    scale: np.ndarray
    mean: np.ndarray


class Rotation(NamedTuple):
    """cosine, sine: float32 [token, pair] of all the cell's tokens; channel j < pairs is turned with j + pairs.

    vectors: how many of the unit's vectors, from the first, are turned.
    """

    cosine: np.ndarray
    sine: np.ndarray
    vectors: int


@kernel
def _add_up(rows: np.ndarray, entries: np.ndarray, n: int, total: np.ndarray) -> None:
    """total[w] = Σ q · rows[r, w] over n entries r · 256 + (q mod 256)."""
    for w in range(total.size):
        total[w] = np.float32(0.0)
    i = 0
    while i + 4 <= n:
        a = rows[entries[i] >> 8]
        b = rows[entries[i + 1] >> 8]
        c = rows[entries[i + 2] >> 8]
        d = rows[entries[i + 3] >> 8]
        qa = np.float32(np.int8(entries[i] & 0xFF))
        qb = np.float32(np.int8(entries[i + 1] & 0xFF))
        qc = np.float32(np.int8(entries[i + 2] & 0xFF))
        qd = np.float32(np.int8(entries[i + 3] & 0xFF))
        for w in range(total.size):
            total[w] += (qa * a[w] + qb * b[w]) + (qc * c[w] + qd * d[w])
        i += 4
    while i < n:
        a = rows[entries[i] >> 8]
        qa = np.float32(np.int8(entries[i] & 0xFF))
        for w in range(total.size):
            total[w] += qa * a[w]
        i += 1


@kernel
def _turn(y: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> None:
    pairs = cosine.size
    low = y[:pairs]
    high = y[pairs : 2 * pairs]
    for j in range(pairs):
        a = low[j]
        b = high[j]
        low[j] = a * cosine[j] - b * sine[j]
        high[j] = b * cosine[j] + a * sine[j]


@kernel
def _round(bits: np.ndarray, out: np.ndarray) -> None:
    """float32 → bfloat16, to nearest, ties to even."""
    for i in range(bits.size):
        x = bits[i]
        out[i] = np.uint16((x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel
def decode_values(
    inverse: Inverse,
    coefficients: int,
    rotation: Rotation,
    entries: np.ndarray,
    filled: np.ndarray,
    tokens: np.ndarray,
    flat: np.ndarray,
    offsets: np.ndarray,
    token_stride: int,
) -> None:
    """Values of a unit's coded tokens into `flat`: u16 for bfloat16, u32 for float32 bits.

    coefficients: how many the level codes. entries, filled: of `transform_streams.decode_unit`. tokens: int64, which of
    the cell's tokens each coded one is. offsets: int64 [vector]; vector v of token t begins at offsets[v] + t ·
    token_stride, its channels side by side.
    """
    width = inverse.scale.size
    vectors = offsets.size
    channels = width // vectors
    together = min(vectors, max(1, _BLOCK_VALUES // channels))
    rows = np.empty((coefficients, together * channels), np.float32)
    total = np.empty(together * channels, np.float32)
    bits = total.view(np.uint32)
    short = flat.itemsize == 2
    for first in range(0, vectors, together):
        n = min(together, vectors - first)
        start = first * channels
        span = n * channels
        for r in range(coefficients):
            row = rows[r]
            column = inverse.columns[r, start : start + span]
            for w in range(span):
                row[w] = np.float32(column[w])
        scale = inverse.scale[start : start + span]
        mean = inverse.mean[start : start + span]
        y = total[:span]
        for i in range(tokens.size):
            token = tokens[i]
            _add_up(rows, entries[i], filled[i], y)
            for w in range(span):
                y[w] = y[w] * scale[w] + mean[w]
            for v in range(n):
                at = v * channels
                if first + v < rotation.vectors:
                    _turn(y[at : at + channels], rotation.cosine[token], rotation.sine[token])
                to = offsets[first + v] + token * token_stride
                if short:
                    _round(bits[at : at + channels], flat[to : to + channels])
                else:
                    out = flat[to : to + channels]
                    for j in range(channels):
                        out[j] = bits[at + j]
