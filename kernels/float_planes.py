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
from lmcache_s3.kernels.vectors import as_those_of, as_u8, load32, select, splat, store

WINDOW_EXPONENTS = 16
_STRETCH = 1024
"""Escapes are rare: so many symbols are asked at once whether one is among them."""
_COLUMNS = 64


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


def mean_bases(planes: np.ndarray, layout: FloatLayout) -> np.ndarray:
    """A base for each column, u8 [plane, column], such that the usual exponents lie in the window, the large ones too.

    planes: unsigned integers [plane, row, column], C order, the numbers' bits. A sample's mean, since outliers hardly
    move it.
    """
    step = max(1, planes.shape[1] // 64)
    sums = np.zeros((len(planes), planes.shape[2]), np.uint32)
    _kernels(layout).exponents(planes, step, sums)
    count = np.uint32(-(-planes.shape[1] // step))
    # Values spread further below their usual exponent than above it.
    means = ((sums + count // 2) // count).astype(np.int64) - (WINDOW_EXPONENTS - 5)
    bases: np.ndarray = np.clip(means, 0, layout.max_base).astype(np.uint8)
    return bases


def split(
    items: np.ndarray, bases: np.ndarray, layout: FloatLayout, symbols: np.ndarray, counts: np.ndarray | None
) -> None:
    """The symbols of numbers, u8 like `items`, and how often each occurs: added to `counts`, u32 [column, symbol].

    items: unsigned integers [row, column], C order. bases: u8 [column].
    """
    _kernels(layout).symbols(items, bases, symbols)
    if counts is not None:
        _count(symbols, counts)


def count_sample(planes: np.ndarray, bases: np.ndarray, step: int, layout: FloatLayout) -> np.ndarray:
    """How often each symbol occurs in every step-th column of each plane p, from p mod step on: u32 [column, symbol].

    planes: unsigned integers [plane, row, column], C order. bases: u8 [plane, column].
    """
    n, _, columns = planes.shape
    sampled = sum(len(range(plane % step, columns, step)) for plane in range(n))
    counts = np.zeros((sampled, layout.escape + 1), np.uint32)
    _kernels(layout).sample(planes, bases, step, counts)
    return counts


def escapes_of(items: np.ndarray, symbols: np.ndarray, count: int, layout: FloatLayout) -> np.ndarray:
    """The upper parts of the `count` numbers whose symbol is the escape, u16, in their order; both C order."""
    uppers = np.empty(count, np.uint16)
    _kernels(layout).escapes(items.reshape(-1), symbols.reshape(-1), uppers)
    return uppers


def pack(items: np.ndarray, layout: FloatLayout, out: np.ndarray) -> None:
    """The lower parts of all numbers into `out`, u8 [raw_bytes]. items: unsigned integers, C order."""
    flat, at = items.reshape(-1), 0
    for first, bits in layout.fields():
        size = -(-flat.size * bits // 8)
        _pack(flat, first, bits, out[at : at + size])
        at += size


def merge(
    symbols: np.ndarray, bases: np.ndarray, raw: np.ndarray, escapes: np.ndarray, layout: FloatLayout, out: np.ndarray
) -> int:
    """Put numbers together into `out`, unsigned integers [row, column], C order; how many escapes were needed.

    More than there are: `out` is undefined. symbols: u8 like `out`, none above the escape. bases: u8 [column], none
    above the highest. raw: u8 [raw_bytes], read-only. escapes: u16, those not yet used.
    """
    flat, at = out.reshape(-1), 0
    needed = int(_kernels(layout).uppers(symbols, bases, escapes, out))
    if needed > len(escapes):
        return needed
    for first, bits in layout.fields():
        size = -(-flat.size * bits // 8)
        _unpack(raw[at : at + size], first, bits, flat)
        at += size
    return needed


@dataclass(frozen=True, slots=True)
class _Kernels:
    exponents: Callable[..., Any]
    escapes: Callable[..., Any]
    symbols: Callable[..., Any]
    sample: Callable[..., Any]
    uppers: Callable[..., Any]


@kernel
def _count(symbols: np.ndarray, counts: np.ndarray) -> None:
    # A few columns at a time, whose counts stay in the nearest cache.
    for first in range(0, symbols.shape[1], _COLUMNS):
        counted = counts[first : first + _COLUMNS]
        for row in range(symbols.shape[0]):
            line = symbols[row, first : first + _COLUMNS]
            for column in range(line.size):
                counted[column, np.uint64(line[column])] += np.uint32(1)


@kernel
def _has(symbols: np.ndarray, one: np.uint32) -> bool:
    found = np.uint32(0)
    for i in range(symbols.size):
        found += np.uint32(symbols[i] == one)
    return bool(found)


@kernel
def _pack(flat: np.ndarray, first: int, bits: int, out: np.ndarray) -> None:
    size, parts, mask = out.size, 8 // bits, (1 << bits) - 1
    whole = max(0, flat.size - (parts - 1) * size) // 32 * 32
    for i in range(0, whole, 32):
        packed = as_u8((load32(flat, i) >> first) & mask)
        for part in range(1, parts):
            packed = packed | as_u8(((load32(flat, part * size + i) >> first) & mask) << (bits * part))
        store(out, i, packed)
    for i in range(whole, size):
        byte = np.int64(0)
        for part in range(parts):
            if part * size + i < flat.size:
                byte |= ((np.int64(flat[part * size + i]) >> first) & mask) << (bits * part)
        out[i] = np.uint8(byte)


@kernel
def _unpack(source: np.ndarray, first: int, bits: int, flat: np.ndarray) -> None:
    size, parts, mask = source.size, 8 // bits, (1 << bits) - 1
    whole = max(0, flat.size - (parts - 1) * size) // 32 * 32
    for i in range(0, whole, 32):
        packed = as_those_of(flat, load32(source, i))
        for part in range(parts):
            at = part * size + i
            store(flat, at, load32(flat, at) | (((packed >> (bits * part)) & mask) << first))
    for i in range(whole, size):
        byte = np.int64(source[i])
        for part in range(parts):
            if part * size + i < flat.size:
                flat[part * size + i] |= ((byte >> (bits * part)) & mask) << first


@cache
def _kernels(layout: FloatLayout) -> _Kernels:
    """The loops with a layout's numbers as constants, which is what lets them become wide instructions."""
    raw, coded, sign_at = np.uint32(layout.raw), np.uint32(layout.coded), np.uint32(layout.width - 1)
    magnitude = np.uint32((1 << (layout.width - 1 - layout.raw)) - 1)
    window, escape = np.uint32(layout.window), np.uint32(layout.escape)
    sign_symbol = np.uint32(layout.window.bit_length() - 1)
    within = np.uint32(layout.window - 1)
    mantissa, exponent = np.uint32(layout.mantissa), np.uint32((1 << layout.exponent) - 1)

    # Closures over numbers only: over another kernel, they would be compiled anew in each process.
    @kernel
    def symbols(items: np.ndarray, bases: np.ndarray, out: np.ndarray) -> None:
        rows, columns = items.shape
        flat, target = items.reshape(-1), out.reshape(-1)
        whole = columns // 32 * 32
        for row in range(rows):
            for column in range(0, whole, 32):
                line = load32(flat, row * columns + column)
                high = ((line >> raw) & magnitude) - (as_those_of(flat, load32(bases, column)) << coded)
                symbol = high + ((line >> sign_at) << sign_symbol)
                store(target, row * columns + column, select(high < window, symbol, splat(symbol, escape)))
            for column in range(whole, columns):
                bits = np.uint32(items[row, column])
                above = np.uint32(((bits >> raw) & magnitude) - (np.uint32(bases[column]) << coded))
                one = np.uint32(above + ((bits >> sign_at) << sign_symbol))
                out[row, column] = np.uint8(one if above < window else escape)

    @kernel
    def sample(planes: np.ndarray, bases: np.ndarray, step: int, counts: np.ndarray) -> None:
        of_plane = 0
        for plane in range(planes.shape[0]):
            line, base = planes[plane], bases[plane]
            columns = len(range(plane % step, line.shape[1], step))
            for row in range(line.shape[0]):
                for i in range(columns):
                    column = plane % step + i * step
                    bits = np.uint32(line[row, column])
                    above = np.uint32(((bits >> raw) & magnitude) - (np.uint32(base[column]) << coded))
                    symbol = np.uint32(above + ((bits >> sign_at) << sign_symbol))
                    counts[of_plane + i, np.uint8(symbol if above < window else escape)] += np.uint32(1)
            of_plane += columns

    @kernel
    def exponents(planes: np.ndarray, step: int, sums: np.ndarray) -> None:
        for plane in range(planes.shape[0]):
            for row in range(0, planes.shape[1], step):
                line, out = planes[plane, row], sums[plane]
                for column in range(line.size):
                    out[column] += (np.uint32(line[column]) >> mantissa) & exponent

    @kernel
    def escapes(items: np.ndarray, symbols: np.ndarray, out: np.ndarray) -> None:
        place = 0
        for first in range(0, symbols.size, _STRETCH):
            stretch = symbols[first : first + _STRETCH]
            if _has(stretch, escape):
                for i in range(stretch.size):
                    if stretch[i] == escape and place < out.size:
                        out[place] = np.uint32(items[first + i]) >> raw
                        place += 1

    @kernel
    def uppers(symbols: np.ndarray, bases: np.ndarray, escapes: np.ndarray, out: np.ndarray) -> int:
        rows, columns = symbols.shape
        needed = 0
        for row in range(rows):
            found = np.uint32(0)
            for column in range(columns):
                symbol = np.uint32(symbols[row, column])
                above = np.uint32((symbol & within) + (np.uint32(bases[column]) << coded))
                out[row, column] = ((symbol >> sign_symbol) << sign_at) | (above << raw)
                found += np.uint32(symbol == escape)
            if found:
                for column in range(columns):
                    if symbols[row, column] == escape:
                        if needed < escapes.size:
                            out[row, column] = np.uint32(escapes[needed]) << raw
                        needed += 1
        return needed

    return _Kernels(exponents, escapes, symbols, sample, uppers)
