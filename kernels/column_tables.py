"""An encoder's choice: a few tables of frequencies for many columns of symbols, and one of them for each column.

Columns with like histograms share a table (Lloyd's iteration, with code length as the distance). Integer arithmetic
only, so the same columns give the same tables on every machine; but a decoder needs nothing of this, and an encoder may
choose otherwise. `assign_reference` is `assign` written to be read; both give the same numbers. Raises nothing.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from lmcache_s3.kernels import column_tables_wide
from lmcache_s3.kernels.column_rans import PRECISION_BITS, TOTAL, normalised
from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.vectors import WIDE

ROUNDS = 3
_COST_BITS = 8
"""Costs are in 1/256 bit."""
ZEROS, LONG = 0, 240
"""First bytes in stored tables: of a run of zeros, and of frequencies of two bytes."""


@cache
def _cost_of() -> np.ndarray:
    """i64 [TOTAL]: ⌈256 · bits⌉ of a symbol of each frequency; what a table does not have yet counts as its rarest."""
    scale = 1 << _COST_BITS
    # The bit length of n^256 is ⌊256 · log₂ n⌋ + 1, exactly.
    return np.array(
        [PRECISION_BITS * scale] + [PRECISION_BITS * scale + 1 - (n**scale).bit_length() for n in range(1, TOTAL)],
        np.int32,
    )


def costs(frequencies: np.ndarray) -> np.ndarray:
    """i32 [symbol, table] of frequencies u16 [table, symbol], in 1/256 bit."""
    return np.ascontiguousarray(_cost_of()[frequencies].T)


def assign(counts: np.ndarray, cost: np.ndarray, pooled: np.ndarray, chosen: np.ndarray) -> None:
    """The cheapest table of each column (of equals the first) to `chosen`, u8 [column]; its counts added to that table.

    counts: u32 [column, symbol]. cost: as of `costs`. pooled: i64 [table, symbol].
    """
    if WIDE and cost.shape[1] <= column_tables_wide.WIDEST:
        column_tables_wide.assign(counts, cost, pooled, chosen)
    else:
        _assign(counts, cost, pooled, chosen)


def assign_reference(counts: np.ndarray, cost: np.ndarray, pooled: np.ndarray, chosen: np.ndarray) -> None:
    chosen[:] = (counts.astype(np.int64) @ cost).argmin(axis=1)
    np.add.at(pooled, chosen, counts)


def make_tables(counts: np.ndarray, groups: np.ndarray, most: int) -> np.ndarray:
    """At most so many tables, frequencies u16 [table, symbol], for columns with these counts, u32 [column, symbol].

    groups: int [column], a first guess of which belong together; the largest groups are where it begins.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    kept = np.sort(np.argsort(-sizes, kind="stable")[:most])
    pooled = np.zeros((len(kept), counts.shape[1]), np.int64)
    for table, number in enumerate(kept):
        pooled[table] = counts[group == number].sum(axis=0, dtype=np.int64)
    chosen = np.empty(len(counts), np.uint8)
    for _ in range(ROUNDS):
        frequencies = normalised(pooled)
        pooled = np.zeros_like(pooled)
        assign(counts, costs(frequencies), pooled, chosen)
        pooled = pooled[pooled.any(axis=1)]
    return normalised(pooled)


@kernel
def _assign(counts: np.ndarray, cost: np.ndarray, pooled: np.ndarray, chosen: np.ndarray) -> None:
    columns, symbols = counts.shape
    bits = np.empty(cost.shape[1], np.int32)  # 65,536 tokens of 12 bits fit
    for column in range(columns):
        bits[:] = 0
        for symbol in range(symbols):
            count = np.int32(counts[column, symbol])
            if count:
                for table in range(bits.size):
                    bits[table] += np.int32(count * cost[symbol, table])
        best = 0
        for table in range(1, bits.size):
            if bits[table] < bits[best]:
                best = table
        chosen[column] = best
        for symbol in range(symbols):
            pooled[best, symbol] += np.int64(counts[column, symbol])


def write(frequencies: np.ndarray) -> bytes:
    """Tables as a stored cell has them, of frequencies `[table, symbol]`, as `read` reads them."""
    out = bytearray()
    for row in frequencies.tolist():
        zeros = 0
        for frequency in (*row, -1):
            if frequency == 0:
                zeros += 1
                continue
            if zeros:
                out += bytes((ZEROS, zeros))
            zeros = 0
            if frequency >= LONG:
                out += bytes((LONG + (frequency >> 8), frequency & 255))
            elif frequency > 0:
                out.append(frequency)
    return bytes(out)


def read(data: np.ndarray, frequencies: np.ndarray) -> int:
    """Tables as a stored cell has them, u8, into `frequencies`, u16 zeros, one after another; how many bytes they took.

    A byte below 240 is a frequency; one above, with the next byte, a frequency of up to 12 bits; 0 stands for as many
    zeros as the next byte says. -1: fewer than two bytes are left before the last, no zeros, or more than there are.
    """
    return int(_read(data, frequencies))


@kernel
def _read(data: np.ndarray, frequencies: np.ndarray) -> int:
    at = place = 0
    while place < frequencies.size:
        if at + 2 > data.size:
            return -1
        first, second = int(data[at]), int(data[at + 1])
        if first == ZEROS:
            if second == 0 or place + second > frequencies.size:
                return -1
            place += second
            at += 2
        elif first >= LONG:
            frequencies[place] = (first - LONG) << 8 | second
            place += 1
            at += 2
        else:
            frequencies[place] = first
            place += 1
            at += 1
    return at
