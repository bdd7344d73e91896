"""The coder of `rans.py` with sixteen lanes an instruction, for processors with AVX-512 (`vectors.WIDE`).

Two vectors hold the 32 lanes' states. Decoding, a table look-up is one gather, words go to the lanes that want one by
an expansion under their mask, and the next place follows from counting its bits; encoding is the same backwards. What
is left at a run's ends goes through `rans_scalar.py`. Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels import rans_scalar
from lmcache_s3.kernels.jit import inlined, kernel
from lmcache_s3.kernels.rans_tables import Tables
from lmcache_s3.kernels.vectors import (
    Vector,
    as_f32,
    as_i8,
    as_i16,
    as_i32,
    as_u16,
    as_u32,
    bits_of,
    both,
    compress,
    count_bits,
    expand,
    gather,
    high_half,
    joined,
    load16,
    load32,
    load64,
    lookup,
    low_half,
    lowest_bit,
    pairs_of_i8,
    rotated,
    select,
    splat,
    store,
)

_OUTSIDE = 33 * 33
"""The entry for pairs that no table has."""
_SMALL = 8


@kernel
def decode_run(
    states: np.ndarray,
    words: np.ndarray,
    place: int,
    end: int,
    slots: np.ndarray,
    values: np.ndarray,
    pairs: bool,
    escapes: np.ndarray,
    escape_place: int,
    escape_end: int,
    first: int,
    out: np.ndarray,
    out_pairs: np.ndarray,
    count: int,
) -> tuple[int, int]:
    """As `rans_scalar.decode_run`. All arrays are contiguous."""
    symbols = (count + 1) // 2 if pairs else count
    width = 2 if pairs else 1
    done = min(-first & 31, symbols)
    if done:
        place, escape_place = rans_scalar.decode_run(
            states, words, place, end, slots, values, pairs, escapes, escape_place, escape_end, first, out, out_pairs,
            min(width * done, count),
        )  # fmt: skip
        if place < 0:
            return -1, escape_place
    x0, x1 = load16(states, 0), load16(states, 16)
    v0, v1, v2, v3 = load32(values, 0), load32(values, 32), load32(values, 64), load32(values, 96)
    v4, v5, v6, v7 = load32(values, 128), load32(values, 160), load32(values, 192), load32(values, 224)
    # A step writes 32 symbols whole, so one that would end in half a pair is left to the other coder.
    last = done + (count - width * done) // width // 32 * 32
    while done < last:
        slots0, slots1 = gather(slots, x0 & 0xFFF), gather(slots, x1 & 0xFFF)
        x0 = ((slots0 >> 12) & 0xFFF) * (x0 >> 12) + (slots0 & 0xFFF)
        x1 = ((slots1 >> 12) & 0xFFF) * (x1 >> 12) + (slots1 & 0xFFF)
        low0, low1 = x0 < 0x10000, x1 < 0x10000
        # At most end + 32 words are looked at: `place` was at most `end` when the step began.
        more0 = (x0 << 16) | expand(low0, as_u32(load16(words, place)))
        place += count_bits(bits_of(low0))
        more1 = (x1 << 16) | expand(low1, as_u32(load16(words, place)))
        place += count_bits(bits_of(low1))
        x0, x1 = select(low0, more0, x0), select(low1, more1, x1)
        symbol = joined(as_u16(slots0 >> 24), as_u16(slots1 >> 24))
        below128 = select(symbol < 64, lookup(v0, symbol, v1), lookup(v2, symbol, v3))
        above = select(symbol < 192, lookup(v4, symbol, v5), lookup(v6, symbol, v7))
        value = select(symbol < 128, below128, above)
        if pairs:
            store(out_pairs, done, value)
        else:
            store(out, done, as_i8(value))
        escaped = bits_of(symbol == 0)
        if escaped:
            if escape_place + width * count_bits(escaped) > escape_end:
                return -1, escape_place
            for j in range(32):
                if escaped >> np.uint64(j) & np.uint64(1):
                    for k in range(width):
                        out[width * (done + j) + k] = escapes[escape_place + k]
                    escape_place += width
        done += 32
        if place > end:
            return -1, escape_place
    store(states, 0, x0)
    store(states, 16, x1)
    if done < symbols:
        return rans_scalar.decode_run(
            states, words, place, end, slots, values, pairs, escapes, escape_place, escape_end, 0, out[width * done :],
            out_pairs[done:], count - width * done,
        )  # fmt: skip
    return place, escape_place


@inlined
def put(x: Vector, entry: Vector, words: np.ndarray, place: int) -> tuple[Vector, int]:
    """Code a symbol in each of 16 states: (states, place). entry: u32, first slot << 12 | frequency, below 2³¹."""
    frequency = entry & 0xFFF
    high = x >= frequency << 20
    # The words' places are below `place`: 16 words are written that end there.
    full = count_bits(bits_of(high))
    store(words, place - 16, rotated(compress(high, x), full))
    x = select(high, x >> 16, x)
    # The quotient is below 2²⁰, and float32 rounds twice by at most 2⁻²⁴: off by one at most, and put right.
    quotient = as_u32(as_i32(as_f32(x) / as_f32(frequency)))
    rest = as_i32(x - quotient * frequency)
    step = splat(frequency, 4096) - frequency
    x = x + quotient * step + ((entry >> 12) & 0xFFF)
    x = select(rest < 0, x - step, x)
    return select(rest >= as_i32(frequency), x + step, x), place - full


@kernel
def encode_values(
    q: np.ndarray,
    count: int,
    tables: Tables,
    table: int,
    states: np.ndarray,
    words: np.ndarray,
    place: int,
    escapes: np.ndarray,
    escape_place: int,
) -> tuple[int, int]:
    """As `rans_scalar.encode_values`. All arrays are contiguous."""
    pairs = tables.pairs[table]
    entries = tables.entries[table]
    width = 2 if pairs else 1
    done = count // width // 32 * 32
    place, escape_place = rans_scalar.encode_values(
        q[width * done :], count - width * done, tables, table, states, words, place, escapes, escape_place
    )
    x0, x1 = load16(states, 0), load16(states, 16)
    while done > 0 and place >= 32:
        done -= 32
        if pairs:
            both_values = pairs_of_i8(load64(q, 2 * done))
            a = ((both_values << 8) >> 8) + 16
            b = (both_values >> 8) + 16
            inside = both(as_u16(a) < 33, as_u16(b) < 33)
            index = as_u16((a << 5) + a + b)
            index = select(inside, index, splat(index, _OUTSIDE))
        else:
            index = as_u16(as_i16(load32(q, done)) + 128)
        entry0, entry1 = gather(entries, as_u32(low_half(index))), gather(entries, as_u32(high_half(index)))
        escaped = bits_of(joined(as_i32(entry0), as_i32(entry1)) < 0)
        if escaped:
            for j in range(31, -1, -1):
                if escaped >> np.uint64(j) & np.uint64(1):
                    escape_place -= width
                    for k in range(width):
                        escapes[escape_place + k] = q[width * (done + j) + k]
        x1, place = put(x1, entry1, words, place)
        x0, place = put(x0, entry0, words, place)
    store(states, 0, x0)
    store(states, 16, x1)
    if done:  # there is room for each symbol's word, but not for 16 at a time
        return rans_scalar.encode_values(
            q[: width * done], width * done, tables, table, states, words, place, escapes, escape_place
        )
    return place, escape_place


@kernel
def count_magnitudes(q: np.ndarray, counted: np.ndarray) -> None:
    """As `rans_scalar.count_magnitudes`. q is contiguous."""
    whole = q.size // 64 * 64
    for first in range(0, whole, 64):
        values = load64(q, first)
        magnitudes = select(values < 0, splat(values, 0) - values, values)
        left = ~np.uint64(0)
        # Most are small, and sixty-four are compared at once; a count in memory waits for the one before.
        for magnitude in range(_SMALL):
            found = bits_of(magnitudes == magnitude)
            counted[magnitude] += count_bits(found)
            left &= ~found
            if left == np.uint64(0):
                break
        while left:
            counted[abs(np.int64(q[first + lowest_bit(left)]))] += 1
            left &= left - np.uint64(1)
    rans_scalar.count_magnitudes(q[whole:], counted)
