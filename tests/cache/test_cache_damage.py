"""Every way to damage what lies in the bucket is a miss: right data or less, never wrong, and the entry goes."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from lmcache_s3 import Cache, Unavailable
from lmcache_s3.damage import DamageControl
from lmcache_s3.testing.faults import Fault, FaultyStore, Verb
from lmcache_s3.testing.small import (
    fresh_memory_url,
    random_kv,
    random_tokens,
    same_bits,
    small_settings,
    small_space,
)
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import ChunkRef, Grid, shard_key

N = 8
SPACE = small_space(layers=2, heads=2, head_dim=8, chunk_tokens=N)
CHUNKS = 3
GETS: frozenset[Verb] = frozenset({"get"})
Damage = Callable[[random.Random, ObjectStore, list[ChunkRef], list[ChunkRef]], int]
"""Damages the first extent (the second one is another, sound one); returns how many chunks stay loadable."""


def key_of(chunks: list[ChunkRef]) -> str:
    return shard_key(SPACE.id, chunks[0].extent.name, Grid(), 0)


def flip(rng: random.Random, store: ObjectStore, chunks: list[ChunkRef], other: list[ChunkRef]) -> int:
    body = bytearray(store.get(key_of(chunks)))
    cell = chunks[rng.randrange(CHUNKS)].cell(0)
    body[cell.offset + rng.randrange(cell.length)] ^= 1 << rng.randrange(8)
    store.put(key_of(chunks), body)
    return cell.position


def truncate(rng: random.Random, store: ObjectStore, chunks: list[ChunkRef], other: list[ChunkRef]) -> int:
    last = chunks[-1].cell(0)
    at = rng.randrange(last.offset + last.length)
    store.put(key_of(chunks), store.get(key_of(chunks))[:at])
    return at // last.length


def swap(rng: random.Random, store: ObjectStore, chunks: list[ChunkRef], other: list[ChunkRef]) -> int:
    """Two valid cells change places: within the extent, or with one of another extent."""
    body = bytearray(store.get(key_of(chunks)))
    i, j = sorted(rng.sample(range(CHUNKS), 2))
    a, b = chunks[i].cell(0), chunks[j].cell(0)
    first, second = bytes(body[a.offset : a.offset + a.length]), bytes(body[b.offset : b.offset + b.length])
    if rng.random() < 0.5:
        c = other[i].cell(0)
        second = store.get(key_of(other), c.offset, c.offset + c.length)
        body[a.offset : a.offset + a.length] = second
    else:
        body[a.offset : a.offset + a.length] = second
        body[b.offset : b.offset + b.length] = first
    store.put(key_of(chunks), body)
    return i


def remove(rng: random.Random, store: ObjectStore, chunks: list[ChunkRef], other: list[ChunkRef]) -> int:
    store.delete(key_of(chunks))
    return 0


def replace_by_foreign(rng: random.Random, store: ObjectStore, chunks: list[ChunkRef], other: list[ChunkRef]) -> int:
    """Another extent's object, a file of nonsense, or something huge, under our name."""
    cell = chunks[-1].cell(0)
    body = rng.choice([store.get(key_of(other)), b"", b"hello", rng.randbytes(10 * (cell.offset + cell.length))])
    store.put(key_of(chunks), body)
    return 0


def trials(damage: Damage, n: int, codec: str = "fast") -> None:
    """Store n + 1 prompts, damage all but one, retrieve all by a cache with empty tiers."""
    url = fresh_memory_url()
    store = open_store(url)
    prompts = [random_tokens(CHUNKS * N, seed) for seed in range(n + 1)]
    kvs = [random_kv(SPACE, CHUNKS * N, seed) for seed in range(n + 1)]
    with (
        Cache.open(url, SPACE, small_settings(url, codec=codec)) as writer,
        Cache.open(url, SPACE, small_settings(url, codec=codec, host_bytes=None)) as reader,
    ):
        for handle in [writer.store(tokens, kv) for tokens, kv in zip(prompts, kvs, strict=True)]:
            handle.result(60)
        reader.sync()
        matches = [reader.lookup(tokens) for tokens in prompts]
        assert all(match.tokens == CHUNKS * N for match in matches)
        sound = list(matches[n].chunks)
        for seed in range(n):
            left = damage(random.Random(seed), store, list(matches[seed].chunks), sound)
            got = reader.retrieve(matches[seed]).result(10)
            assert got.tokens == left * N, f"seed {seed}"
            assert same_bits(np.ascontiguousarray(got.array), np.ascontiguousarray(kvs[seed][:, :, : left * N])), seed
            assert reader.lookup(prompts[seed]).tokens == 0, f"hidden at once, seed {seed}"
        assert reader.damage.settle(60)
        assert reader.metrics.count("damage_confirmed") == n
        deadline = 50
        while len(list(reader.index.extents())) > 1 and deadline:
            reader.index.commit([]).result(5)  # behind the removals in the queue
            deadline -= 1
        writer.sync()
        for cache in (reader, writer):
            assert [live.record.name for live in cache.index.extents()] == [sound[0].extent.name]
        assert same_bits(reader.retrieve(matches[n]).result(5).array, kvs[n])


