"""LMCache-S3: a KV cache for LLM serving that lives in object storage.

Everything public is imported when first used: `import lmcache_s3` costs nothing and loads no torch, vllm or numba.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcache_s3.cache import Cache, CacheStats, Match, Retrieved, StoreReport
    from lmcache_s3.config import Settings, load_settings
    from lmcache_s3.errors import (
        Ambiguous,
        Bug,
        Conflict,
        Invalid,
        LMCacheS3Error,
        Missing,
        Unavailable,
        Unsafe,
        Unusable,
    )
    from lmcache_s3.extent_array import open_extent
    from lmcache_s3.handle import Handle
    from lmcache_s3.identity import ExtraKey, KVGroup, Space, prefix_hashes
    from lmcache_s3.plain_calibration import load_calibration
    from lmcache_s3.weights import weights_digest

__all__ = [
    "Ambiguous",
    "Bug",
    "Cache",
    "CacheStats",
    "Conflict",
    "ExtraKey",
    "Handle",
    "Invalid",
    "KVGroup",
    "LMCacheS3Error",
    "Match",
    "Missing",
    "Retrieved",
    "Settings",
    "Space",
    "StoreReport",
    "Unavailable",
    "Unsafe",
    "Unusable",
    "load_calibration",
    "load_settings",
    "open_extent",
    "prefix_hashes",
    "weights_digest",
]

_ERRORS = {
    "Ambiguous", "Bug", "Conflict", "Invalid", "LMCacheS3Error", "Missing", "Unavailable", "Unsafe", "Unusable",
}  # fmt: skip
_HOMES = {
    **dict.fromkeys(_ERRORS, "lmcache_s3.errors"),
    **dict.fromkeys(("Cache", "CacheStats", "Match", "Retrieved", "StoreReport"), "lmcache_s3.cache"),
    **dict.fromkeys(("Settings", "load_settings"), "lmcache_s3.config"),
    **dict.fromkeys(("ExtraKey", "KVGroup", "Space", "prefix_hashes"), "lmcache_s3.identity"),
    "Handle": "lmcache_s3.handle",
    "load_calibration": "lmcache_s3.plain_calibration",
    "open_extent": "lmcache_s3.extent_array",
    "weights_digest": "lmcache_s3.weights",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
