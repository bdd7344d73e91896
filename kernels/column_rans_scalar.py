"""The loops of `column_rans.py` for any processor, and for the end of a matrix. Threads: safe, no GIL."""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels.jit import kernel

LANES = 64
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


@kernel
def encode(
    symbols: np.ndarray,
    first: int,
    columns: int,
    offsets: np.ndarray,
    slots: np.ndarray,
    inverses: np.ndarray,
    states: np.ndarray,
    words: np.ndarray,
    place: int,
) -> int:
    """Put symbols[first:], u8, of a matrix before words[place:]; the new place. first: a multiple of 64.

    offsets: u32, where the table of each column begins in `slots`, over and over, for columns + 64 symbols or more.
    """
    at = np.uint64(place)
    for block in range(first + (symbols.size - first - 1) // LANES * LANES, first - 1, -LANES):
        column = block % columns
        for i in range(min(LANES, symbols.size - block) - 1, -1, -1):
            lane = np.uint64(i)
            entry = np.uint64(offsets[np.uint64(column) + lane]) + np.uint64(symbols[np.uint64(block) + lane])
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
def decode(
    states: np.ndarray,
    words: np.ndarray,
    place: int,
    offsets: np.ndarray,
    tables: np.ndarray,
    out: np.ndarray,
    first: int,
    columns: int,
) -> int:
    """Read out[first:], u8, of a matrix from words[place:]; the new place, or -1. first, offsets: as in `encode`."""
    at = np.uint64(place)
    end = np.uint64(words.size - LANES)
    shrunk = np.empty(LANES, np.uint32)
    for block in range(first, out.size, LANES):
        if at > end:
            return -1
        column, n = block % columns, min(LANES, out.size - block)
        # In two loops, so that the look-ups of all lanes are under way before the first word is asked for.
        for i in range(n):
            lane = np.uint64(i)
            x = np.uint64(states[lane])
            slot = np.uint64(tables[np.uint64(offsets[np.uint64(column) + lane]) + (x & _SLOT)])
            shrunk[lane] = np.uint32((slot >> _FREQUENCY_AT) * (x >> _BITS) + ((slot >> _REST_AT) & _SLOT))
            out[np.uint64(block) + lane] = np.uint8(slot & _BYTE)
        for i in range(n):
            lane = np.uint64(i)
            x = np.uint64(shrunk[lane])
            refilled = (x << _WORD_BITS) | np.uint64(words[at])
            states[lane] = np.uint32(refilled if x < _IDLE else x)
            at += np.uint64(x < _IDLE)
    return np.int64(at)  # type: ignore[return-value]
