"""What `cachegen_tiles_scalar.py` does, for processors with AVX-512 (`vectors.WIDE`): a vector at a time, in registers.

Channels lie side by side as they do in the cell, sixteen in a register. The transform's first halvings, down to 16
channels, are sums and differences of registers, the others of a register with its own lanes crossed. Blocks of fewer
than 16 channels go the other way. Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels import cachegen_tiles_scalar
from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.vectors import (
    Vector,
    as_f32,
    as_u32,
    bits_of_f32,
    cross1,
    cross2,
    cross4,
    cross8,
    f32_of_bits,
    load16,
    store,
)


@kernel
def _crossed(x: Vector) -> Vector:
    """The transform of blocks of 16."""
    return cross1(cross2(cross4(cross8(x))))


@kernel
def _store(x: Vector, flat: np.ndarray, to: int) -> None:
    """Float32 to `flat`, rounded to nearest even where that is bfloat16."""
    bits = bits_of_f32(x)
    if flat.itemsize == 2:
        store(flat, to, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    else:
        store(flat, to, bits)


@kernel
def _halve(y: np.ndarray, block: int, channels: int) -> None:
    """The transform's steps down to blocks of 64, in place; block: 64 or more."""
    h = block // 2
    while h >= 64:
        for first in range(0, channels, 2 * h):
            for i in range(first, first + h, 16):
                a, b = load16(y, i), load16(y, i + h)
                store(y, i, a + b)
                store(y, i + h, a - b)
        h //= 2


@kernel
def _finish(y: np.ndarray, block: int, channels: int, factor: np.float32, out: np.ndarray, to: int) -> None:
    """The transform's steps from blocks of at most 64 down, and y · factor to out[to : to + channels]."""
    if block >= 64:
        for i in range(0, channels, 64):
            a, b, c, d = load16(y, i), load16(y, i + 16), load16(y, i + 32), load16(y, i + 48)
            a, b, c, d = a + c, b + d, a - c, b - d
            a, b, c, d = a + b, a - b, c + d, c - d
            _store(_crossed(a) * factor, out, to + i)
            _store(_crossed(b) * factor, out, to + i + 16)
            _store(_crossed(c) * factor, out, to + i + 32)
            _store(_crossed(d) * factor, out, to + i + 48)
    elif block == 32:
        for i in range(0, channels, 32):
            a, b = load16(y, i), load16(y, i + 16)
            a, b = a + b, a - b
            _store(_crossed(a) * factor, out, to + i)
            _store(_crossed(b) * factor, out, to + i + 16)
    else:
        for i in range(0, channels, 16):
            _store(_crossed(load16(y, i)) * factor, out, to + i)


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
    start: int,
    strides: np.ndarray,
) -> None:
    """As `cachegen_tiles_scalar.restore`."""
    if block < 16:
        cachegen_tiles_scalar.restore(
            q, first, vectors, heads, channels, block, per_token, steps, halves, space, rounded, flat, start, strides
        )
        return
    one = np.float32(1.0)
    for v in range(vectors):
        token, head = (first + v) // heads, (first + v) % heads
        at = v * channels
        if per_token:
            step = steps[first + v]
            for i in range(0, channels, 16):
                store(space, i, as_f32(load16(q, at + i)) * step)
        else:
            of_head = head * channels
            for i in range(0, channels, 16):
                shifted = as_f32(load16(q, at + i)) + load16(halves, of_head + i)
                store(space, i, shifted * load16(steps, of_head + i))
        if block > 64:
            _halve(space, block, channels)
        _finish(space, block, channels, one, flat, start + token * strides[2] + head * strides[3])


@kernel
def coefficients(
    flat: np.ndarray,
    start: int,
    strides: np.ndarray,
    heads: int,
    block: int,
    first: int,
    y: np.ndarray,
    space: np.ndarray,
) -> None:
    """As `cachegen_tiles_scalar.coefficients`."""
    if block < 16:
        cachegen_tiles_scalar.coefficients(flat, start, strides, heads, block, first, y, space)
        return
    vectors, channels = y.shape
    left_shift = np.uint32(16 if flat.itemsize == 2 else 0)
    scale = np.float32(1.0 / block)
    out = y.reshape(-1).view(np.uint32)
    for v in range(vectors):
        token, head = (first + v) // heads, (first + v) % heads
        begin = start + token * strides[2] + head * strides[3]
        for i in range(0, channels, 16):
            store(space, i, f32_of_bits(as_u32(load16(flat, begin + i)) << left_shift))
        if block > 64:
            _halve(space, block, channels)
        _finish(space, block, channels, scale, out, v * channels)
