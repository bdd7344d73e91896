"""Small spaces, prompts and KV for tests that need many caches quickly. Everything random comes from the seed given."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np

from lmcache_s3.config import Settings, load_settings
from lmcache_s3.identity import KVGroup, Space
from lmcache_s3.types import KVDtype


def small_space(
    kv_dtype: KVDtype = "bfloat16",
    *,
    layers: int = 4,
    heads: int = 4,
    head_dim: int = 8,
    kv: int = 2,
    chunk_tokens: int = 16,
    fidelity: str = "exact",
) -> Space:
    """A model with a few kilobytes of KV a chunk."""
    group = KVGroup("full" if kv == 2 else "mla", layers, kv, heads, head_dim)
    return Space("ab" * 32, kv_dtype, (group,), {}, chunk_tokens, fidelity=fidelity)


def small_settings(url: str, **overrides: Any) -> Settings:
    """Settings that poll and probe as little as possible."""
    quiet = {"poll_s": 3600.0, "single_writer": True, "host_bytes": "64MiB", "staging_bytes": "32MiB", "io_threads": 4}
    return load_settings(**(quiet | overrides | {"url": url}))


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return [int(one) for one in np.random.default_rng(seed).integers(0, 50_000, n)]


def random_kv(space: Space, n_tokens: int, seed: int = 0) -> np.ndarray:
    """Any bits at all, NaN included: [kv, layer, token, head, channel], storage dtype."""
    geometry = space.geometry
    shape = (geometry.kv, geometry.layers, n_tokens, geometry.heads, geometry.head_dim)
    data = np.random.default_rng(seed).bytes(geometry.token_bytes * n_tokens)
    return np.frombuffer(data, geometry.storage_dtype).reshape(shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit (NaN equals itself, 0 differs from −0)."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def fresh_memory_url() -> str:
    return f"memory://test-{secrets.token_hex(8)}"
