"""Entropy coding of a matrix of symbols, each column with a table of its own choice: rANS with 32 interleaved lanes.

Symbols lie as their source lies in memory, `[row, column]` (tokens × channels), so nothing is transposed: column c of
every row belongs to lane c mod 32. A lane's state is a u32 of at least 2¹⁶ while idle; all lanes share one stream of
u16 words, read forwards. Several matrices can follow one another in one stream. Encoding runs backwards from state 2¹⁶
in every lane, so a decoder that ends with every lane at 2¹⁶ and no word left has read a whole stream.

`column_rans_reference.py` is the same, written to be read; both give the same bits. Threads: safe, no GIL. Raises
nothing; decoding answers -1 when the words end too soon. After Duda (arXiv 1311.2540) and Giesen (arXiv 1402.3392).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmcache_s3.kernels.jit import kernel

LANES = 32
IDLE = 1 << 16
PRECISION_BITS = 12
TOTAL = 1 << PRECISION_BITS
"""The frequencies of a table sum to this; each is below it, so a table has at least two symbols."""

_BITS = np.uint64(PRECISION_BITS)
_SLOT = np.uint64(TOTAL - 1)
_ROOM = np.uint64(32 - PRECISION_BITS)
_IDLE = np.uint64(IDLE)
_WORD_BITS = np.uint64(16)
_WORD = np.uint64(0xFFFF)
_BYTE = np.uint64(0xFF)
_ONE = np.uint64(1)
_FREQUENCY_AT = np.uint64(20)
_REST_AT = np.uint64(8)
_STEP = np.uint64(LANES)


def decoding_tables(frequencies: np.ndarray) -> np.ndarray:
    """u32 [table · slot] from frequencies u16 [table, symbol ≤ 256], each row's sum TOTAL.

    A slot holds its symbol's frequency (12 bits), the slot's place among the symbol's own (12), the symbol (8).
    """
    tables = np.empty(len(frequencies) * TOTAL, np.uint32)
    _fill(frequencies, tables)
    return tables


class EncodingTables(NamedTuple):
    """slots: u32 [table · symbol], frequency and first slot. inverses: float64 [table · symbol], upper reciprocals."""

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
    return EncodingTables((wide | starts << np.uint32(16)).reshape(-1), inverse.reshape(-1), wide.shape[1])


def normalised(counts: np.ndarray) -> np.ndarray:
    """Frequencies u16 [table, symbol] for counts [table, symbol] of what is to be coded: integer arithmetic only.

    What occurs has a frequency of at least 1; nothing has all of TOTAL (the coder's states would overflow), so where
    one symbol alone occurs, its neighbour gets one slot. A table without any counts codes symbol 0 and 1.
    """
    counts = counts.astype(np.int64)
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    frequencies = np.where(counts > 0, np.maximum((counts * TOTAL + total // 2) // total, 1), 0)
    for row in frequencies:
        if np.count_nonzero(row) < 2:
            only = int(row.argmax())
            row[only], row[only - 1 if only else 1] = TOTAL - 1, 1
        while (excess := int(row.sum()) - TOTAL) != 0:
            largest = int(row.argmax())
            # A quarter at a time where it has to shrink: rounding up many rare symbols must not fall on one alone.
            row[largest] -= min(excess, max(1, int(row[largest]) // 4))
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

    symbols: u8 [row, column], C order, of frequency > 0 in the column's table. chosen: u8 [column]. states: u32 [32],
    updated. words: u16, with room for one word a symbol and one more before `place`.
    """
    offsets = chosen.astype(np.uint32) * np.uint32(tables.symbols)
    return int(_encode(symbols, offsets, tables.slots, tables.inverses, states, words, place))


def decode(
    states: np.ndarray, words: np.ndarray, place: int, chosen: np.ndarray, tables: np.ndarray, out: np.ndarray
) -> int:
    """Read a matrix from `words[place:]` into `out`, u8 [row, column], C order; the new place, or -1.

    words: u16, ending in 32 that are not part of the stream. chosen: u8 [column], each a table there is. Never reads
    past the words; what is in `out` after -1 is undefined.
    """
    return int(_decode(states, words, place, chosen.astype(np.uint32) << np.uint32(PRECISION_BITS), tables, out))


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
def _encode(
    symbols: np.ndarray,
    offsets: np.ndarray,
    slots: np.ndarray,
    inverses: np.ndarray,
    states: np.ndarray,
    words: np.ndarray,
    place: int,
) -> int:
    rows, columns = symbols.shape
    at = np.uint64(place)
    last = (columns - 1) // LANES * LANES
    for row in range(rows - 1, -1, -1):
        line = symbols[row]
        for start in range(last, -1, -LANES):
            for i in range(min(LANES, columns - start) - 1, -1, -1):
                lane = np.uint64(i)
                column = np.uint64(start) + lane
                entry = np.uint64(offsets[column]) + np.uint64(line[column])
                slot = np.uint64(slots[entry])
                frequency = slot & _WORD
                x = np.uint64(states[lane])
                full = np.uint64(x >= frequency << _ROOM)
                words[at - _ONE] = np.uint16(x & _WORD)
                at -= full
                x >>= full << np.uint64(4)
                quotient = np.uint64(np.int64(np.float64(np.int64(x)) * inverses[entry]))
                states[lane] = np.uint32((quotient << _BITS) + (x - quotient * frequency) + (slot >> _WORD_BITS))
    return np.int64(at)  # type: ignore[return-value]


@kernel
def _step(
    x: np.uint64, at: np.uint64, offset: np.uint64, words: np.ndarray, tables: np.ndarray
) -> tuple[np.uint64, np.uint64, np.uint64]:
    slot = np.uint64(tables[offset + (x & _SLOT)])
    x = (slot >> _FREQUENCY_AT) * (x >> _BITS) + ((slot >> _REST_AT) & _SLOT)
    low = x < _IDLE
    refilled = (x << _WORD_BITS) | np.uint64(words[at])
    return (refilled if low else x), at + np.uint64(low), slot & _BYTE


@kernel
def _decode(
    states: np.ndarray, words: np.ndarray, place: int, offsets: np.ndarray, tables: np.ndarray, out: np.ndarray
) -> int:
    rows, columns = out.shape
    at = np.uint64(place)
    end = np.uint64(words.size - LANES)
    whole = columns // LANES
    rest = columns - whole * LANES
    shrunk = np.empty(LANES, np.uint32)
    for row in range(rows):
        line = out[row]
        column = np.uint64(0)
        for _ in range(whole):
            if at > end:
                return -1
            # In two loops, so that the look-ups of all lanes are under way before the first word is asked for.
            for i in range(LANES):
                lane = np.uint64(i)
                x = np.uint64(states[lane])
                slot = np.uint64(tables[np.uint64(offsets[column + lane]) + (x & _SLOT)])
                shrunk[lane] = np.uint32((slot >> _FREQUENCY_AT) * (x >> _BITS) + ((slot >> _REST_AT) & _SLOT))
                line[column + lane] = np.uint8(slot & _BYTE)
            for i in range(LANES):
                lane = np.uint64(i)
                x = np.uint64(shrunk[lane])
                refilled = (x << _WORD_BITS) | np.uint64(words[at])
                states[lane] = np.uint32(refilled if x < _IDLE else x)
                at += np.uint64(x < _IDLE)
            column += _STEP
        if at > end:
            return -1
        for i in range(rest):
            lane = np.uint64(i)
            offset = np.uint64(offsets[column + lane])
            x, at, symbol = _step(np.uint64(states[lane]), at, offset, words, tables)
            states[lane] = np.uint32(x)
            line[column + lane] = np.uint8(symbol)
    return np.int64(at)  # type: ignore[return-value]
