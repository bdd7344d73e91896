"""Parts of `quantise.py` for processors with AVX-512 (`vectors.WIDE`); the same bits. Threads: safe, no GIL."""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels import quantise
from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.vectors import as_f64, cross1, cross2, cross4, first_lane, high_half, load16, low_half, splat


@kernel
def token_steps(y: np.ndarray, step: float, steps: np.ndarray) -> None:
    """As `quantise.token_steps`; y is contiguous."""
    vectors, width = y.shape
    if width % 16 or width == 0:
        quantise.token_steps(y, step, steps)
        return
    wanted = max(step, np.sqrt(np.float64(width)) / quantise.MOST)
    flat = y.reshape(-1)
    for vector in range(vectors):
        first = vector * width
        sums = splat(as_f64(low_half(load16(flat, first))), 0.0)
        for i in range(first, first + width, 16):
            x = load16(flat, i)
            low, high = as_f64(low_half(x)), as_f64(high_half(x))
            sums = sums + low * low
            sums = sums + high * high
        # Lane 0 becomes ((0+1)+(2+3))+((4+5)+(6+7)).
        total = first_lane(cross4(cross2(cross1(sums))))
        steps[vector] = wanted * np.sqrt(total / width)
