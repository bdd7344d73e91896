"""The static tables that quantised symbols are coded with, and how they are made: integer arithmetic only.

Symbols 0 … 62 stand for quantised values −31 … 31, symbol 63 for any other (*escape*, its value stored apart). A table
gives each symbol a frequency of 1 … 4096 − 63; all sum to 4096. There are 32: for each of 16 widths, a two-sided
geometric one (weight r^|k|) and a Gaussian one (weight r^(k²)), r = RATIOS[…] ÷ 65536. Readers rebuild them exactly:
this file is part of the format (FORMAT.md). Pure; raises nothing.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

PRECISION_BITS = 12
TOTAL = 1 << PRECISION_BITS
SYMBOLS = 64
LARGEST = 31
ESCAPE = 63
COST_BITS = 8
"""Costs are in 1/256 bit."""

GEOMETRIC_RATIOS: tuple[int, ...] = (
    721,
    1272,
    2214,
    3778,
    6246,
    9874,
    14747,
    20655,
    27130,
    33615,
    39650,
    44956,
    49424,
    53070,
    55976,
    58254,
)
GAUSSIAN_RATIOS: tuple[int, ...] = (
    754,
    1378,
    2557,
    4881,
    9788,
    19994,
    33627,
    45176,
    53260,
    58380,
    61444,
    63222,
    64236,
    64808,
    65129,
    65309,
)
"""Standard deviations 0.15 … 12 quantisation steps, in equal ratios."""
TABLES = 32


def frequencies(table: int) -> list[int]:
    """The 64 frequencies of one table."""
    geometric = table < TABLES // 2
    ratio = GEOMETRIC_RATIOS[table] if geometric else GAUSSIAN_RATIOS[table - TABLES // 2]
    top = LARGEST if geometric else LARGEST * LARGEST
    # Weight of k over the common denominator 65536^top: ratio^e · 65536^(top − e).
    weights = []
    for k in range(-LARGEST, LARGEST + 1):
        exponent = abs(k) if geometric else k * k
        weights.append(ratio**exponent << (16 * (top - exponent)))
    total = sum(weights)
    spare = TOTAL - SYMBOLS
    result = [1 + spare * weight // total for weight in weights] + [1]
    result[LARGEST] += TOTAL - sum(result)
    return result


def log2_fixed(n: int) -> int:
    """⌊256 · log₂ n⌋ for n ≥ 1, by repeated squaring."""
    whole = n.bit_length() - 1
    mantissa = n << (62 - whole)  # in [2^62, 2^63)
    fraction = 0
    for _ in range(COST_BITS):
        mantissa = mantissa * mantissa >> 62
        fraction <<= 1
        if mantissa >> 63:
            fraction |= 1
            mantissa >>= 1
    return (whole << COST_BITS) + fraction


@lru_cache(maxsize=1)
def all_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(frequency u32 [32, 64], start u32 [32, 64], symbol of each slot u8 [32, 4096], cost u32 [32, 64]); read-only."""
    frequency = np.array([frequencies(table) for table in range(TABLES)], np.uint32)
    start = np.zeros_like(frequency)
    start[:, 1:] = np.cumsum(frequency[:, :-1], axis=1)
    slots = np.stack([np.repeat(np.arange(SYMBOLS, dtype=np.uint8), row) for row in frequency])
    cost_of = [0, *((PRECISION_BITS << COST_BITS) - log2_fixed(n) for n in range(1, TOTAL + 1))]
    cost = np.array(cost_of, np.uint32)[frequency]
    for array in (frequency, start, slots, cost):
        array.flags.writeable = False
    return frequency, start, slots, cost
