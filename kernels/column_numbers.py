"""A matrix of floating-point numbers from coded symbols, raw bits and escapes: `column_rans.py` and `float_planes.py`.

One pass where the processor has AVX-512 and the matrix divides evenly: 32 symbols are decoded, joined with their raw
bits, and lie where they belong. Elsewhere the two go one after the other, with the same result. Threads: safe, no GIL.
Raises nothing; the answers say what was wrong.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels import column_rans, float_planes
from lmcache_s3.kernels.column_rans_wide import decode_step
from lmcache_s3.kernels.float_planes import FloatLayout
from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.vectors import WIDE, as_those_of, bits_of, load16, load32, lowest_bit, store

_EVEN = 256
"""Numbers: where a matrix has a multiple of these, 32 of them have their raw bits in the same part of each field."""


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
    """The numbers' bits into `out`, unsigned integers [row, column], C order: (new place or -1, escapes needed).

    states, words, place, chosen, tables: as in `column_rans.decode`; bases, raw, escapes: as in `float_planes.merge`.
    With a place of -1, or more escapes needed than there are, `out` is undefined.
    """
    if WIDE and out.shape[1] % column_rans.LANES == 0 and out.size % _EVEN == 0:
        fields = np.array(layout.fields(), np.int64).reshape(-1, 2)
        offsets = chosen.astype(np.uint32) << np.uint32(column_rans.PRECISION_BITS)
        return _decode(
            states, words, place, offsets, tables, bases, raw, fields, escapes,
            layout.raw, layout.coded, layout.width - 1, layout.window, out,
        )  # fmt: skip
    symbols = np.empty(out.shape, np.uint8)
    place = column_rans.decode(states, words, place, chosen, tables, symbols)
    return place, 0 if place < 0 else float_planes.merge(symbols, bases, raw, escapes, layout, out)


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
    columns, flat = out.shape[1], out.reshape(-1)
    end = words.size - 32
    # Of each field: where its bytes for these numbers begin, where those of its part end, and its place in a byte.
    n_fields = fields.shape[0]
    at, ends, shifts = np.zeros((3, 4), np.int64)
    begin = 0
    for field in range(n_fields):
        size = flat.size * fields[field, 1] // 8
        at[field], ends[field], shifts[field] = begin, begin + size, 0
        begin += size
    sign_symbol = np.int64(0)
    while 1 << sign_symbol < window:
        sign_symbol += 1
    lower = (1 << raw_bits) - 1
    needed, column = 0, 0
    x0, x1 = load16(states, 0), load16(states, 16)
    for first in range(0, flat.size, 32):
        if place > end:
            return -1, needed
        x0, x1, place, decoded = decode_step(x0, x1, words, place, offsets, column, tables)
        symbol = as_those_of(flat, decoded)
        high = (symbol & (window - 1)) + (as_those_of(flat, load32(bases, column)) << coded)
        number = ((symbol >> sign_symbol) << sign_at) | (high << raw_bits)
        for field in range(n_fields):
            bits = fields[field, 1]
            packed = as_those_of(flat, load32(raw, at[field]))
            number = number | (((packed >> shifts[field]) & ((1 << bits) - 1)) << fields[field, 0])
            at[field] += 32
            if at[field] == ends[field]:
                at[field] -= flat.size * bits // 8
                shifts[field] += bits
        store(flat, first, number)
        escaped = bits_of(symbol == 2 * window)
        while escaped:
            i = first + lowest_bit(escaped)
            escaped &= escaped - np.uint64(1)
            if needed < escapes.size:
                flat[i] = (np.int64(escapes[needed]) << raw_bits) | (np.int64(flat[i]) & lower)
            needed += 1
        column = 0 if column + 32 == columns else column + 32
    store(states, 0, x0)
    store(states, 16, x1)
    return place, needed
