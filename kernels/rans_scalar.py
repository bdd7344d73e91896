"""The coder of `rans.py` one symbol after another: for any processor, and for the ends of runs.

Threads: safe, no GIL. Raises nothing; `decode_run` answers for streams that are not whole.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.rans_tables import Tables


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
    """Decode `count` values of a run; returns the new (place, escape_place), place −1 where the stream is not whole.

    states: u32 [32], updated. words: u16, read from `place`; `end` is the stream's, behind which are 32 readable ones.
    slots u32 [4096], values u16 [256]: the table's. first: symbols of this run decoded before, even if pairs are coded.
    out: i8, at least count + 1; out_pairs: the same memory as u16.
    """
    symbols = (count + 1) // 2 if pairs else count
    done = 0
    while done < symbols:
        lane = (first + done) & 31
        n = min(32 - lane, symbols - done)
        for j in range(n):
            x = np.uint64(states[lane + j])
            entry = np.uint64(slots[x & np.uint64(0xFFF)])
            x = ((entry >> np.uint64(12)) & np.uint64(0xFFF)) * (x >> np.uint64(12)) + (entry & np.uint64(0xFFF))
            more = (x << np.uint64(16)) | np.uint64(words[place])
            low = x < np.uint64(0x10000)
            states[lane + j] = np.uint32(more if low else x)
            place += int(low)
            symbol = entry >> np.uint64(24)
            if symbol == np.uint64(0):
                width = 2 if pairs else 1
                if escape_place + width > escape_end:
                    return -1, escape_place
                for k in range(width):
                    out[width * (done + j) + k] = escapes[escape_place + k]
                escape_place += width
            elif pairs:
                out_pairs[done + j] = values[symbol]
            else:
                out[done + j] = np.int8(values[symbol] & np.uint16(0xFF))
        done += n
        if place > end:
            return -1, escape_place
    return place, escape_place


@kernel
def encode_run(
    q: np.ndarray,
    count: int,
    symbols: np.ndarray,
    frequencies: np.ndarray,
    starts: np.ndarray,
    reciprocals: np.ndarray,
    pairs: bool,
    states: np.ndarray,
    words: np.ndarray,
    place: int,
    escapes: np.ndarray,
    escape_place: int,
) -> tuple[int, int]:
    """Encode q[:count] (i8, −127 … 127), last symbol first; returns the new (place, escape_place), which go down.

    symbols u8, frequencies, starts, reciprocals [256]: the table's. A pair's missing second value is 0. There must be a
    word of room for each symbol, and a place for each value among the escapes.
    """
    n = (count + 1) // 2 if pairs else count
    for i in range(n - 1, -1, -1):
        a = np.int64(q[2 * i]) if pairs else np.int64(q[i])
        b = np.int64(0)
        symbol = np.uint8(0)
        if pairs:
            if 2 * i + 1 < count:
                b = np.int64(q[2 * i + 1])
            if -16 <= a <= 16 and -16 <= b <= 16:
                symbol = symbols[(a + 16) * 33 + b + 16]
        else:
            symbol = symbols[a + 128]
        if symbol == np.uint8(0):
            if pairs:
                escape_place -= 1
                escapes[escape_place] = np.int8(b)
            escape_place -= 1
            escapes[escape_place] = np.int8(a)
        lane = i & 31
        f = np.uint64(frequencies[symbol])
        x = np.uint64(states[lane])
        words[place - 1] = np.uint16(x & np.uint64(0xFFFF))
        high = x >= f << np.uint64(20)
        place -= int(high)
        x = x >> np.uint64(16) if high else x
        # x < 2³² and the reciprocal exceeds 2⁴⁴ ÷ f by less than 1: the quotient is exact.
        quotient = (x * reciprocals[symbol]) >> np.uint64(44)
        states[lane] = np.uint32((quotient << np.uint64(12)) + (x - quotient * f) + np.uint64(starts[symbol]))
    return place, escape_place


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
    """`encode_run` with one of `all_tables()`."""
    return encode_run(
        q, count, tables.symbols[table], tables.frequencies[table], tables.starts[table], tables.reciprocals[table],
        tables.pairs[table], states, words, place, escapes, escape_place,
    )  # fmt: skip


@kernel
def count_magnitudes(q: np.ndarray, counted: np.ndarray) -> None:
    """Add to counted, int64 [128], how often each |value| occurs in q, i8."""
    for i in range(q.size):
        counted[abs(np.int64(q[i]))] += 1
