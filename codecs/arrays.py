"""Cells as NumPy arrays: checks of shape and type, and what their stored bits mean.

Axes are [kv, layer, token, head, channel]; bits lie in memory as their storage dtype (`STORAGE_DTYPE`), in stored bytes
little-endian. Raises `Invalid` for an argument that is not what its spec says, nothing else.
"""

from __future__ import annotations

import math

import numpy as np

from lmcache_s3.codecs.base import CellSpec
from lmcache_s3.errors import Invalid
from lmcache_s3.types import ITEM_BYTES, STORAGE_DTYPE


def storage_dtype(spec: CellSpec) -> np.dtype:
    """The little-endian NumPy type a cell's bits are stored as."""
    return np.dtype(STORAGE_DTYPE[spec.kv_dtype]).newbyteorder("<")


def raw_bytes(spec: CellSpec) -> int:
    """Bytes of the uncoded cell."""
    return math.prod(spec.shape) * ITEM_BYTES[spec.kv_dtype]


def check_array(array: np.ndarray, spec: CellSpec, *, what: str) -> None:
    """Refuse an array whose shape or dtype is not the spec's. Raises `Invalid`."""
    wanted = np.dtype(STORAGE_DTYPE[spec.kv_dtype])
    if array.shape != spec.shape or array.dtype != wanted:
        raise Invalid(
            f"{what} is {array.dtype}{list(array.shape)}, its spec says {wanted}{list(spec.shape)} ({spec.kv_dtype}): "
            "pass the storage dtype's bits, axes [kv, layer, token, head, channel]",
            kind="argument",
        )


def contiguous(cell: np.ndarray, spec: CellSpec) -> np.ndarray:
    """The cell's bits in C order, little-endian; a copy only where they are not so already."""
    return np.ascontiguousarray(cell, dtype=storage_dtype(spec))


def bits_of(cell: np.ndarray, spec: CellSpec) -> memoryview:
    """The cell's bytes, as `contiguous` has them."""
    return contiguous(cell, spec).reshape(-1).view(np.uint8).data
