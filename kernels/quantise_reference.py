"""`quantise.py` in plain NumPy, written to be read. Slow; the tests compare the two bit for bit. Raises nothing."""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels.quantise import MAX_QUANTISED, Quantised, bfloat16_values, code_steps, steps_of
from lmcache_s3.kernels.rans_tables import ESCAPE, LARGEST


def in_order(terms: np.ndarray) -> np.ndarray:
    """Sum over the first axis, one after another: NumPy's own `sum` adds pairwise, which rounds otherwise."""
    total = np.zeros(terms.shape[1:], np.float64)
    for term in terms:
        total = total + term
    return total


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 → bfloat16 bits, to nearest, ties to even; never to infinity."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(rounded & 0x7FFF == 0x7F80, rounded - 1, rounded)
    return rounded.astype(np.uint16)


def quantise(values: np.ndarray, sixteenths: int, *, per_token: bool) -> Quantised:
    """As `quantise.quantise`."""
    tokens, heads, channels = values.shape
    wide = values.astype(np.float64)
    if per_token:
        means = np.zeros((heads, channels), np.uint16)
        deviations = np.sqrt(in_order(np.moveaxis(wide * wide, 2, 0)) / channels)
    else:
        means = to_bfloat16((in_order(wide) / tokens).astype(np.float32))
        centred = wide - bfloat16_values(means).astype(np.float64)
        deviations = np.sqrt(in_order(centred * centred) / tokens)
    base, codes = code_steps(deviations, sixteenths)
    with np.errstate(over="ignore"):
        q = np.rint((values - bfloat16_values(means)) / _broadcast(steps_of(base, codes), per_token))
    q = np.transpose(np.clip(q, -MAX_QUANTISED, MAX_QUANTISED), (1, 2, 0)).astype(np.int32)
    escaped = np.abs(q) > LARGEST
    symbols = np.where(escaped, ESCAPE, q + LARGEST).astype(np.uint8)
    return Quantised(symbols, q[escaped].astype(np.int16), means, base, codes)


def dequantise(quantised: Quantised, *, per_token: bool) -> np.ndarray:
    """As `quantise.dequantise`, into a new array."""
    q = quantised.symbols.astype(np.int32) - LARGEST
    q[quantised.symbols == ESCAPE] = quantised.escapes
    steps = _broadcast(steps_of(quantised.base, quantised.codes), per_token)
    with np.errstate(over="ignore"):
        values = np.transpose(q, (2, 0, 1)).astype(np.float32) * steps + bfloat16_values(quantised.means)
    return np.ascontiguousarray(values)


def _broadcast(steps: np.ndarray, per_token: bool) -> np.ndarray:
    """Steps against [token, head, channel]."""
    return steps[:, :, None] if per_token else steps[None, :, :]
