"""Values of a `transform` unit from its quantised coefficients, straight into the caller's array. FORMAT.md §7.3.

One token's part of one block of vectors at a time: sum, scale, mean, rotation, rounding, while it lies in registers and
the first cache. Behind the exact sum comes one float32 operation a step, uncontracted: the same bits on every machine.
`transform_reference.py` is the same, written to be read. Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmcache_s3.kernels.float_forms import FloatForm, give, narrow
from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.transform_products import Packed, add_up, ends_of
from lmcache_s3.kernels.vectors import as_f32, load16, store


class Rotation(NamedTuple):
    """cosine, sine: float32, [token, pair] of all the cell's tokens flat; channel j < pairs is turned with j + pairs.

    vectors: how many of the unit's vectors, from the first, are turned.
    """

    cosine: np.ndarray
    sine: np.ndarray
    pairs: int
    vectors: int


class Place(NamedTuple):
    """Where a unit's values go, in elements: plane, layer, token, head: strides; start: of its first.

    layers, heads: of the unit. A vector's channels lie side by side.
    """

    start: int
    plane: int
    layer: int
    token: int
    head: int
    layers: int
    heads: int


@kernel
def _turn(y: np.ndarray, at: int, pairs: int, rotation: Rotation, token: int) -> None:
    angles = token * pairs
    if pairs & 15 == 0:
        for j in range(0, pairs, 16):
            a = load16(y, at + j)
            b = load16(y, at + pairs + j)
            cosine = load16(rotation.cosine, angles + j)
            sine = load16(rotation.sine, angles + j)
            store(y, at + j, a * cosine - b * sine)
            store(y, at + pairs + j, b * cosine + a * sine)
    else:
        for j in range(pairs):
            x = y[at + j]
            z = y[at + pairs + j]
            y[at + j] = x * rotation.cosine[angles + j] - z * rotation.sine[angles + j]
            y[at + pairs + j] = z * rotation.cosine[angles + j] + x * rotation.sine[angles + j]


@kernel
def _put(y: np.ndarray, bits: np.ndarray, at: int, form: FloatForm, flat: np.ndarray, to: int, channels: int) -> None:
    """A vector's float32 to `flat`, in the form of its numbers; `bits` is the same memory as u32."""
    j = 0
    while j + 16 <= channels:
        give(load16(y, at + j), form, flat, to + j)
        j += 16
    while j < channels:
        number = bits[at + j]
        if form.bias != 127:
            number = narrow(y, bits, at + j, form)
        elif form.bits == 16:
            odd = (number >> np.uint32(16)) & np.uint32(1)
            number = (number + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        flat[to + j] = number
        j += 1


@kernel
def decode_values(
    packed: Packed,
    scale: np.ndarray,
    mean: np.ndarray,
    vectors: int,
    channels: int,
    rotation: Rotation,
    entries: np.ndarray,
    filled: np.ndarray,
    tokens: np.ndarray,
    flat: np.ndarray,
    form: FloatForm,
    place: Place,
) -> None:
    """Values of a unit's coded tokens into `flat`, bits of numbers of this form, u8, u16 or u32.

    scale, mean: float32, as `packed_columns` gives them. vectors, channels: of the unit. entries: int64 [coded token,
    ≥ pairs], filled: int64 [coded token], of `transform_streams.decode_unit`. tokens: int64, which of the cell's tokens
    each coded one is.
    """
    columns = packed.columns
    totals = np.empty(tokens.size * columns, np.int32)
    ends = ends_of(packed, entries, filled, tokens.size)
    y = np.empty(columns, np.float32)
    bits = y.view(np.uint32)
    for block in range((vectors + packed.vectors - 1) // packed.vectors):
        first = block * packed.vectors
        n = min(packed.vectors, vectors - first)
        add_up(packed, block, entries, ends, totals)
        for i in range(tokens.size):
            token = tokens[i]
            for column in range(0, columns, 16):
                factor = load16(scale, block * columns + column)
                shift = load16(mean, block * columns + column)
                store(y, column, as_f32(load16(totals, i * columns + column)) * factor + shift)
            for v in range(n):
                vector = first + v
                if vector < rotation.vectors:
                    _turn(y, v * channels, rotation.pairs, rotation, token)
                row = vector // place.heads
                to = place.start + row // place.layers * place.plane + row % place.layers * place.layer
                to += vector % place.heads * place.head + token * place.token
                _put(y, bits, v * channels, form, flat, to, channels)
