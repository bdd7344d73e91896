"""Planes of floating-point numbers from coded symbols, raw bits and escapes: `column_rans.py` and `float_planes.py`.

One pass where the processor has AVX-512 and a plane divides evenly: 64 symbols are decoded, joined with their raw bits,
and lie where they belong. Elsewhere the two go one after the other, with the same result. Threads: safe, no GIL. Raises
nothing; the answers say what was wrong.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels import column_rans, float_planes
from lmcache_s3.kernels.column_rans_wide import looked_up, refilled
from lmcache_s3.kernels.float_planes import FloatLayout
from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.vectors import WIDE, as_those_of, bits_of, joined, load16, load32, lowest_bit, store

LANES = column_rans.LANES


def decode(
    states: np.ndarray,
    words: np.ndarray,
    place: int,
    chosen: np.ndarray,
    tables: np.ndarray,
    bases: np.ndarray,
    raw: np.ndarray,
    escapes: np.ndarray,
    layout: FloatLayout,
    out: np.ndarray,
) -> tuple[int, int]:
    """The numbers' bits into `out`, unsigned integers [plane, row, column], C order: (new place or -1, escapes needed).

    states, words, place, tables: as in `column_rans.decode`; chosen, bases: u8 [plane, column]; raw: u8 [plane,
    raw_bytes]; escapes: u16. With a place of -1, or more escapes needed than there are, `out` is undefined.
    """
    planes, rows, columns = out.shape
    # 64 numbers side by side have their raw bits in the same part of each field.
    if WIDE and all(rows * columns * bits % (8 * LANES) == 0 for _, bits in layout.fields()):
        repeated = np.arange(columns + LANES) % columns
        which, base = np.take(chosen, repeated, axis=1), np.take(bases, repeated, axis=1)
        fields = np.array(layout.fields(), np.int64).reshape(-1, 2)
        offsets = np.ascontiguousarray(which, np.uint32) << np.uint32(column_rans.PRECISION_BITS)
        return _decode(
            states, words, place, offsets, tables, base, raw, fields, escapes,
            layout.raw, layout.coded, layout.width - 1, layout.window, out,
        )  # fmt: skip
    symbols, used = np.empty((rows, columns), np.uint8), 0
    for plane in range(planes):
        place = column_rans.decode(states, words, place, chosen[plane], tables, symbols)
        if place < 0:
            break
        used += float_planes.merge(symbols, bases[plane], raw[plane], escapes[used:], layout, out[plane])
        if used > len(escapes):
            break
    return place, used


@kernel
def _decode(
    states: np.ndarray,
    words: np.ndarray,
    place: int,
    offsets: np.ndarray,
    tables: np.ndarray,
    bases: np.ndarray,
    raw: np.ndarray,
    fields: np.ndarray,
    escapes: np.ndarray,
    raw_bits: int,
    coded: int,
    sign_at: int,
    window: int,
    out: np.ndarray,
) -> tuple[int, int]:
    columns, size = out.shape[2], out.shape[1] * out.shape[2]
    end = words.size - LANES
    n_fields = fields.shape[0]
    # Of each field: where its bytes for these numbers are, where its bytes end, and the numbers' place in a byte.
    at, ends, shifts = np.empty(4, np.int64), np.empty(4, np.int64), np.empty(4, np.int64)
    sign_symbol = 0
    while 1 << sign_symbol < window:
        sign_symbol += 1
    lower = (1 << raw_bits) - 1
    needed = 0
    x0, x1, x2, x3 = load16(states, 0), load16(states, 16), load16(states, 32), load16(states, 48)
    for plane in range(out.shape[0]):
        flat, offset, base, packed = out[plane].reshape(-1), offsets[plane], bases[plane], raw[plane]
        begin = 0
        for field in range(n_fields):
            at[field], ends[field], shifts[field] = begin, begin + size * fields[field, 1] // 8, 0
            begin = ends[field]
        column = 0
        for first in range(0, size, LANES):
            # Words are looked at as far as 64 behind where a step begins, and those are there.
            if place > end:
                return -1, needed
            x0, slot0 = looked_up(x0, offset, column, tables)
            x1, slot1 = looked_up(x1, offset, column + 16, tables)
            x2, slot2 = looked_up(x2, offset, column + 32, tables)
            x3, slot3 = looked_up(x3, offset, column + 48, tables)
            x0, place = refilled(x0, words, place)
            x1, place = refilled(x1, words, place)
            x2, place = refilled(x2, words, place)
            x3, place = refilled(x3, words, place)
            symbol0 = as_those_of(flat, joined(slot0, slot1) & 0xFF)
            symbol1 = as_those_of(flat, joined(slot2, slot3) & 0xFF)
            high0 = (symbol0 & (window - 1)) + (as_those_of(flat, load32(base, column)) << coded)
            high1 = (symbol1 & (window - 1)) + (as_those_of(flat, load32(base, column + 32)) << coded)
            number0 = ((symbol0 >> sign_symbol) << sign_at) | (high0 << raw_bits)
            number1 = ((symbol1 >> sign_symbol) << sign_at) | (high1 << raw_bits)
            for field in range(n_fields):
                up, bits, shift = fields[field, 0], fields[field, 1], shifts[field]
                mask = (1 << bits) - 1
                raw0 = as_those_of(flat, load32(packed, at[field]))
                raw1 = as_those_of(flat, load32(packed, at[field] + 32))
                number0 = number0 | (((raw0 >> shift) & mask) << up)
                number1 = number1 | (((raw1 >> shift) & mask) << up)
                at[field] += LANES
                if at[field] == ends[field]:
                    at[field] -= size * bits // 8
                    shifts[field] += bits
            store(flat, first, number0)
            store(flat, first + 32, number1)
            escaped = bits_of(symbol0 == 2 * window) | bits_of(symbol1 == 2 * window) << np.uint64(32)
            while escaped:
                i = first + lowest_bit(escaped)
                escaped &= escaped - np.uint64(1)
                if needed < escapes.size:
                    flat[i] = (np.int64(escapes[needed]) << raw_bits) | (np.int64(flat[i]) & lower)
                needed += 1
            column = (column + LANES) % columns
    store(states, 0, x0)
    store(states, 16, x1)
    store(states, 32, x2)
    store(states, 48, x3)
    return place, needed
