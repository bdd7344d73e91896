"""The loops of `column_rans.py` with sixteen lanes an instruction, for processors with AVX-512 (`vectors.WIDE`).

Four vectors hold the 64 lanes' states: a look-up takes long, but those of the four are under way together. What is left
at a matrix's end goes through `column_rans_scalar.py`. The same bits. Threads: safe, no GIL. Raises nothing; decoding
answers -1 when the words end too soon.
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
    load16,
    select,
    store,
)

LANES = column_rans_scalar.LANES


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
    """As `column_rans_scalar.encode`, with room for 64 words more before `place`."""
    whole = first + (symbols.size - first) // LANES * LANES
    place = column_rans_scalar.encode(symbols, whole, columns, offsets, slots, inverses, states, words, place)
    x0, x1, x2, x3 = load16(states, 0), load16(states, 16), load16(states, 32), load16(states, 48)
    column = whole % columns
    for at in range(whole - LANES, first - 1, -LANES):
        column = (column - LANES) % columns
        entry3 = gather(slots, load16(offsets, column + 48) + as_u32(load16(symbols, at + 48)))
        entry2 = gather(slots, load16(offsets, column + 32) + as_u32(load16(symbols, at + 32)))
        entry1 = gather(slots, load16(offsets, column + 16) + as_u32(load16(symbols, at + 16)))
        entry0 = gather(slots, load16(offsets, column) + as_u32(load16(symbols, at)))
        x3, place = put(x3, entry3, words, place)
        x2, place = put(x2, entry2, words, place)
        x1, place = put(x1, entry1, words, place)
        x0, place = put(x0, entry0, words, place)
    store(states, 0, x0)
    store(states, 16, x1)
    store(states, 32, x2)
    store(states, 48, x3)
    return place


@inlined
def looked_up(x: Vector, offsets: np.ndarray, column: int, tables: np.ndarray) -> tuple[Vector, Vector]:
    """(states before they take a word, slots) of sixteen lanes, for the columns from `column` on."""
    slot = gather(tables, load16(offsets, column) + (x & 0xFFF))
    return (slot >> 20) * (x >> 12) + ((slot >> 8) & 0xFFF), slot


@inlined
def refilled(x: Vector, words: np.ndarray, place: int) -> tuple[Vector, int]:
    """(states that have taken their words, new place): at most sixteen are looked at from `place` on."""
    low = x < 0x10000
    more = (x << 16) | expand(low, as_u32(load16(words, place)))
    return select(low, more, x), place + count_bits(bits_of(low))


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
    """As `column_rans_scalar.decode`."""
    end = words.size - LANES
    whole = first + (out.size - first) // LANES * LANES
    x0, x1, x2, x3 = load16(states, 0), load16(states, 16), load16(states, 32), load16(states, 48)
    column = first % columns
    for at in range(first, whole, LANES):
        # Words are looked at as far as 64 behind where a step begins, and those are there.
        if place > end:
            return -1
        x0, slot0 = looked_up(x0, offsets, column, tables)
        x1, slot1 = looked_up(x1, offsets, column + 16, tables)
        x2, slot2 = looked_up(x2, offsets, column + 32, tables)
        x3, slot3 = looked_up(x3, offsets, column + 48, tables)
        x0, place = refilled(x0, words, place)
        x1, place = refilled(x1, words, place)
        x2, place = refilled(x2, words, place)
        x3, place = refilled(x3, words, place)
        store(out, at, slot0 & 0xFF)
        store(out, at + 16, slot1 & 0xFF)
        store(out, at + 32, slot2 & 0xFF)
        store(out, at + 48, slot3 & 0xFF)
        column = (column + LANES) % columns
    store(states, 0, x0)
    store(states, 16, x1)
    store(states, 32, x2)
    store(states, 48, x3)
    return column_rans_scalar.decode(states, words, place, offsets, tables, out, whole, columns)
