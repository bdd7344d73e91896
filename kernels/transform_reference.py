"""`transform_values.py` and `transform_products.py` written to be read, over one unit. The tests compare them.

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
