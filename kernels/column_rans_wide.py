"""The loops of `column_rans.py` with sixteen lanes an instruction, for processors with AVX-512 (`vectors.WIDE`).

Two vectors hold the 32 lanes' states; the columns that are left of a row go through the loops there. The same bits.
Threads: safe, no GIL. Raises nothing; decoding answers -1 when the words end too soon.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels import column_rans_scalar
from lmcache_s3.kernels.jit import inlined, kernel
from lmcache_s3.kernels.rans_wide import put
from lmcache_s3.kernels.vectors import (
    Vector,
    as_u32,
    bits_of,
    count_bits,
    expand,
    gather,
    joined,
    load16,
    select,
    store,
)

_LANES = 32


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
    """As `column_rans_scalar.encode`, with room for 32 words more before `place`."""
    rows, columns = symbols.shape
    flat = symbols.reshape(-1)
    whole = columns // _LANES * _LANES
    x0, x1 = load16(states, 0), load16(states, 16)
    for row in range(rows - 1, -1, -1):
        if whole < columns:
            store(states, 0, x0)
            store(states, 16, x1)
            place = column_rans_scalar.encode(
                symbols[row : row + 1, whole:], offsets[whole:], slots, inverses, states, words, place
            )
            x0, x1 = load16(states, 0), load16(states, 16)
        for start in range(whole - _LANES, -1, -_LANES):
            at = row * columns + start
            entry1 = gather(slots, load16(offsets, start + 16) + as_u32(load16(flat, at + 16)))
            entry0 = gather(slots, load16(offsets, start) + as_u32(load16(flat, at)))
            x1, place = put(x1, entry1, words, place)
            x0, place = put(x0, entry0, words, place)
    store(states, 0, x0)
    store(states, 16, x1)
    return place


@inlined
def decode_step(
    x0: Vector, x1: Vector, words: np.ndarray, place: int, offsets: np.ndarray, column: int, tables: np.ndarray
) -> tuple[Vector, Vector, int, Vector]:
    """A symbol of each lane, for the columns from `column` on: (states, new place, symbols of 32 u32).

    At most 32 words from `place` on are looked at; the caller sees that they are there.
    """
    slot0 = gather(tables, load16(offsets, column) + (x0 & 0xFFF))
    slot1 = gather(tables, load16(offsets, column + 16) + (x1 & 0xFFF))
    x0 = (slot0 >> 20) * (x0 >> 12) + ((slot0 >> 8) & 0xFFF)
    x1 = (slot1 >> 20) * (x1 >> 12) + ((slot1 >> 8) & 0xFFF)
    low0, low1 = x0 < 0x10000, x1 < 0x10000
    more0 = (x0 << 16) | expand(low0, as_u32(load16(words, place)))
    place += count_bits(bits_of(low0))
    more1 = (x1 << 16) | expand(low1, as_u32(load16(words, place)))
    place += count_bits(bits_of(low1))
    return select(low0, more0, x0), select(low1, more1, x1), place, joined(slot0, slot1) & 0xFF


@kernel
def decode(
    states: np.ndarray, words: np.ndarray, place: int, offsets: np.ndarray, tables: np.ndarray, out: np.ndarray
) -> int:
    """As `column_rans_scalar.decode`."""
    rows, columns = out.shape
    flat = out.reshape(-1)
    end = words.size - _LANES
    whole = columns // _LANES * _LANES
    x0, x1 = load16(states, 0), load16(states, 16)
    for row in range(rows):
        for start in range(0, whole, _LANES):
            if place > end:
                return -1
            x0, x1, place, decoded = decode_step(x0, x1, words, place, offsets, start, tables)
            store(flat, row * columns + start, decoded)
        if whole < columns:
            store(states, 0, x0)
            store(states, 16, x1)
            place = column_rans_scalar.decode(states, words, place, offsets[whole:], tables, out[row : row + 1, whole:])
            if place < 0:
                return -1
            x0, x1 = load16(states, 0), load16(states, 16)
    store(states, 0, x0)
    store(states, 16, x1)
    return place
