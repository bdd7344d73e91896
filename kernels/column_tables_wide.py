"""`column_tables.assign` with the costs of all tables in two registers, for processors with AVX-512 (`vectors.WIDE`).

Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.vectors import (
    as_i32,
    as_u32,
    bits_of,
    first_lane,
    load16,
    lowest_bit,
    rotated,
    select,
    splat,
)

WIDEST = 32
"""Tables."""
_NEVER = 1 << 30
"""What a table that there is not costs to begin with: more than 65,536 tokens of 12 bits."""


@kernel
def assign(counts: np.ndarray, cost: np.ndarray, pooled: np.ndarray, chosen: np.ndarray) -> None:
    """As `column_tables.assign`, for at most `WIDEST` tables."""
    symbols, tables = cost.shape
    start = np.full(WIDEST, _NEVER, np.int32)
    start[:tables] = 0
    padded = np.zeros(symbols * WIDEST, np.int32)
    for symbol in range(symbols):
        padded[symbol * WIDEST : symbol * WIDEST + tables] = cost[symbol]
    flat = counts.reshape(-1)
    for column in range(counts.shape[0]):
        low, high = load16(start, 0), load16(start, 16)
        begin = column * symbols
        for first in range(0, symbols, 16):
            occur = np.uint64(0)
            if first + 16 <= symbols:
                occur = bits_of(load16(flat, begin + first) > 0)
            else:
                for symbol in range(first, symbols):
                    occur |= np.uint64(flat[begin + symbol] > 0) << np.uint64(symbol - first)
            while occur:
                symbol = first + lowest_bit(occur)
                occur &= occur - np.uint64(1)
                count = np.int32(flat[begin + symbol])
                low = low + load16(padded, symbol * WIDEST) * count
                high = high + load16(padded, symbol * WIDEST + 16) * count
        least = select(low < high, low, high)
        for by in (8, 4, 2, 1):
            other = as_i32(rotated(as_u32(least), by))
            least = select(other < least, other, least)
        cheapest = splat(low, first_lane(least))
        best = lowest_bit(bits_of(low == cheapest) | bits_of(high == cheapest) << np.uint64(16))
        chosen[column] = best
        for symbol in range(symbols):
            pooled[best, symbol] += np.int64(flat[begin + symbol])
