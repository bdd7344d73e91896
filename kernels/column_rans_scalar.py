"""The loops of `column_rans.py` for any processor, and for the last columns of a row. Threads: safe, no GIL."""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels.jit import kernel

LANES = 32
_BITS = np.uint64(12)
_SLOT = np.uint64(0xFFF)
_ROOM = np.uint64(20)
_IDLE = np.uint64(1 << 16)
_WORD_BITS = np.uint64(16)
_WORD = np.uint64(0xFFFF)
_BYTE = np.uint64(0xFF)
_ONE = np.uint64(1)
_FREQUENCY_AT = np.uint64(20)
_REST_AT = np.uint64(8)
_STEP = np.uint64(LANES)


@kernel
def encode(
    symbols: np.ndarray,
    offsets: np.ndarray,
    slots: np.ndarray,
    inverses: np.ndarray,
    states: np.ndarray,
    words: np.ndarray,
    place: int,
) -> int:
    """Put a matrix before words[place:]; the new place. offsets: u32 [column], where its table begins in `slots`."""
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
                frequency = slot & _SLOT
                x = np.uint64(states[lane])
                full = np.uint64(x >= frequency << _ROOM)
                words[at - _ONE] = np.uint16(x & _WORD)
                at -= full
                x >>= full << np.uint64(4)
                quotient = np.uint64(np.int64(np.float64(np.int64(x)) * inverses[entry]))
                states[lane] = np.uint32((quotient << _BITS) + (x - quotient * frequency) + (slot >> _BITS))
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
def decode(
    states: np.ndarray, words: np.ndarray, place: int, offsets: np.ndarray, tables: np.ndarray, out: np.ndarray
) -> int:
    """Read a matrix from words[place:]; the new place, or -1. offsets: u32 [column], where its table begins."""
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
