"""Tenants: what one stored with its cache_salt nobody else finds, and one's budget costs nobody else a chunk."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from lmcache_s3.cache import Cache
from lmcache_s3.index.gc import Collector, GcSettings
from lmcache_s3.index.log import Log
from lmcache_s3.testing.small import fresh_memory_url, random_kv, random_tokens, small_settings, small_space
from lmcache_s3.tiers.stores.open import open_store

SPACE = small_space()
TOKENS = random_tokens(64)
SALTS = ("", "alice", "bob")


@pytest.fixture
def cache() -> Iterator[Cache]:
    url = fresh_memory_url()
    with Cache.open(url, SPACE, small_settings(url)) as opened:
        yield opened


def store(cache: Cache, salt: str, n_tokens: int = 64) -> None:
    """Chunk by chunk, each an extent, as a conversation grows."""
    kv = random_kv(SPACE, n_tokens, seed=len(salt))
    for end in range(16, n_tokens + 1, 16):
        cache.store(TOKENS[:end], kv[:, :, :end], salt=salt).result()


def collect(cache: Cache, settings: GcSettings) -> int:
    """One round by another process; how many extents it removed."""
    bucket = open_store(cache.settings.url)
    numbers = iter(range(10**6))
    log = Log(
        bucket, SPACE.id, "01JDXB4Z5T8V6Q2W3E4R5T6Y7H", time.sleep, random.Random(0), lambda: f"{next(numbers):032x}"
    )
    log.open()
    removed = len(Collector(log, settings).run().removed)
    cache.sync()
    return removed


def tokens_found(cache: Cache) -> dict[str, int]:
    return {salt: cache.lookup(TOKENS, salt=salt).tokens for salt in (*SALTS, "mallory")}


def test_a_tenant_finds_its_own_chunks_only(cache: Cache) -> None:
    store(cache, "alice")
    assert tokens_found(cache) == {"": 0, "alice": 64, "bob": 0, "mallory": 0}
    store(cache, "bob", 32)
    store(cache, "", 16)
    assert tokens_found(cache) == {"": 16, "alice": 64, "bob": 32, "mallory": 0}
    got = cache.retrieve(cache.lookup(TOKENS, salt="bob")).result()
    assert got.array.tobytes() == random_kv(SPACE, 32, seed=len("bob")).tobytes()


def test_a_budget_is_one_tenants(cache: Cache) -> None:
    for salt in SALTS:
        store(cache, salt)
    chunk = SPACE.geometry.chunk_bytes
    assert collect(cache, GcSettings(tenant_bytes={"alice": 2 * chunk + chunk // 2})) == 2
    assert tokens_found(cache) == {"": 64, "alice": 32, "bob": 64, "mallory": 0}, "leaves first, of hers alone"
    assert collect(cache, GcSettings(tenant_bytes={"alice": 10 * chunk}, default_tenant_bytes=0)) == 8
    assert tokens_found(cache) == {"": 0, "alice": 32, "bob": 0, "mallory": 0}
    assert collect(cache, GcSettings(max_bytes=0)) == 2
