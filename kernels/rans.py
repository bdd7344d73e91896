"""Entropy coding of quantised symbols: rANS with 32 interleaved lanes and static tables.

Symbol i of the flat `[channel, token]` order belongs to lane i mod 32. A lane's state is a u32 ≥ 2¹⁶ while idle; all
lanes share one stream of u16 words, read forwards. Encoding runs backwards from state 2¹⁶ in every lane, so a decoder
that ends with every lane at 2¹⁶ and no word left has read a whole stream: a cheap proof that nothing was cut or changed
in length. The tables are those of `rans_tables`; a channel uses one, chosen by its histogram.

`rans_reference.py` is the same, written to be read; both give the same bits. Threads: safe, no GIL. Raises nothing;
`decode` answers False for a stream that is not whole. After Duda (arXiv 1311.2540) and Giesen (arXiv 1402.3392).
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.rans_tables import ESCAPE, SYMBOLS, TABLES, all_tables

LANES = 32
IDLE = 1 << 16


def choose_tables(symbols: np.ndarray) -> np.ndarray:
    """The cheapest table of each channel. symbols: u8 [channel, token], C order, each < 64. Returns u8 [channel]."""
    _, _, _, cost = all_tables()
    chosen = np.empty(symbols.shape[0], np.uint8)
    _choose(symbols, cost, chosen)
    return chosen


def encode(symbols: np.ndarray, tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """symbols u8 [channel, token] (C order, each < 64), tables u8 [channel] → (states u32 [32], words u16)."""
    frequency, start, _, _ = all_tables()
    words = np.empty(symbols.size, np.uint16)
    states = np.full(LANES, IDLE, np.uint32)
    first = _encode(symbols, tables, frequency, start, states, words)
    return states, words[first:]


def decode(states: np.ndarray, words: np.ndarray, tables: np.ndarray, out: np.ndarray) -> bool:
    """Undo `encode` into `out`, u8 [channel, token], C order. False: no whole stream; `out` is then undefined.

    Safe for any input: tables ≥ 32 are refused, words are never read past their end.
    """
    if len(states) != LANES or len(tables) != out.shape[0] or (len(tables) and int(tables.max()) >= TABLES):
        return False
    frequency, start, slots, _ = all_tables()
    return bool(_decode(states.copy(), words, tables, frequency, start, slots, out))


def count_escapes(symbols: np.ndarray) -> int:
    return int(np.count_nonzero(symbols == ESCAPE))


@kernel
def _choose(symbols: np.ndarray, cost: np.ndarray, chosen: np.ndarray) -> None:
    histogram = np.empty(SYMBOLS, np.int64)
    for channel in range(symbols.shape[0]):
        histogram[:] = 0
        low = SYMBOLS - 1
        high = 0
        for token in range(symbols.shape[1]):
            seen = int(symbols[channel, token])
            histogram[seen] += 1
            low = min(low, seen)
            high = max(high, seen)
        best = 0
        cheapest = np.int64(2**62)
        for table in range(cost.shape[0]):
            bits = np.int64(0)
            for symbol in range(low, high + 1):
                bits += histogram[symbol] * np.int64(cost[table, symbol])
            if bits < cheapest:
                best = table
                cheapest = bits
        chosen[channel] = best


@kernel
def _encode(
    symbols: np.ndarray,
    tables: np.ndarray,
    frequency: np.ndarray,
    start: np.ndarray,
    states: np.ndarray,
    words: np.ndarray,
) -> int:
    channels, tokens = symbols.shape
    place = words.size
    for channel in range(channels - 1, -1, -1):
        table = tables[channel]
        for token in range(tokens - 1, -1, -1):
            lane = (channel * tokens + token) & 31
            symbol = symbols[channel, token]
            f = np.uint64(frequency[table, symbol])
            x = np.uint64(states[lane])
            if x >= f << np.uint64(20):
                place -= 1
                words[place] = np.uint16(x & np.uint64(0xFFFF))
                x >>= np.uint64(16)
            quotient = np.uint32(x) // np.uint32(f)
            rest = np.uint32(x) - np.uint32(quotient * np.uint32(f))
            states[lane] = np.uint32((np.uint64(quotient) << np.uint64(12)) + np.uint64(rest + start[table, symbol]))
    return place


@kernel
def _decode(
    states: np.ndarray,
    words: np.ndarray,
    tables: np.ndarray,
    frequency: np.ndarray,
    start: np.ndarray,
    slots: np.ndarray,
    out: np.ndarray,
) -> bool:
    channels, tokens = out.shape
    place = 0
    end = words.size
    for channel in range(channels):
        table = tables[channel]
        for token in range(tokens):
            lane = (channel * tokens + token) & 31
            x = np.uint64(states[lane])
            slot = x & np.uint64(0xFFF)
            symbol = slots[table, slot]
            out[channel, token] = symbol
            f = np.uint64(frequency[table, symbol])
            x = f * (x >> np.uint64(12)) + slot - np.uint64(start[table, symbol])
            if x < np.uint64(0x10000):
                if place == end:
                    return False
                x = (x << np.uint64(16)) | np.uint64(words[place])
                place += 1
            states[lane] = np.uint32(x)
    if place != end:
        return False
    for lane in range(states.size):  # noqa: SIM110 - Numba compiles no generator expression here
        if states[lane] != 0x10000:
            return False
    return True
