"""`float_planes.py` written to be read: pure Python, one number at a time. Slow; the tests compare the two.

Raises nothing of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmcache_s3.kernels.float_planes import FloatLayout


def symbol_of(bits: int, base: int, layout: FloatLayout) -> int:
    """The symbol of a number in a column of this base."""
    sign, magnitude = divmod(bits >> layout.raw, 1 << (layout.exponent + layout.coded))
    above = magnitude - (base << layout.coded)
    return sign * layout.window + above if 0 <= above < layout.window else layout.escape


def bits_of(symbol: int, base: int, raw: int, escapes: Iterator[int], layout: FloatLayout) -> int:
    """The number again. Takes the next of the escapes where the symbol is one."""
    if symbol == layout.escape:
        return next(escapes) << layout.raw | raw
    sign, above = divmod(symbol, layout.window)
    magnitude = above + (base << layout.coded)
    return sign << (layout.width - 1) | magnitude << layout.raw | raw


def pack(numbers: Sequence[int], layout: FloatLayout) -> bytes:
    """The lower parts: byte i of a field's n bytes holds those of the numbers i, n + i, 2n + i, …, low bits first."""
    out = b""
    for first, bits in layout.fields():
        size = -(-len(numbers) * bits // 8)
        field = bytearray(size)
        for place, number in enumerate(numbers):
            part, i = divmod(place, size)
            field[i] |= (number >> first) % (1 << bits) << (bits * part)
        out += field
    return out


def unpack(data: bytes, count: int, layout: FloatLayout) -> list[int]:
    """The lower parts again."""
    numbers, at = [0] * count, 0
    for first, bits in layout.fields():
        size = -(-count * bits // 8)
        for place in range(count):
            part, i = divmod(place, size)
            numbers[place] |= (data[at + i] >> (bits * part)) % (1 << bits) << first
        at += size
    return numbers
