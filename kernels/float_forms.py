"""How numbers of fewer bits become float32 and back, as kernels need it.

To float32 is exact (what is not finite becomes NaN); back is to nearest, ties to even, and what lies beyond the largest
finite number becomes that, so NaN does too. bfloat16 and float32, whose exponents are float32's, go shorter ways:
`taken` and `give` know them, the other functions are not for them. Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmcache_s3.kernels.jit import inlined
from lmcache_s3.kernels.vectors import Vector, as_f32, as_u32, bits_of_f32, f32_of_bits, load16, select, splat, store


class FloatForm(NamedTuple):
    """bits: of a number, the sign's with them. largest: the bits of the largest finite one."""

    mantissa: int
    bias: int
    bits: int
    largest: int


FORMS: dict[str, FloatForm] = {
    "bfloat16": FloatForm(7, 127, 16, 0x7F7F),
    "float16": FloatForm(10, 15, 16, 0x7BFF),
    "float32": FloatForm(23, 127, 32, 0x7F7FFFFF),
    "float8_e4m3fn": FloatForm(3, 7, 8, 0x7E),
    "float8_e5m2": FloatForm(2, 15, 8, 0x7B),
}
"""kv dtype → its form."""
_NAN = 0x7FC00000


@inlined
def widened(x: Vector, form: FloatForm) -> Vector:
    """Float32 of 16 numbers' bits, u32."""
    magnitude = x & ((1 << (form.bits - 1)) - 1)
    sign = (x >> (form.bits - 1)) << 31
    normal = (magnitude << (23 - form.mantissa)) + ((127 - form.bias) << 23)
    # The smallest number above 0, by which those without an implicit bit count.
    unit = f32_of_bits(splat(x, (128 - form.bias - form.mantissa) << 23))
    wide = select(magnitude < (1 << form.mantissa), bits_of_f32(as_f32(magnitude) * unit), normal)
    wide = select(magnitude > form.largest, splat(x, _NAN), wide)
    return f32_of_bits(wide | sign)


@inlined
def taken(flat: np.ndarray, form: FloatForm, i: int) -> Vector:
    """Float32 of the 16 numbers at flat[i:], bits of any form; bfloat16 and float32 keep what is not finite."""
    number = as_u32(load16(flat, i))
    if form.bias != 127:
        return widened(number, form)
    return f32_of_bits(number << (32 - form.bits))


@inlined
def narrowed(x: Vector, form: FloatForm) -> Vector:
    """The bits, u32, of 16 float32."""
    bits = bits_of_f32(x)
    sign = (bits >> 31) << (form.bits - 1)
    shift = 23 - form.mantissa
    limit = splat(bits, (form.largest << shift) + ((127 - form.bias) << 23))
    magnitude = bits & 0x7FFFFFFF
    magnitude = select(magnitude > limit, limit, magnitude)
    rounded = (magnitude + ((1 << (shift - 1)) - 1) + ((magnitude >> shift) & 1)) >> shift
    normal = rounded - ((127 - form.bias) << form.mantissa)
    # Added to 2²³ of the smallest number above 0, a number is rounded to a multiple of that.
    large = splat(bits, (151 - form.bias - form.mantissa) << 23)
    small = bits_of_f32(f32_of_bits(magnitude) + f32_of_bits(large)) - large
    return select(magnitude < ((128 - form.bias) << 23), small, normal) | sign


@inlined
def give(x: Vector, form: FloatForm, flat: np.ndarray, i: int) -> None:
    """The bits of 16 finite float32 to flat[i:]; of bfloat16 without saturation."""
    bits = bits_of_f32(x)
    if form.bias != 127:
        store(flat, i, narrowed(x, form))
    elif form.bits == 16:
        store(flat, i, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    else:
        store(flat, i, bits)


@inlined
def widen(number: np.uint32, form: FloatForm, wide: np.ndarray, bits: np.ndarray, i: int) -> None:
    """Float32 of a number's bits to wide[i]; `bits` is the same memory as u32."""
    magnitude = number & np.uint32((1 << (form.bits - 1)) - 1)
    sign = (number >> np.uint32(form.bits - 1)) << np.uint32(31)
    if magnitude < np.uint32(1 << form.mantissa):
        bits[i] = np.uint32((128 - form.bias - form.mantissa) << 23)
        wide[i] = np.float32(magnitude) * wide[i]
        bits[i] |= sign
    elif magnitude > np.uint32(form.largest):
        bits[i] = np.uint32(_NAN) | sign
    else:
        bits[i] = ((magnitude << np.uint32(23 - form.mantissa)) + np.uint32((127 - form.bias) << 23)) | sign


@inlined
def narrow(wide: np.ndarray, bits: np.ndarray, i: int, form: FloatForm) -> np.uint32:
    """The bits of wide[i], float32, which is overwritten; `bits` is the same memory as u32."""
    shift = np.uint32(23 - form.mantissa)
    sign = (bits[i] >> np.uint32(31)) << np.uint32(form.bits - 1)
    limit = np.uint32((form.largest << (23 - form.mantissa)) + ((127 - form.bias) << 23))
    magnitude = min(bits[i] & np.uint32(0x7FFFFFFF), limit)
    if magnitude < np.uint32((128 - form.bias) << 23):
        large = np.uint32((151 - form.bias - form.mantissa) << 23)
        bits[i] = magnitude
        small = wide[i]
        bits[i] = large
        wide[i] = small + wide[i]
        return np.uint32((bits[i] - large) | sign)
    half = (np.uint32(1) << (shift - np.uint32(1))) - np.uint32(1)
    rounded = (magnitude + half + ((magnitude >> shift) & np.uint32(1))) >> shift
    return np.uint32((rounded - np.uint32((127 - form.bias) << form.mantissa)) | sign)
