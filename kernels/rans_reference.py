"""`rans.py` written to be read: pure Python over lists, one symbol at a time. Slow; the tests compare the two.

Raises `ValueError` for a stream that is not whole, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lmcache_s3.kernels.rans_tables import (
    ESCAPE,
    PRECISION_BITS,
    REACH,
    TABLES,
    TOTAL,
    codes_pairs,
    costs_of,
    symbols_of,
)

LANES = 32
IDLE = 1 << 16
WORD_BITS = 16


@dataclass
class Stream:
    """states: of the lanes. words, escapes: in reading order."""

    states: list[int] = field(default_factory=lambda: [IDLE] * LANES)
    words: list[int] = field(default_factory=list)
    escapes: list[int] = field(default_factory=list)


def starts(frequencies: Sequence[int]) -> list[int]:
    """Where each symbol's slots begin."""
    return [sum(frequencies[:symbol]) for symbol in range(len(frequencies))]


def choose_table(magnitudes: Sequence[int]) -> int:
    """The table in which values of these magnitudes cost the least; of equals the first."""
    counted = [magnitudes.count(k) for k in range(REACH + 1)]

    def cost(table: int) -> int:
        costs = costs_of(table, symbols_of(table)[1][ESCAPE])
        return sum(n * cost for n, cost in zip(counted, costs, strict=True))

    return min(range(TABLES), key=cost)


def encode(runs: Sequence[tuple[Sequence[int], int]]) -> Stream:
    """Runs (values, table), in the order in which they are decoded, → a stream."""
    stream = Stream()
    for values, table in reversed(runs):
        of, frequencies = symbols_of(table)
        number = {these: symbol for symbol, these in enumerate(of) if symbol != ESCAPE}
        begin = starts(frequencies)
        width = 2 if codes_pairs(table) else 1
        padded = [*values, 0] if len(values) % width else [*values]
        groups = [tuple(padded[i : i + width]) for i in range(0, len(padded), width)]
        for place in reversed(range(len(groups))):
            symbol = number.get(groups[place], ESCAPE)
            if symbol == ESCAPE:
                stream.escapes[:0] = groups[place]
            state = stream.states[place % LANES]
            # Coding multiplies the state by TOTAL ÷ frequency: make room first, so that it stays below 2³².
            if state >= frequencies[symbol] << (32 - PRECISION_BITS):
                stream.words.append(state % (1 << WORD_BITS))
                state >>= WORD_BITS
            quotient, rest = divmod(state, frequencies[symbol])
            stream.states[place % LANES] = quotient * TOTAL + begin[symbol] + rest
    stream.words.reverse()
    return stream


class Decoder:
    """Reads a stream's runs one after another."""

    def __init__(self, stream: Stream) -> None:
        self.states = list(stream.states)
        self.words = list(stream.words)[::-1]
        self.escapes = list(stream.escapes)[::-1]

    def run(self, table: int, count: int) -> list[int]:
        """The next `count` values. Raises `ValueError`."""
        of, frequencies = symbols_of(table)
        begin = starts(frequencies)
        symbol_of_slot = [symbol for symbol, n in enumerate(frequencies) for _ in range(n)]
        width = 2 if codes_pairs(table) else 1
        values: list[int] = []
        for place in range(-(-count // width)):
            state = self.states[place % LANES]
            slot = state % TOTAL
            symbol = symbol_of_slot[slot]
            state = frequencies[symbol] * (state // TOTAL) + slot - begin[symbol]
            if state < IDLE:
                if not self.words:
                    raise ValueError("the words end before the symbols do")
                state = (state << WORD_BITS) | self.words.pop()
            self.states[place % LANES] = state
            if symbol != ESCAPE:
                values += of[symbol]
            elif len(self.escapes) < width:
                raise ValueError("there are more escapes than values for them")
            else:
                values += [self.escapes.pop() for _ in range(width)]
        return values[:count]

    def finish(self) -> None:
        """Raises `ValueError` where the stream goes on."""
        if self.words or self.escapes or any(state != IDLE for state in self.states):
            raise ValueError("the stream does not end where its symbols do")
