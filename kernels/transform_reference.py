"""What encodes and decodes the values of a `transform` unit, written to be read: `transform_forward.py`,
`transform_values.py` and `transform_products.py`. The tests compare them.

Pure; raises nothing.
"""

from __future__ import annotations

import numpy as np


def decode_values(
    inverse: np.ndarray,
    scale: np.ndarray,
    mean: np.ndarray,
    q: np.ndarray,
    cosine: np.ndarray,
    sine: np.ndarray,
    vectors: int,
    turned: int,
) -> np.ndarray:
    """Values of a unit, float32 [token, vector, channel].

    inverse: int16 [value, coefficient]. scale (inverse_scale · step), mean: float32 [value]. q: int8 [coefficient,
    token]. cosine, sine: float32 [token, pair]. turned: of how many vectors, from the first, channels j and j + pairs
    are turned.
    """
    sums = inverse[:, : q.shape[0]].astype(np.int64) @ q.astype(np.int64)
    flat: np.ndarray = sums.astype(np.float32).T * scale + mean
    values: np.ndarray = flat.reshape(q.shape[1], vectors, -1)
    pairs = cosine.shape[1]
    low, high = values[:, :turned, :pairs].copy(), values[:, :turned, pairs : 2 * pairs].copy()
    c, s = cosine[:, None], sine[:, None]
    values[:, :turned, :pairs] = low * c - high * s
    values[:, :turned, pairs : 2 * pairs] = high * c + low * s
    return values


def entries_of(q: np.ndarray, streams: int) -> tuple[np.ndarray, np.ndarray]:
    """What `transform_streams.decode_unit` gives of q [coefficient, token]: (int64 [token, pair], how many each).

    Coefficient r is in stream r mod streams; a pair is two that follow one another in a stream.
    """
    pairs: list[list[int]] = []
    for stream in range(streams):
        dealt = [*range(stream, q.shape[0], streams)]
        pairs += [dealt[i : i + 2] for i in range(0, len(dealt), 2)]
    entries = np.zeros((q.shape[1], len(pairs) + 1), np.int64)
    filled = np.zeros(q.shape[1], np.int64)
    for number, pair in enumerate(pairs):
        for token in range(q.shape[1]):
            low, high = int(q[pair[0], token]), int(q[pair[1], token]) if len(pair) > 1 else 0
            if low or high:
                entries[token, filled[token]] = number << 32 | (high & 0xFFFF) << 16 | low & 0xFFFF
                filled[token] += 1
    return entries, filled


def centred(values: np.ndarray, mean: np.ndarray, cosine: np.ndarray, sine: np.ndarray, turned: int) -> np.ndarray:
    """What an encoder transforms, float32 [token, value]: values turned back, less their mean.

    values: float32 [token, vector, channel]; the others as in `decode_values`.
    """
    pairs = cosine.shape[1]
    out = values.copy()
    low, high = values[:, :turned, :pairs], values[:, :turned, pairs : 2 * pairs]
    c, s = cosine[:, None], sine[:, None]
    out[:, :turned, :pairs] = low * c + high * s
    out[:, :turned, pairs : 2 * pairs] = high * c - low * s
    flat: np.ndarray = out.reshape(len(values), -1) - mean
    return flat


def coefficients(
    x: np.ndarray, spread: np.ndarray, weights: np.ndarray, factors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(coefficients before rounding, float32 [coefficient, token]; bool [token]: they are finite and within reach).

    x: float32 [token, value], of `centred`. spread: float32 [value], weights: int16 [coefficient, value], of
    `transform_forward.Forward`; factors: float32 [coefficient], the same over the step.
    """
    x = x * spread
    lanes = np.pad(x, ((0, 0), (0, -x.shape[1] % 16))).reshape(len(x), -1, 16)
    totals = np.zeros((len(x), 16), np.float32)
    for i in range(lanes.shape[1]):
        totals += lanes[:, i] * lanes[:, i]
    squares = np.zeros(len(x), np.float32)
    for lane in range(16):
        squares += totals[:, lane]
    finite = squares < np.inf
    length = np.maximum(np.sqrt(squares), np.float32(1e-18))
    length[~finite] = 1.0
    rounded = np.rint(np.where(finite[:, None], x, 0.0) * (np.float32(32_760.0) / length)[:, None])
    sums = weights.astype(np.int64) @ rounded.astype(np.int64).T
    found: np.ndarray = sums.astype(np.float32) * (length / np.float32(32_760.0)) * factors[:, None]
    return found, finite & (np.abs(found) < 127.5).all(axis=0)
