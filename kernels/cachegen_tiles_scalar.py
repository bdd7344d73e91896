"""Vectors of a `cachegen` row between their place in the cell and coefficients, a tile at a time: for any processor.

A *vector* is the channels of a token and head. Those of a tile lie transposed, channel by channel, so that all of the
work but moving them is loops over what lies side by side; `cachegen_tiles_wide.py` has another way and the same bits.
Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels.float_forms import FloatForm, narrow, widen
from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.quantise import hadamard


@kernel
def _values_per_token(q: np.ndarray, steps: np.ndarray, y: np.ndarray) -> None:
    vectors = steps.size
    channels = y.size // vectors
    by_channel = y.reshape(channels, vectors)
    by_vector = q[: vectors * channels].reshape(vectors, channels)
    for j in range(channels):
        for v in range(vectors):
            by_channel[j, v] = np.float32(by_vector[v, j]) * steps[v]


@kernel
def _values_per_channel(
    q: np.ndarray, halves: np.ndarray, steps: np.ndarray, first: int, vectors: int, y: np.ndarray
) -> None:
    """first: where the first vector's channels begin in `halves` and `steps`; the next vector's follow, cyclically."""
    channels = y.size // vectors
    by_channel = y.reshape(channels, vectors)
    by_vector = q[: vectors * channels].reshape(vectors, channels)
    for v in range(vectors):
        half = halves[first : first + channels]
        step = steps[first : first + channels]
        for j in range(channels):
            by_channel[j, v] = (np.float32(by_vector[v, j]) + half[j]) * step[j]
        first = (first + channels) % halves.size


@kernel
def _round(y: np.ndarray, form: FloatForm, rounded: np.ndarray) -> None:
    """float32 → bits of fewer, to nearest, ties to even; y is overwritten."""
    bits = y.view(np.uint32)
    if form.bias == 127:
        for i in range(bits.size):
            x = bits[i]
            rounded[i] = np.uint16((x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    else:
        for i in range(bits.size):
            rounded[i] = np.uint16(narrow(y, bits, i, form))


@kernel
def _place(y: np.ndarray, vectors: int, v: int, out: np.ndarray) -> None:
    by_channel = y.reshape(out.size, vectors)
    for j in range(out.size):
        out[j] = by_channel[j, v]


@kernel
def _take(numbers: np.ndarray, form: FloatForm, vectors: int, v: int, y: np.ndarray) -> None:
    bits = y.view(np.uint32)
    if form.bias == 127:
        left_shift = np.uint32(32 - form.bits)
        for j in range(numbers.size):
            bits[j * vectors + v] = np.uint32(numbers[j]) << left_shift
    else:
        for j in range(numbers.size):
            widen(np.uint32(numbers[j]), form, y, bits, j * vectors + v)


@kernel
def _turn(y: np.ndarray, scale: np.float32, out: np.ndarray) -> None:
    by_channel = y.reshape(out.shape[1], out.shape[0])
    for v in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[v, j] = by_channel[j, v] * scale


@kernel
def restore(
    q: np.ndarray,
    first: int,
    vectors: int,
    heads: int,
    channels: int,
    block: int,
    per_token: bool,
    steps: np.ndarray,
    halves: np.ndarray,
    space: np.ndarray,
    rounded: np.ndarray,
    flat: np.ndarray,
    form: FloatForm,
    start: int,
    strides: np.ndarray,
) -> None:
    """Vectors first … first + vectors − 1 of a row from their q, i8 [vectors · channels], to their place in `flat`.

    steps: float32, of each vector of the row if per_token, else of each head's channels, as are `halves`, half means in
    steps. space: float32, rounded: u16, both [vectors · channels] or more. flat: bits of numbers of this form, u8, u16
    or u32; the row begins at `start` there; strides: int64 [4], in elements, of plane, layer, token, head; channels lie
    side by side.
    """
    y = space[: vectors * channels]
    if per_token:
        _values_per_token(q, steps[first : first + vectors], y)
    else:
        _values_per_channel(q, halves, steps[: heads * channels], first % heads * channels, vectors, y)
    hadamard(y, block, vectors)
    bits = y.view(np.uint32)
    short = form.bits < 32
    if short:
        _round(y, form, rounded[: bits.size])
    for v in range(vectors):
        vector = first + v
        to = start + vector // heads * strides[2] + vector % heads * strides[3]
        if short:
            _place(rounded[: bits.size], vectors, v, flat[to : to + channels])
        else:
            _place(bits, vectors, v, flat[to : to + channels])


@kernel
def coefficients(
    flat: np.ndarray,
    form: FloatForm,
    start: int,
    strides: np.ndarray,
    heads: int,
    block: int,
    first: int,
    y: np.ndarray,
    space: np.ndarray,
) -> None:
    """The coefficients of as many vectors as `y`, float32 [vector, channel], has, from the row's vector `first` on."""
    vectors, channels = y.shape
    part = space[: vectors * channels]
    for v in range(vectors):
        vector = first + v
        begin = start + vector // heads * strides[2] + vector % heads * strides[3]
        _take(flat[begin : begin + channels], form, vectors, v, part)
    hadamard(part, block, vectors)
    _turn(part, np.float32(1.0 / block), y)
