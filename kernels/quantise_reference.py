"""`quantise.py` in plain NumPy, written to be read. Slow; the tests compare the two bit for bit. Raises nothing.

NumPy's own sums add pairwise, which rounds otherwise: `in_order` adds one after another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmcache_s3.kernels.quantise import CODE_SHIFT, MIN_CODE, REACH, block_of

MOST = 110.0


class Quantised(NamedTuple):
    """One row. q: i8 [token, head, channel]. codes: i8 [head, channel] (K) or [token, head] (V). means: [head, channel]
    (K), None (V)."""

    base: int
    codes: np.ndarray
    means: np.ndarray | None
    q: np.ndarray


def hadamard(y: np.ndarray) -> np.ndarray:
    """Float32 [..., channel] → the same shape."""
    block = block_of(y.shape[-1])
    h = block // 2
    y = y.astype(np.float32).reshape(-1, block)
    while h:
        pairs = y.reshape(-1, block // (2 * h), 2, h)
        y = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2).reshape(-1, block)
        h //= 2
    return y


def in_order(terms: np.ndarray) -> np.ndarray:
    """Sum over the first axis, in float64."""
    total = np.zeros(terms.shape[1:], np.float64)
    for term in terms:
        total = total + term
    return total


def coefficients(values: np.ndarray) -> np.ndarray:
    """Float32 [token, head, channel] → its scaled transform."""
    return (hadamard(values).reshape(values.shape) * np.float32(1 / block_of(values.shape[-1]))).astype(np.float32)


def channel_steps(y: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """(steps, means), float64 [head, channel], wanted of K's coefficients [token, head, channel]."""
    wide = y.astype(np.float64)
    mean = in_order(wide) / len(y)
    variance = in_order(wide * wide) / len(y) - mean * mean
    if not np.isfinite(variance).all():
        return np.full_like(mean, np.inf), mean
    most = np.maximum(wide.max(axis=0) - mean, mean - wide.min(axis=0))
    least = np.maximum(most, 2 * np.abs(mean)) / MOST
    return np.maximum(step * np.sqrt(np.maximum(variance, 0)), least), mean


def token_steps(y: np.ndarray, step: float) -> np.ndarray:
    """Steps, float64 [token, head], wanted of V's coefficients."""
    channels = y.shape[-1]
    squares = np.moveaxis(y.astype(np.float64) ** 2, -1, 0)
    s = [in_order(squares[i::8]) for i in range(8)]
    total = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
    return np.asarray(max(step, np.sqrt(np.float64(channels)) / MOST) * np.sqrt(total / channels))


def code_steps(steps: np.ndarray) -> tuple[int, np.ndarray] | None:
    """(base, codes i8); None where a step is too large or not finite."""
    if not (steps <= 2.0**90).all():
        return None
    bits = steps.astype(np.float32).view(np.uint32).astype(np.int64)
    code = np.maximum((bits + (1 << (CODE_SHIFT - 1))) >> CODE_SHIFT, MIN_CODE)
    base = max(int(code.sum()) // code.size, int(code.max()) - REACH)
    return base, (np.maximum(code, base - REACH) - base).astype(np.int8)


def steps_of(base: int, codes: np.ndarray) -> np.ndarray:
    """Coded steps, float32."""
    return ((codes.astype(np.int64) + base) << CODE_SHIFT).astype(np.uint32).view(np.float32)


def quantise(values: np.ndarray, step: float, *, per_token: bool) -> Quantised | None:
    """values: float32 [token, head, channel]; step: in standard deviations. None: not finite or too large."""
    with np.errstate(all="ignore"):
        y = coefficients(values)
        means64 = None
        if per_token:
            wanted = token_steps(y, step)
        else:
            wanted, means64 = channel_steps(y, step)
        coded = code_steps(wanted)
        if coded is None:
            return None
        base, codes = coded
        steps = steps_of(base, codes)
        inverse = np.float32(1) / steps
        if means64 is None:
            return Quantised(base, codes, None, nearest(y * inverse[:, :, None]))
        means = nearest(means64.astype(np.float32) / (np.float32(0.5) * steps))
        return Quantised(base, codes, means, nearest(y * inverse - means.astype(np.float32) * np.float32(0.5)))


def nearest(t: np.ndarray) -> np.ndarray:
    """i8, ties to even, −127 … 127."""
    return np.asarray(np.rint(np.clip(t, -REACH, REACH)).astype(np.int8))


def dequantise(row: Quantised) -> np.ndarray:
    """Float32 [token, head, channel]."""
    steps = steps_of(row.base, row.codes)
    q = row.q.astype(np.float32)
    if row.means is None:
        y = q * steps[:, :, None]
    else:
        y = (q + row.means.astype(np.float32) * np.float32(0.5)) * steps
    return hadamard(y).reshape(row.q.shape)