@pytest.mark.parametrize("damage", [flip, truncate, swap], ids=lambda one: one.__name__)
@pytest.mark.slow
def test_a_thousand_trials(damage: Damage) -> None:
    trials(damage, 1_000)


@pytest.mark.parametrize("codec", ["fast", "torch", "safetensors", "lossless"])
@pytest.mark.parametrize("damage", [flip, truncate, swap, remove, replace_by_foreign], ids=lambda one: one.__name__)
def test_damage_is_a_miss_and_the_entry_goes(damage: Damage, codec: str) -> None:
    trials(damage, 20, codec)


def test_a_removed_extent_can_be_stored_again() -> None:
    url = fresh_memory_url()
    tokens, kv = random_tokens(CHUNKS * N), random_kv(SPACE, CHUNKS * N)
    with Cache.open(url, SPACE, small_settings(url, host_bytes=None)) as cache:
        cache.store(tokens, kv).result(5)
        match = cache.lookup(tokens)
        remove(random.Random(), open_store(url), list(match.chunks), [])
        assert cache.retrieve(match).result(5).tokens == 0
        assert cache.store(tokens, kv).result(5).stored_chunks == CHUNKS
        assert cache.damage.settle(5)
        assert same_bits(cache.retrieve(cache.lookup(tokens)).result(5).array, kv)


# --- the second read


def examined(faults: list[Fault], pauses: list[float]) -> tuple[int, int, list[str]]:
    """Report a sound extent while the store misbehaves; (tokens matched at once, afterwards, counters)."""
    url = fresh_memory_url()
    faulty = FaultyStore(open_store(url))
    tokens, kv = random_tokens(CHUNKS * N), random_kv(SPACE, CHUNKS * N)

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        return False

    with Cache.on_store(faulty, SPACE, small_settings(url)) as cache:
        [name] = cache.store(tokens, kv).result(5).extents
        faulty.faults = faults
        damage = DamageControl(cache.index, faulty, SPACE.id, SPACE.geometry, pause=pause)
        damage.report(name, "it looked wrong")
        at_once = cache.lookup(tokens).tokens
        assert damage.settle(5)
        faulty.faults = []
        cache.index.commit([]).result(5)
        afterwards = cache.lookup(tokens).tokens
        damage.close()
        return at_once, afterwards, sorted(damage.metrics.snapshot())


def test_what_proves_right_is_shown_again() -> None:
    pauses: list[float] = []
    _, afterwards, counters = examined([], pauses)
    assert (afterwards, pauses) == (CHUNKS * N, [])
    assert "damage_refuted" in counters


def test_a_store_that_is_away_is_asked_again_later() -> None:
    pauses: list[float] = []
    _, afterwards, counters = examined([Fault(mode="error", verbs=GETS, key="/c/", times=3)], pauses)
    assert (afterwards, pauses) == (CHUNKS * N, [1.0, 2.0, 4.0])
    assert "damage_refuted" in counters


def test_a_store_that_stays_away_convicts_nobody() -> None:
    pauses: list[float] = []
    _, afterwards, counters = examined([Fault(mode="error", verbs=GETS, key="/c/")], pauses)
    assert (afterwards, len(pauses)) == (CHUNKS * N, 8)
    assert "damage_confirmed" not in counters


def test_bytes_that_are_wrong_twice_are_removed() -> None:
    _, afterwards, counters = examined([Fault(mode="flip", verbs=GETS, key="/c/")], [])
    assert afterwards == 0
    assert "damage_confirmed" in counters


def test_one_bad_read_costs_one_miss() -> None:
    url = fresh_memory_url()
    faulty = FaultyStore(open_store(url))
    tokens, kv = random_tokens(CHUNKS * N), random_kv(SPACE, CHUNKS * N)
    with Cache.on_store(faulty, SPACE, small_settings(url, host_bytes=None)) as cache:
        cache.store(tokens, kv).result(5)
        faulty.faults = [Fault(mode="flip", verbs=GETS, key="/c/", times=1)]
        assert cache.retrieve(cache.lookup(tokens)).result(5).tokens < CHUNKS * N
        assert cache.damage.settle(5)
        assert same_bits(cache.retrieve(cache.lookup(tokens)).result(5).array, kv)


def test_a_publisher_that_is_closed_says_so() -> None:
    url = fresh_memory_url()
    with Cache.open(url, SPACE, small_settings(url)) as cache:
        cache._publisher.close()
        with pytest.raises(Unavailable) as e:
            cache.store(random_tokens(N), random_kv(SPACE, N)).result(5)
        assert e.value.kind == "closed"
