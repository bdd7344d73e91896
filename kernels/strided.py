"""Arrays of any strides as flat memory and strides in elements, by which kernels address them. Raises nothing."""

from __future__ import annotations

import numpy as np


def flat_view(array: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(all memory between the array's first and last element as a 1-D u8, u16 or u32 array, strides int64 in elements).

    array: [plane, layer, token, head, channel] of 1, 2 or 4 bytes an element; the strides are those of all axes but the
    channels'. None where its channels do not lie side by side, or a stride is negative or no multiple of an element.
    """
    size = array.itemsize
    strides = array.strides
    if (array.shape[-1] > 1 and strides[-1] != size) or any(stride < 0 or stride % size for stride in strides):
        return None
    span = 1 + sum((length - 1) * stride // size for length, stride in zip(array.shape, strides, strict=True))
    bits = array.view(f"u{size}")
    flat = np.lib.stride_tricks.as_strided(bits, (span,), (size,))
    return flat, np.array(strides[:4], np.int64) // size
