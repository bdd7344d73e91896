"""`column_rans.py` written to be read: pure Python over lists, one symbol at a time. Slow; the tests compare the two.

Raises `ValueError` for a stream that is not whole, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LANES = 64
IDLE = 1 << 16
PRECISION_BITS = 12
TOTAL = 1 << PRECISION_BITS
WORD_BITS = 16

Matrix = Sequence[Sequence[int]]


def starts(frequencies: Sequence[int]) -> list[int]:
    """Where each symbol's slots begin."""
    return [sum(frequencies[:symbol]) for symbol in range(len(frequencies))]


@dataclass
class Writer:
    """Codes matrices from the last to the first; `words` then lie in writing order, the reverse of reading."""

    states: list[int] = field(default_factory=lambda: [IDLE] * LANES)
    words: list[int] = field(default_factory=list)

    def put(self, matrix: Matrix, chosen: Sequence[int], frequencies: Matrix) -> None:
        """Symbols `[row][column]`; column c has the frequencies numbered chosen[c]."""
        symbols = [(frequencies[chosen[column]], symbol) for row in matrix for column, symbol in enumerate(row)]
        for place in reversed(range(len(symbols))):
            of_table, symbol = symbols[place]
            state = self.states[place % LANES]
            # Coding multiplies the state by TOTAL ÷ frequency: make room first, so that it stays below 2³².
            if state >= of_table[symbol] << (32 - PRECISION_BITS):
                self.words.append(state % (1 << WORD_BITS))
                state >>= WORD_BITS
            quotient, rest = divmod(state, of_table[symbol])
            self.states[place % LANES] = quotient * TOTAL + starts(of_table)[symbol] + rest


@dataclass
class Reader:
    """Decodes matrices from the first to the last."""

    states: list[int]
    unread: list[int]

    def take(self, rows: int, chosen: Sequence[int], frequencies: Matrix) -> list[list[int]]:
        """So many rows of symbols. Raises `ValueError`."""
        begins = [starts(of_table) for of_table in frequencies]
        matrix = []
        for number in range(rows):
            row = []
            for column, table in enumerate(chosen):
                lane = (number * len(chosen) + column) % LANES
                state = self.states[lane]
                slot = state % TOTAL
                symbol = max(s for s, n in enumerate(frequencies[table]) if n and begins[table][s] <= slot)
                row.append(symbol)
                state = frequencies[table][symbol] * (state // TOTAL) + slot - begins[table][symbol]
                if state < IDLE:
                    if not self.unread:
                        raise ValueError("the words end before the symbols do")
                    state = (state << WORD_BITS) | self.unread.pop(0)
                self.states[lane] = state
            matrix.append(row)
        return matrix

    def finish(self) -> None:
        """The stream ends where its symbols do. Raises `ValueError`."""
        if self.unread or any(state != IDLE for state in self.states):
            raise ValueError("the stream does not end where its symbols do")
