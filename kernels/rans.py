"""Entropy coding of quantised values: rANS with 32 interleaved lanes and static tables, one run after another.

A *run* is values that share a table; its symbol i (two values or one) belongs to lane i mod 32. A *stream* is the runs
of one row of a cell, 32 states of u32 ≥ 2¹⁶, u16 words that all lanes share, read forwards, and escaped values, i8.
Encoding goes backwards from state 2¹⁶ in every lane, so a decoder that ends with every lane at 2¹⁶ and nothing left has
read a whole stream: a cheap proof that nothing was cut or changed in length. So a GPU's warp decodes a stream, 32
symbols a step, and words go to the lanes that need one in the lanes' order.

These are the parts that the fused passes of `cachegen_rows.py` are made of; `rans_reference.py` is the same, written to
be read; both give the same bits. Threads: safe, no GIL. Raises nothing; `decode_run` answers for streams that are not
whole.
After Duda (arXiv 1311.2540) and Giesen (arXiv 1402.3392).
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels.jit import kernel

LANES = 32
IDLE = 1 << 16
SPARE_WORDS = LANES
"""What must be readable behind a stream's words: a step is checked when it is done."""


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
def is_idle(states: np.ndarray) -> bool:
    for lane in range(states.size):  # noqa: SIM110 - Numba compiles no generator expression here
        if states[lane] != np.uint32(0x10000):
            return False
    return True


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
def choose_table(histogram: np.ndarray, costs: np.ndarray) -> int:
    """The cheapest table for values of which `histogram`, int64 [128], has the magnitudes; of equals the first."""
    last = 0
    for k in range(histogram.size):
        if histogram[k]:
            last = k
    best = 0
    cheapest = np.int64(2**62)
    for table in range(costs.shape[0]):
        total = np.int64(0)
        for k in range(last + 1):
            total += histogram[k] * np.int64(costs[table, k])
        if total < cheapest:
            best = table
            cheapest = total
    return best
