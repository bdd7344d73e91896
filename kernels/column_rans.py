"""Entropy coding of a matrix of symbols, each column with a table of its own choice: rANS with 64 interleaved lanes.

Symbols lie as their source lies in memory, `[row, column]` (tokens × channels), so nothing is transposed: symbol i of a
matrix, row after row, belongs to lane i mod 64. A lane's state is a u32 of at least 2¹⁶ while idle; all lanes share one
stream of u16 words, read forwards. Several matrices can follow one another in one stream. Encoding runs backwards from
state 2¹⁶ in every lane, so a decoder that ends with every lane at 2¹⁶ and no word left has read a whole stream.

The loops are in `column_rans_wide.py`, sixteen lanes an instruction, where the processor has them, else in
`column_rans_scalar.py`; `column_rans_reference.py` is the same, written to be read; all give the same bits. Threads:
safe, no GIL. Raises nothing; decoding answers -1 when the words end too soon. After Duda (arXiv 1311.2540) and Giesen
(arXiv 1402.3392).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmcache_s3.kernels import column_rans_scalar, column_rans_wide
from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.vectors import WIDE

LANES = column_rans_scalar.LANES
IDLE = 1 << 16
PRECISION_BITS = 12
TOTAL = 1 << PRECISION_BITS
"""The frequencies of a table sum to this; each is below it, so a table has at least two symbols."""
_FREQUENCY_AT = np.uint64(20)
_REST_AT = np.uint64(8)
_loops = column_rans_wide if WIDE else column_rans_scalar


def decoding_tables(frequencies: np.ndarray) -> np.ndarray:
    """u32 [table · slot] from frequencies u16 [table, symbol ≤ 256], each row's sum TOTAL.

    A slot holds its symbol's frequency (12 bits), the slot's place among the symbol's own (12), the symbol (8).
    """
    tables = np.empty(len(frequencies) * TOTAL, np.uint32)
    _fill(frequencies, tables)
    return tables


class EncodingTables(NamedTuple):
    """Arrays [table · symbol]: slots, u32, first slot << 12 | frequency; inverses, float64, upper reciprocals."""

    slots: np.ndarray
    inverses: np.ndarray
    symbols: int


def encoding_tables(frequencies: np.ndarray) -> EncodingTables:
    """Of frequencies u16 [table, symbol ≤ 256], each row's sum TOTAL."""
    wide = frequencies.astype(np.uint32)
    starts = np.cumsum(wide, axis=1, dtype=np.uint32) - wide
    # The smallest double above 1/f: its product with an integer below 2³² is never below the true quotient, and less
    # than 2⁻¹⁹ above it, which is less than 1/f; so cutting it off gives the integer quotient exactly.
    inverse = np.nextafter(1.0 / np.maximum(wide, 1), 2.0)
    return EncodingTables((wide | starts << np.uint32(PRECISION_BITS)).reshape(-1), inverse.reshape(-1), wide.shape[1])


def normalised(counts: np.ndarray) -> np.ndarray:
    """Frequencies u16 [table, symbol] for counts [table, symbol] of what is to be coded: integer arithmetic only.

    What occurs has a frequency of at least 1; nothing has all of TOTAL (the coder's states would overflow), so where
    one symbol alone occurs, its neighbour gets one slot. A table without any counts codes symbol 0 and 1.
    """
    frequencies = np.zeros(counts.shape, np.int64)
    _normalise(counts.astype(np.int64), frequencies)
    return frequencies.astype(np.uint16)


def encode(
    symbols: np.ndarray,
    chosen: np.ndarray,
    tables: EncodingTables,
    states: np.ndarray,
    words: np.ndarray,
    place: int,
) -> int:
    """Put a matrix before what `words[place:]` holds; the new place.

    symbols: u8 [row, column], C order, of frequency > 0 in the column's table. chosen: u8 [column]. states: u32 [64],
    updated. words: u16, with room for one word a symbol and 64 more before `place`.
    """
    columns = symbols.shape[1]
    offsets = _repeated(chosen.astype(np.uint32) * np.uint32(tables.symbols))
    flat = symbols.reshape(-1)
    return int(_loops.encode(flat, 0, columns, offsets, tables.slots, tables.inverses, states, words, place))


def decode(
    states: np.ndarray, words: np.ndarray, place: int, chosen: np.ndarray, tables: np.ndarray, out: np.ndarray
) -> int:
    """Read a matrix from `words[place:]` into `out`, u8 [row, column], C order; the new place, or -1.

    words: u16, ending in 64 that are not part of the stream. chosen: u8 [column], each a table there is. Never reads
    past the words; what is in `out` after -1 is undefined.
    """
    offsets = _repeated(chosen.astype(np.uint32) << np.uint32(PRECISION_BITS))
    return int(_loops.decode(states, words, place, offsets, tables, out.reshape(-1), 0, out.shape[1]))


def _repeated(offsets: np.ndarray) -> np.ndarray:
    """Over and over, so that those of 64 symbols lie side by side wherever the first is."""
    return np.resize(offsets, len(offsets) + LANES)


@kernel
def _fill(frequencies: np.ndarray, tables: np.ndarray) -> None:
    place = 0
    for table in range(frequencies.shape[0]):
        for symbol in range(frequencies.shape[1]):
            frequency = np.uint64(frequencies[table, symbol])
            for rest in range(frequencies[table, symbol]):
                tables[place] = np.uint32(
                    (frequency << _FREQUENCY_AT) | (np.uint64(rest) << _REST_AT) | np.uint64(symbol)
                )
                place += 1


@kernel
def _normalise(counts: np.ndarray, frequencies: np.ndarray) -> None:
    tables, symbols = counts.shape
    for table in range(tables):
        row = frequencies[table]
        total = max(counts[table].sum(), 1)
        kinds = excess = 0
        for symbol in range(symbols):
            count = counts[table, symbol]
            if count > 0:
                row[symbol] = max((count * TOTAL + total // 2) // total, 1)
                kinds += 1
        if kinds < 2:
            only = row.argmax()
            row[only] = TOTAL - 1
            row[only - 1 if only else 1] = 1
        excess = row.sum() - TOTAL
        while excess != 0:
            largest = row.argmax()
            # A quarter at a time where it has to shrink: rounding up many rare symbols must not fall on one alone.
            row[largest] -= min(excess, max(1, row[largest] // 4))
            excess = row.sum() - TOTAL
