"""What `cachegen_tiles_scalar.py` does, for processors with AVX-512 (`vectors.WIDE`): a vector at a time, in registers.

Channels lie side by side as they do in the cell, sixteen in a register. The transform's first halvings, down to 16
channels, are sums and differences of registers, the others of a register with its own lanes crossed. Blocks of fewer
than 16 channels go the other way. Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels import cachegen_tiles_scalar
from lmcache_s3.kernels.float_forms import FORMS, FloatForm, give, taken
from lmcache_s3.kernels.jit import inlined, kernel
from lmcache_s3.kernels.vectors import (
    Vector,
    as_f32,
    cross1,
    cross2,
    cross4,
    cross8,
    load16,
    store,
)

_WIDE_FORM = FORMS["float32"]


@inlined
def _crossed(x: Vector) -> Vector:
    """The transform of blocks of 16."""
    return cross1(cross2(cross4(cross8(x))))


@inlined
def _finish64(
    a: Vector, b: Vector, c: Vector, d: Vector, factor: np.float32, form: FloatForm, out: np.ndarray, to: int
) -> None:
    """The transform of a block of 64, times factor, to out[to : to + 64]."""
    a, b, c, d = a + c, b + d, a - c, b - d
    a, b, c, d = a + b, a - b, c + d, c - d
    give(_crossed(a) * factor, form, out, to)
    give(_crossed(b) * factor, form, out, to + 16)
    give(_crossed(c) * factor, form, out, to + 32)
    give(_crossed(d) * factor, form, out, to + 48)


@kernel
def _finish(
    y: np.ndarray, block: int, channels: int, factor: np.float32, form: FloatForm, out: np.ndarray, to: int
) -> None:
    """The transform of a vector's blocks in `y`, which is overwritten, times factor, to out[to : to + channels]."""
    h = block // 2
    while h >= 64:
        for first in range(0, channels, 2 * h):
            for i in range(first, first + h, 16):
                a, b = load16(y, i), load16(y, i + h)
                store(y, i, a + b)
                store(y, i + h, a - b)
        h //= 2
    if block >= 64:
        for i in range(0, channels, 64):
            _finish64(load16(y, i), load16(y, i + 16), load16(y, i + 32), load16(y, i + 48), factor, form, out, to + i)
    elif block == 32:
        for i in range(0, channels, 32):
            a, b = load16(y, i), load16(y, i + 16)
            give(_crossed(a + b) * factor, form, out, to + i)
            give(_crossed(a - b) * factor, form, out, to + i + 16)
    else:
        for i in range(0, channels, 16):
            give(_crossed(load16(y, i)) * factor, form, out, to + i)


@inlined
def _scaled(q: np.ndarray, i: int, halves: np.ndarray, steps: np.ndarray, j: int) -> Vector:
    return (as_f32(load16(q, i)) + load16(halves, j)) * load16(steps, j)


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
    """As `cachegen_tiles_scalar.restore`."""
    if block < 16:
        cachegen_tiles_scalar.restore(
            q, first, vectors, heads, channels, block, per_token, steps, halves, space, rounded, flat, form, start,
            strides,
        )  # fmt: skip
        return
    one = np.float32(1.0)
    for v in range(vectors):
        token, head = (first + v) // heads, (first + v) % heads
        to = start + token * strides[2] + head * strides[3]
        at, of_head = v * channels, head * channels
        if per_token:
            step = steps[first + v]
            if block == 64:
                for i in range(0, channels, 64):
                    a, b = as_f32(load16(q, at + i)) * step, as_f32(load16(q, at + i + 16)) * step
                    c, d = as_f32(load16(q, at + i + 32)) * step, as_f32(load16(q, at + i + 48)) * step
                    _finish64(a, b, c, d, one, form, flat, to + i)
                continue
            for i in range(0, channels, 16):
                store(space, i, as_f32(load16(q, at + i)) * step)
        else:
            if block == 64:
                for i in range(0, channels, 64):
                    j = of_head + i
                    a, b = _scaled(q, at + i, halves, steps, j), _scaled(q, at + i + 16, halves, steps, j + 16)
                    c, d = (
                        _scaled(q, at + i + 32, halves, steps, j + 32),
                        _scaled(q, at + i + 48, halves, steps, j + 48),
                    )
                    _finish64(a, b, c, d, one, form, flat, to + i)
                continue
            for i in range(0, channels, 16):
                store(space, i, _scaled(q, at + i, halves, steps, of_head + i))
        _finish(space, block, channels, one, form, flat, to)


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
    """As `cachegen_tiles_scalar.coefficients`."""
    if block < 16:
        cachegen_tiles_scalar.coefficients(flat, form, start, strides, heads, block, first, y, space)
        return
    vectors, channels = y.shape
    scale = np.float32(1.0 / block)
    out = y.reshape(-1).view(np.uint32)
    for v in range(vectors):
        token, head = (first + v) // heads, (first + v) % heads
        begin = start + token * strides[2] + head * strides[3]
        if block == 64:
            for i in range(0, channels, 64):
                a, b = taken(flat, form, begin + i), taken(flat, form, begin + i + 16)
                c, d = taken(flat, form, begin + i + 32), taken(flat, form, begin + i + 48)
                _finish64(a, b, c, d, scale, _WIDE_FORM, out, v * channels + i)
            continue
        for i in range(0, channels, 16):
            store(space, i, taken(flat, form, begin + i))
        _finish(space, block, channels, scale, _WIDE_FORM, out, v * channels)
