"""Floating-point numbers in two parts: what an entropy coder can shorten, and what is noise.

The upper part is the sign, the exponent and the first mantissa bits: a *symbol* in a window of 16 exponents above the
base of the number's column, or an *escape* kept apart. The lower part is the other mantissa bits, `raw`, packed without
gaps: as many whole bytes as they have, then fields of 4, 2 and 1 bits, each field of all numbers in its own bytes, so
that both directions are a few wide instructions.

`float_planes_reference.py` is the same, written to be read. Bits only: NaN, infinities and denormals are numbers like
others. Threads: safe, no GIL. Raises nothing; `merge` answers whether the escapes fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lmcache_s3.kernels.jit import kernel

WINDOW_EXPONENTS = 16


@dataclass(frozen=True, slots=True)
class FloatLayout:
    """How a number's bits lie: sign, `exponent` bits, `mantissa` bits, of which the first `coded` go to the symbol."""

    exponent: int
    mantissa: int
    coded: int

    @property
    def width(self) -> int:
        """Bits of a number: 8, 16 or 32."""
        return 1 + self.exponent + self.mantissa

    @property
    def raw(self) -> int:
        """Bits of the lower part."""
        return self.mantissa - self.coded

    @property
    def window(self) -> int:
        """Symbols of one sign."""
        return WINDOW_EXPONENTS << self.coded

    @property
    def escape(self) -> int:
        """The symbol that stands for any upper part outside the window."""
        return 2 * self.window

    @property
    def max_base(self) -> int:
        """The highest base: its window ends with the largest exponent."""
        return (1 << self.exponent) - WINDOW_EXPONENTS

    def raw_bytes(self, count: int) -> int:
        """Packed bytes of the lower parts of so many numbers."""
        return sum(-(-count * bits // 8) for _, bits in self.fields())

    def fields(self) -> list[tuple[int, int]]:
        """(first bit, bits) of each field of the lower part, in the order of their bytes."""
        out, at = [(8 * i, 8) for i in range(self.raw // 8)], self.raw // 8 * 8
        for bits in (4, 2, 1):
            if self.raw - at >= bits:
                out.append((at, bits))
                at += bits
        return out


LAYOUTS: dict[str, FloatLayout] = {
    "bfloat16": FloatLayout(8, 7, 1),
    "float16": FloatLayout(5, 10, 1),
    "float32": FloatLayout(8, 23, 1),
    "float8_e4m3fn": FloatLayout(4, 3, 1),
    "float8_e5m2": FloatLayout(5, 2, 1),
}


def mean_bases(items: np.ndarray, layout: FloatLayout) -> np.ndarray:
    """A base for each column, u8 [column], such that the usual exponents lie within the window, the large ones too.

    items: unsigned integers [row, column], the numbers' bits. The mean of a sample: outliers hardly move it.
    """
    rows = items[:: max(1, len(items) // 64)]
    exponents = (rows >> layout.mantissa) & ((1 << layout.exponent) - 1)
    sums = exponents.sum(axis=0, dtype=np.uint32)
    # Values spread further below their usual exponent than above it.
    rounded = (sums + np.uint32(len(rows) // 2)) // np.uint32(len(rows))
    bases: np.ndarray = np.clip(rounded.astype(np.int64) - (WINDOW_EXPONENTS - 5), 0, layout.max_base).astype(np.uint8)
    return bases


def split(items: np.ndarray, bases: np.ndarray, layout: FloatLayout, symbols: np.ndarray, counts: np.ndarray) -> None:
    """The symbols of numbers, u8 like `items`, and how often each occurs: added to `counts`, u32 [column, symbol].

    items: unsigned integers [row, column], C order. bases: u8 [column].
    """
    _kernels(layout).split(items, bases, symbols, counts)


def escapes_of(items: np.ndarray, symbols: np.ndarray, layout: FloatLayout) -> np.ndarray:
    """The upper parts of the numbers whose symbol is the escape, u16, in their order."""
    uppers: np.ndarray = (items[symbols == layout.escape] >> layout.raw).astype(np.uint16)
    return uppers


def pack(items: np.ndarray, layout: FloatLayout, out: np.ndarray) -> None:
    """The lower parts of all numbers into `out`, u8 [raw_bytes]. items: unsigned integers, C order."""
    flat, at = items.reshape(-1), 0
    for first, bits in layout.fields():
        size = -(-flat.size * bits // 8)
        _kernels(layout).pack(flat, first, bits, out[at : at + size])
        at += size


def merge(
    symbols: np.ndarray, bases: np.ndarray, raw: np.ndarray, escapes: np.ndarray, layout: FloatLayout, out: np.ndarray
) -> int:
    """Put numbers together into `out`, unsigned integers [row, column], C order; how many escapes were needed.

    More than there are: `out` is undefined. symbols: u8 like `out`, none above the escape. bases: u8 [column], none
    above the highest. raw: u8 [raw_bytes], read-only. escapes: u16, those not yet used.
    """
    kernels, flat, at = _kernels(layout), out.reshape(-1), 0
    needed = int(kernels.uppers(symbols, bases, out))
    if needed:
        if needed > len(escapes):
            return needed
        out[symbols == layout.escape] = escapes[:needed].astype(out.dtype) << layout.raw
    for first, bits in layout.fields():
        size = -(-flat.size * bits // 8)
        kernels.unpack(raw[at : at + size], first, bits, flat)
        at += size
    return needed


@dataclass(frozen=True, slots=True)
class _Kernels:
    split: Callable[..., Any]
    pack: Callable[..., Any]
    uppers: Callable[..., Any]
    unpack: Callable[..., Any]


@cache
def _kernels(layout: FloatLayout) -> _Kernels:
    """The loops with a layout's numbers as constants, which is what lets them become wide instructions."""
    raw, coded, sign_at = np.uint32(layout.raw), np.uint32(layout.coded), np.uint32(layout.width - 1)
    magnitude = np.uint32((1 << (layout.width - 1 - layout.raw)) - 1)
    window, escape = np.uint32(layout.window), np.uint32(layout.escape)
    sign_symbol = np.uint32(layout.window.bit_length() - 1)
    within = np.uint32(layout.window - 1)
    one = np.uint32(1)

    @kernel
    def split(items: np.ndarray, bases: np.ndarray, symbols: np.ndarray, counts: np.ndarray) -> None:
        rows, columns = items.shape
        for row in range(rows):
            for column in range(columns):
                bits = np.uint32(items[row, column])
                above = np.uint32(((bits >> raw) & magnitude) - (np.uint32(bases[column]) << coded))
                symbol = np.uint32(above + ((bits >> sign_at) << sign_symbol))
                symbols[row, column] = np.uint8(symbol if above < window else escape)
            for column in range(columns):
                counts[column, np.uint64(symbols[row, column])] += one

    @kernel
    def pack(flat: np.ndarray, first: int, bits: int, out: np.ndarray) -> None:
        size = out.size
        down, mask = np.uint32(first & 31), np.uint32((1 << bits) - 1)
        out[:] = 0
        for part in range(8 // bits):
            up = np.uint32((bits * part) & 7)
            source = flat[part * size : (part + 1) * size]
            for i in range(source.size):
                out[i] |= np.uint8(((np.uint32(source[i]) >> down) & mask) << up)

    @kernel
    def uppers(symbols: np.ndarray, bases: np.ndarray, out: np.ndarray) -> int:
        rows, columns = symbols.shape
        escapes = 0
        for row in range(rows):
            found = np.uint32(0)
            for column in range(columns):
                symbol = np.uint32(symbols[row, column])
                above = np.uint32((symbol & within) + (np.uint32(bases[column]) << coded))
                out[row, column] = ((symbol >> sign_symbol) << sign_at) | (above << raw)
                found += np.uint32(symbol == escape)
            escapes += int(found)
        return escapes

    @kernel
    def unpack(source: np.ndarray, first: int, bits: int, flat: np.ndarray) -> None:
        size = source.size
        up, mask = np.uint32(first & 31), np.uint32((1 << bits) - 1)
        for part in range(8 // bits):
            down = np.uint32((bits * part) & 7)
            target = flat[part * size : (part + 1) * size]
            for i in range(target.size):
                target[i] |= ((np.uint32(source[i]) >> down) & mask) << up

    return _Kernels(split, pack, uppers, unpack)
