"""Uniform quantisation of one layer's K or V, `[token, head, channel]` float32, to symbols and back.

A value is `mean + q · step`; q within ±31 is the symbol q + 31, any other an escape (symbol 63) with q stored apart.
Two ways to scale: *per channel* (K: mean and step of each head and channel over the tokens) and *per token* (V: step of
each token and head over the channels, no mean). Steps are coded in 8 bits: the upper 12 bits of a float32, less a base.

`quantise_reference.py` is the same in plain NumPy; both give the same bits on every machine (sums run in token or
channel order in float64). Threads: safe, no GIL. Raises nothing; values must be finite.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.rans_tables import ESCAPE, LARGEST

MAX_QUANTISED = 32767
STEP_SHIFT = 20
"""A step code counts float32 bit patterns in units of 2²⁰: three bits of mantissa, 12.5 % apart."""
MIN_STEP_CODE = 8
"""The smallest normal float32."""
MAX_STEP_CODE = 0x7F7
"""The largest finite one."""


class Quantised(NamedTuple):
    """symbols: u8 [head, channel, token]. escapes: i16, in the symbols' order.

    means: u16 [head, channel], bfloat16 bits; zeros where scaled per token. base and codes, u8 [head, channel] or
    [token, head]: a step is the float32 whose bits are (base + code) << 20.
    """

    symbols: np.ndarray
    escapes: np.ndarray
    means: np.ndarray
    base: int
    codes: np.ndarray


def quantise(values: np.ndarray, sixteenths: int, *, per_token: bool) -> Quantised:
    """values: finite float32 [token, head, channel], C order. sixteenths: step in 1/16 standard deviations."""
    tokens, heads, channels = values.shape
    means = np.zeros((heads, channels), np.uint16)
    deviations = np.empty((tokens, heads) if per_token else (heads, channels), np.float64)
    if per_token:
        _token_deviations(values, deviations)
    else:
        _channel_deviations(values, means, deviations)
    base, codes = code_steps(deviations, sixteenths)
    steps = steps_of(base, codes)
    means32 = bfloat16_values(means)
    symbols = np.empty((heads, channels, tokens), np.uint8)
    count = _symbols(values, means32, steps, per_token, symbols)
    escapes = np.empty(count, np.int16)
    if count:
        _escapes(values, means32, steps, per_token, symbols, escapes)
    return Quantised(symbols, escapes, means, base, codes)


def dequantise(quantised: Quantised, out: np.ndarray, *, per_token: bool) -> None:
    """Undo into `out`, float32 [token, head, channel], C order. There must be as many escapes as symbols say."""
    steps = steps_of(quantised.base, quantised.codes)
    means32 = bfloat16_values(quantised.means)
    _values(quantised.symbols, means32, steps, per_token, out)
    if len(quantised.escapes):
        _escaped_values(quantised.symbols, quantised.escapes, means32, steps, per_token, out)


def code_steps(deviations: np.ndarray, sixteenths: int) -> tuple[int, np.ndarray]:
    """(base, u8 codes) of the steps `deviation · sixteenths ÷ 16`; too small ones become the smallest."""
    with np.errstate(over="ignore"):
        bits = (deviations * (sixteenths / 16)).astype(np.float32).view(np.uint32)
    rounded = np.minimum((bits + np.uint32(1 << (STEP_SHIFT - 1))) >> np.uint32(STEP_SHIFT), MAX_STEP_CODE)
    base = max(MIN_STEP_CODE, int(rounded.max()) - 255)
    return base, np.clip(rounded.astype(np.int64) - base, 0, 255).astype(np.uint8)


def steps_of(base: int, codes: np.ndarray) -> np.ndarray:
    """Coded steps as float32, same shape."""
    return ((codes.astype(np.uint32) + np.uint32(base)) << np.uint32(STEP_SHIFT)).view(np.float32)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@kernel
def _token_deviations(values: np.ndarray, deviations: np.ndarray) -> None:
    tokens, heads, channels = values.shape
    for token in range(tokens):
        for head in range(heads):
            total = 0.0
            for channel in range(channels):
                x = np.float64(values[token, head, channel])
                total += x * x
            deviations[token, head] = np.sqrt(total / channels)


@kernel
def _channel_deviations(values: np.ndarray, means: np.ndarray, deviations: np.ndarray) -> None:
    tokens, heads, channels = values.shape
    total = np.zeros((heads, channels), np.float64)
    for token in range(tokens):
        for head in range(heads):
            for channel in range(channels):
                total[head, channel] += np.float64(values[token, head, channel])
    mean32 = np.empty((heads, channels), np.float32)
    for head in range(heads):
        for channel in range(channels):
            mean32[head, channel] = np.float32(total[head, channel] / tokens)
    bits = mean32.view(np.uint32)
    for head in range(heads):
        for channel in range(channels):
            b = np.uint64(bits[head, channel])
            rounded = (b + np.uint64(0x7FFF) + ((b >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
            if rounded & np.uint64(0x7FFF) == np.uint64(0x7F80):  # would round to infinity
                rounded -= np.uint64(1)
            means[head, channel] = np.uint16(rounded)
            bits[head, channel] = np.uint32(rounded << np.uint64(16))
    total[:] = 0.0
    for token in range(tokens):
        for head in range(heads):
            for channel in range(channels):
                x = np.float64(values[token, head, channel]) - np.float64(mean32[head, channel])
                total[head, channel] += x * x
    for head in range(heads):
        for channel in range(channels):
            deviations[head, channel] = np.sqrt(total[head, channel] / tokens)


@kernel
def _symbols(values: np.ndarray, means: np.ndarray, steps: np.ndarray, per_token: bool, symbols: np.ndarray) -> int:
    tokens, heads, channels = values.shape
    count = 0
    for head in range(heads):
        for token in range(tokens):
            for channel in range(channels):
                step = steps[token, head] if per_token else steps[head, channel]
                q = np.rint((values[token, head, channel] - means[head, channel]) / step)
                if abs(q) <= np.float32(LARGEST):
                    symbols[head, channel, token] = np.uint8(np.int32(q) + LARGEST)
                else:
                    symbols[head, channel, token] = ESCAPE
                    count += 1
    return count


@kernel
def _escapes(
    values: np.ndarray, means: np.ndarray, steps: np.ndarray, per_token: bool, symbols: np.ndarray, escapes: np.ndarray
) -> None:
    heads, channels, tokens = symbols.shape
    place = 0
    for head in range(heads):
        for channel in range(channels):
            for token in range(tokens):
                if symbols[head, channel, token] == ESCAPE:
                    step = steps[token, head] if per_token else steps[head, channel]
                    q = np.rint((values[token, head, channel] - means[head, channel]) / step)
                    q = min(max(q, np.float32(-MAX_QUANTISED)), np.float32(MAX_QUANTISED))
                    escapes[place] = np.int16(q)
                    place += 1


@kernel
def _values(symbols: np.ndarray, means: np.ndarray, steps: np.ndarray, per_token: bool, out: np.ndarray) -> None:
    tokens, heads, channels = out.shape
    for head in range(heads):
        for token in range(tokens):
            for channel in range(channels):
                step = steps[token, head] if per_token else steps[head, channel]
                q = np.float32(np.int32(symbols[head, channel, token]) - LARGEST)
                out[token, head, channel] = q * step + means[head, channel]


@kernel
def _escaped_values(
    symbols: np.ndarray, escapes: np.ndarray, means: np.ndarray, steps: np.ndarray, per_token: bool, out: np.ndarray
) -> None:
    heads, channels, tokens = symbols.shape
    place = 0
    for head in range(heads):
        for channel in range(channels):
            for token in range(tokens):
                if symbols[head, channel, token] == ESCAPE and place < escapes.size:
                    step = steps[token, head] if per_token else steps[head, channel]
                    out[token, head, channel] = np.float32(escapes[place]) * step + means[head, channel]
                    place += 1
