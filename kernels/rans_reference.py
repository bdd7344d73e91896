"""`rans.py` written to be read: pure Python over lists, one symbol at a time. Slow; the tests compare the two.

Raises `ValueError` for a stream that is not whole, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_s3.kernels.rans_tables import PRECISION_BITS, SYMBOLS, TABLES, TOTAL, frequencies, log2_fixed

LANES = 32
IDLE = 1 << 16
WORD_BITS = 16


def starts(frequency: Sequence[int]) -> list[int]:
    """Where each symbol's slots begin."""
    return [sum(frequency[:symbol]) for symbol in range(SYMBOLS)]


def choose_table(symbols: Sequence[int]) -> int:
    """The table that codes one channel's symbols in the fewest 1/256 bits; of equals the first."""

    def bits(table: int) -> int:
        frequency = frequencies(table)
        return sum((PRECISION_BITS << 8) - log2_fixed(frequency[symbol]) for symbol in symbols)

    return min(range(TABLES), key=bits)


def encode(symbols: Sequence[Sequence[int]], tables: Sequence[int]) -> tuple[list[int], list[int]]:
    """Channels of symbols → (32 lane states, words in reading order)."""
    states = [IDLE] * LANES
    words: list[int] = []
    flat = [(symbol, tables[channel]) for channel, row in enumerate(symbols) for symbol in row]
    for place in reversed(range(len(flat))):
        symbol, table = flat[place]
        frequency = frequencies(table)
        state = states[place % LANES]
        # Coding multiplies the state by TOTAL ÷ frequency: make room first, so that it stays below 2³².
        if state >= frequency[symbol] << (32 - PRECISION_BITS):
            words.append(state % (1 << WORD_BITS))
            state >>= WORD_BITS
        quotient, rest = divmod(state, frequency[symbol])
        states[place % LANES] = quotient * TOTAL + starts(frequency)[symbol] + rest
    return states, words[::-1]


def decode(states: Sequence[int], words: Sequence[int], tables: Sequence[int], tokens: int) -> list[list[int]]:
    """The symbols, `tokens` for each channel. Raises `ValueError`."""
    state = list(states)
    unread = list(words)
    out: list[list[int]] = []
    for channel, table in enumerate(tables):
        frequency = frequencies(table)
        begin = starts(frequency)
        row = []
        for token in range(tokens):
            lane = (channel * tokens + token) % LANES
            slot = state[lane] % TOTAL
            symbol = max(s for s in range(SYMBOLS) if begin[s] <= slot)
            row.append(symbol)
            state[lane] = frequency[symbol] * (state[lane] // TOTAL) + slot - begin[symbol]
            if state[lane] < IDLE:
                if not unread:
                    raise ValueError("the words end before the symbols do")
                state[lane] = (state[lane] << WORD_BITS) | unread.pop(0)
        out.append(row)
    if unread or any(s != IDLE for s in state):
        raise ValueError("the stream does not end where its symbols do")
    return out
