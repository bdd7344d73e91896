"""The static tables that quantised values are coded with, and how they are made: integer arithmetic only.

A table is a *family* (Gaussian, half Gaussian and half geometric, geometric) of a *width*: 24 narrow widths, 0.15 … 2.1
quantisation steps, whose symbols are pairs of values, and 13 wide ones, 2.4 … 38, whose symbols are single values.
Table = family · 37 + width. Each gives frequencies that sum to 4096 to the escape (symbol 0, its values are stored
apart) and to at most 255 other symbols: those pairs or values whose probability rounds to at least 1/4096. Readers
rebuild them exactly: this file is part of the format (FORMAT.md §7.1). Pure; raises nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

PRECISION_BITS = 12
TOTAL = 1 << PRECISION_BITS
ESCAPE = 0
COST_BITS = 8
"""Costs are in 1/256 bit."""

# fmt: off
GAUSSIAN_RATIOS: tuple[int, ...] = (
    754, 956, 1214, 1544, 1969, 2520, 3239, 4186, 5448, 7150, 9471, 12637, 16813, 21871, 27335, 32726, 37766, 42314,
    46311, 49750, 52660, 55091, 57100, 58746, 60087, 62048, 63317, 64129, 64646, 64974, 65181, 65312, 65395, 65447,
    65480, 65501, 65514,
)
"""65536 · r, weight r^(k²) of value k; standard deviations 0.15 · 2^(i ÷ 6), i = 0 … 24, then 2.4 · 2^(j ÷ 3)."""
GEOMETRIC_RATIOS: tuple[int, ...] = (
    721, 903, 1130, 1412, 1759, 2187, 2710, 3346, 4112, 5028, 6110, 7374, 8831, 10487, 12338, 14377, 16584, 18936,
    21401, 23944, 26532, 29127, 31698, 34216, 36655, 41226, 45308, 48863, 51898, 54449, 56567, 58308, 59730, 60883,
    61815, 62565, 63166,
)
"""The same, weight r^|k|."""
# fmt: on
WIDTHS = len(GAUSSIAN_RATIOS)
PAIR_WIDTHS = 24
FAMILIES = 3
TABLES = FAMILIES * WIDTHS
PAIR_REACH = 16
"""Pairs hold values −16 … 16."""
REACH = 127
"""Single values, and values of escapes, are −127 … 127."""
_SIDE = 2 * PAIR_REACH + 1


def codes_pairs(table: int) -> bool:
    """Whether a symbol of this table is two values."""
    return table % WIDTHS < PAIR_WIDTHS


def _normalised(ratio: int, square: bool, reach: int) -> list[int]:
    """⌊2²⁴ · probability⌋ of value ±k, k = 0 … reach; weights and their ratios in units of 2⁻³⁰, rounded down."""
    weights = [1 << 30]
    step = ratio << 14
    for _ in range(reach):
        weights.append(weights[-1] * step >> 30)
        if square:
            step = step * (ratio * ratio) >> 32
    total = weights[0] + 2 * sum(weights[1:])
    return [(weight << 24) // total for weight in weights]


def probabilities(table: int) -> list[int]:
    """2²⁴ · probability of value ±k, k = 0 … 16 or 127."""
    family, width = divmod(table, WIDTHS)
    reach = PAIR_REACH if codes_pairs(table) else REACH
    gaussian = _normalised(GAUSSIAN_RATIOS[width], True, reach)
    geometric = _normalised(GEOMETRIC_RATIOS[width], False, reach)
    mixed = [(a + b) // 2 for a, b in zip(gaussian, geometric, strict=True)]
    return (gaussian, mixed, geometric)[family]


def symbols_of(table: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """(values, frequencies) of symbols 0, 1, …; the escape, symbol 0, has no values."""
    p = probabilities(table)
    weights: dict[tuple[int, ...], int]
    if codes_pairs(table):
        span = range(-PAIR_REACH, PAIR_REACH + 1)
        scale = 48
        weights = {(a, b): p[abs(a)] * p[abs(b)] for a in span for b in span}
    else:
        scale = 24
        weights = {(a,): p[abs(a)] for a in range(-REACH, REACH + 1)}
    unit = 1 << (scale - PRECISION_BITS)
    kept = {values: (weight + unit // 2) // unit for values, weight in weights.items()}
    kept = {values: frequency for values, frequency in kept.items() if frequency}
    rest = (1 << scale) - sum(weights[values] for values in kept)
    escape = max(1, (rest + unit // 2) // unit)
    centre: tuple[int, ...] = (0, 0) if codes_pairs(table) else (0,)
    kept[centre] += TOTAL - escape - sum(kept.values())
    return [(), *kept], [escape, *kept.values()]


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


def costs_of(table: int, escape_frequency: int) -> list[int]:
    """What value ±k costs, k = 0 … 127, in 1/256 bit, about: a pair is taken for two independent halves."""
    p = probabilities(table)
    # Eight bits for an escaped value, half as much again where it takes a partner along.
    stored = 12 if codes_pairs(table) else 8
    escape = ((PRECISION_BITS + stored) << COST_BITS) - log2_fixed(escape_frequency)
    costs = [min(escape, (24 << COST_BITS) - log2_fixed(weight)) if weight else escape for weight in p]
    return costs + [escape] * (REACH + 1 - len(costs))


class Tables(NamedTuple):
    """All tables as the kernels want them; read-only.

    slots: u32 [table, 4096], symbol << 24 | frequency << 12 | slot − start. values: u16 [table, 256], the symbol's
    values as two i8, the first in the low byte. pairs: bool [table]. symbols: u8 [table, 33 · 33], symbol of the
    pair at (a + 16) · 33 + b + 16, or of the value at a + 128; 0 where there is none. frequencies, starts:
    u32 [table, 256]. reciprocals: u64 [table, 256], ⌈2⁴⁴ ÷ frequency⌉. entries: u32 [table, 33 · 33 + 1], as `symbols`,
    escape << 31 | start << 12 | frequency, the last one an escape. costs: u32 [table, 128], `costs_of`.
    """

    slots: np.ndarray
    values: np.ndarray
    pairs: np.ndarray
    symbols: np.ndarray
    frequencies: np.ndarray
    starts: np.ndarray
    reciprocals: np.ndarray
    entries: np.ndarray
    costs: np.ndarray


@lru_cache(maxsize=1)
def all_tables() -> Tables:
    slots = np.empty((TABLES, TOTAL), np.uint32)
    values = np.zeros((TABLES, 256, 2), np.int8)
    symbols = np.zeros((TABLES, _SIDE * _SIDE), np.uint8)
    frequencies = np.ones((TABLES, 256), np.uint32)
    starts = np.zeros((TABLES, 256), np.uint32)
    entries = np.empty((TABLES, _SIDE * _SIDE + 1), np.uint32)
    costs = np.empty((TABLES, REACH + 1), np.uint32)
    for table in range(TABLES):
        of, frequency = symbols_of(table)
        count = len(of)
        frequencies[table, :count] = frequency
        starts[table, 1:count] = np.cumsum(frequency)[:-1]
        packed = np.arange(count) << 24 | frequencies[table, :count].astype(np.int64) << PRECISION_BITS
        slots[table] = np.repeat(packed, frequency) + np.arange(TOTAL) - np.repeat(starts[table, :count], frequency)
        for symbol, these in enumerate(of[1:], 1):
            values[table, symbol, : len(these)] = these
            place = (these[0] + PAIR_REACH) * _SIDE + these[1] + PAIR_REACH if len(these) == 2 else these[0] + 128
            symbols[table, place] = symbol
        packed = starts[table].astype(np.int64) << PRECISION_BITS | frequencies[table]
        packed[ESCAPE] |= 1 << 31
        entries[table] = packed[np.append(symbols[table], np.uint8(ESCAPE))]
        costs[table] = costs_of(table, frequency[ESCAPE])
    made = Tables(
        slots,
        values.view("<u2")[:, :, 0].astype(np.uint16),
        np.array([codes_pairs(table) for table in range(TABLES)]),
        symbols,
        frequencies,
        starts,
        -(-(1 << 44) // frequencies.astype(np.int64)).astype(np.int64).view(np.uint64),
        entries,
        costs,
    )
    for array in made:
        array.flags.writeable = False
    return made
