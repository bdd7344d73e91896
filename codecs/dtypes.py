"""bfloat16 and fp8 as NumPy types: views of stored bits, and conversions to and from float32.

Conversions to float32 are exact; those from it round to nearest, ties to even, and saturate at the largest finite
value, so that no finite input becomes infinite. NaN stays NaN. Both are the same bits on every machine. Raises nothing.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from lmcache_s3.types import STORAGE_DTYPE

_finfo: Any = ml_dtypes.finfo  # untyped in the library's stubs

TRUE_DTYPE: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
"""kv_dtype → the NumPy type its values have."""

LARGEST: dict[str, np.float32] = {name: np.float32(_finfo(dtype).max) for name, dtype in TRUE_DTYPE.items()}
"""The largest finite value, as float32."""


def to_float32(bits: np.ndarray, kv_dtype: str) -> np.ndarray:
    """Values of stored bits (storage dtype, any shape and strides) as a new C-contiguous float32 array."""
    if kv_dtype == "bfloat16":
        # The upper half of a float32.
        return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(bits).view(TRUE_DTYPE[kv_dtype]).astype(np.float32)


def from_float32(values: np.ndarray, kv_dtype: str) -> np.ndarray:
    """Stored bits of float32 values, as a new C-contiguous array of the storage dtype."""
    limit = LARGEST[kv_dtype]
    with np.errstate(invalid="ignore"):  # signalling NaN
        return np.clip(values, -limit, limit).astype(TRUE_DTYPE[kv_dtype]).view(STORAGE_DTYPE[kv_dtype])
