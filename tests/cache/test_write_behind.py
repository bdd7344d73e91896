"""Write-behind in `Cache`: what rests is matched and loaded, goes up together, and is acknowledged then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from lmcache_s3 import Cache, Invalid, Unavailable
from lmcache_s3.index.service import Verdict
from lmcache_s3.testing.faults import Fault, FaultyStore
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
from lmcache_s3.types import ChunkRef

N = 16
SPACE = small_space()


def opened(store: ObjectStore, **overrides: object) -> Cache:
    settings = {"write_behind_s": 600, "host_bytes": None} | overrides
    return Cache.on_store(store, SPACE, small_settings("memory://unused", **settings))


def shards(store: ObjectStore) -> int:
    return sum("/c/" in one.key for one in store.list("spaces/"))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def resting(cache: Cache) -> int:
    return cache.stats().tiers["resting"].used_bytes


@pytest.mark.parametrize("head_groups", [1, 2])
def test_turns_rest_are_loaded_and_go_up_as_one_extent(head_groups: int) -> None:
    url = fresh_memory_url()
    store = open_store(url)
    tokens, kv = random_tokens(9 * N), random_kv(SPACE, 9 * N)
    with opened(store, head_groups=head_groups) as cache:
        handles = []
        for n in (2, 5, 9):
            handles.append(cache.store(tokens[: n * N], kv[:, :, : n * N]))
            until(lambda n=n: cache.lookup(tokens).tokens == n * N)  # type: ignore[misc]
            got = cache.retrieve(cache.lookup(tokens)).result(5)
            assert same_bits(got.array, kv[:, :, : n * N])
            assert got.report.tier_bytes.keys() == {"resting"}
        assert not any(handle.done() for handle in handles)
        assert shards(store) == 0
        old = cache.lookup(tokens)
        cache.flush()
        reports = [handle.result(5) for handle in handles]
        assert [one.stored_chunks for one in reports] == [2, 3, 4]
        assert all(verdict is Verdict.LIVE for one in reports for verdict in one.verdicts)
        assert shards(store) == head_groups
        until(lambda: resting(cache) == 0)
        got = cache.retrieve(old).result(5)  # matched when it rested, loaded from where it is now
        assert same_bits(got.array, kv)
        assert got.report.tier_bytes.keys() == {"object"}
        assert got.report.requests == head_groups, "one extent, read as one"
    with opened(open_store(url)) as other:
        assert same_bits(other.retrieve(other.lookup(tokens)).result(5).array, kv)


@pytest.mark.parametrize("prefetch", [False, True])
def test_what_goes_up_while_a_load_of_it_begins_is_loaded(prefetch: bool) -> None:
    tokens, kv = random_tokens(4 * N), random_kv(SPACE, 4 * N)
    with opened(open_store(fresh_memory_url()), host_bytes="1MiB") as cache:
        handle = cache.store(tokens, kv)
        until(lambda: cache.lookup(tokens).tokens == 4 * N)
        match, behind = cache.lookup(tokens), cache._behind
        assert behind is not None
        current = behind.current

        def slow(chunks: Sequence[ChunkRef]) -> tuple[ChunkRef, ...]:
            found = current(chunks)
            cache.flush()
            handle.result(5)
            return found

        if prefetch:
            cache.flush()
            handle.result(5)
            assert cache.prefetch(match).result(5).loaded_chunks == 4
        else:
            behind.current = slow  # type: ignore[method-assign]
            assert same_bits(cache.retrieve(match).result(5).array, kv)
        assert cache.metrics.count("damage_reports") == 0


def test_a_flush_waits_for_no_store_to_come_to_rest() -> None:
    with opened(open_store(fresh_memory_url())) as cache:
        tokens, kv = random_tokens(9 * N), random_kv(SPACE, 9 * N)
        handles = [cache.store(tokens[: n * N], kv[:, :, : n * N]) for n in (2, 5, 9)]
        cache.flush()
        for handle in handles:
            handle.result(10)
        assert same_bits(cache.retrieve(cache.lookup(tokens)).result(5).array, kv)


def test_what_is_old_enough_goes_up_by_itself() -> None:
    store = open_store(fresh_memory_url())
    with opened(store, write_behind_s=0.2) as cache:
        report = cache.store(random_tokens(2 * N), random_kv(SPACE, 2 * N)).result(5)
        assert (report.stored_chunks, report.verdicts) == (2, (Verdict.LIVE,))


def test_an_extents_worth_does_not_rest() -> None:
    store = open_store(fresh_memory_url())
    extent_bytes = 5 * SPACE.geometry.chunk_bytes // 2
    with opened(store, extent_bytes=extent_bytes) as cache:
        tokens, kv = random_tokens(5 * N), random_kv(SPACE, 5 * N)
        handle = cache.store(tokens, kv)
        until(lambda: shards(store) == 2)
        until(lambda: cache.lookup(tokens).tokens == 5 * N)
        assert not handle.done(), "the fifth chunk rests"
        cache.flush()
        assert handle.result(5).stored_chunks == 5
        assert shards(store) == 3


def test_two_that_store_the_same_at_once_rest_it_once() -> None:
    store = open_store(fresh_memory_url())
    tokens, kv = random_tokens(4 * N), random_kv(SPACE, 4 * N)
    with opened(store) as cache:
        handles = [cache.store(tokens[: n * N], kv[:, :, : n * N]) for n in (4, 3, 4)]
        until(lambda: cache.lookup(tokens).tokens == 4 * N)
        cache.transfer.drain(5)
        cache.flush()
        for handle in handles:
            handle.result(5)
        assert shards(store) == 1
        until(lambda: resting(cache) == 0)
        assert same_bits(cache.retrieve(cache.lookup(tokens)).result(5).array, kv)


def test_what_is_known_because_it_rests_is_not_acknowledged_yet() -> None:
    store = open_store(fresh_memory_url())
    tokens, kv = random_tokens(4 * N), random_kv(SPACE, 4 * N)
    with opened(store) as cache:
        first = cache.store(tokens[: 3 * N], kv[:, :, : 3 * N])
        until(lambda: cache.lookup(tokens).tokens == 3 * N)
        again, longer = cache.store(tokens[: 2 * N], kv[:, :, : 2 * N]), cache.store(tokens, kv)
        until(lambda: cache.lookup(tokens).tokens == 4 * N)
        assert not again.done()
        cache.flush()
        assert (again.result(5).known_chunks, again.result().stored_chunks) == (2, 0)
        assert first.done(), "what it knew of is durable"
        assert (longer.result(5).known_chunks, longer.result().stored_chunks) == (3, 1)


def test_close_uploads_what_rests() -> None:
    store = open_store(fresh_memory_url())
    tokens, kv = random_tokens(2 * N), random_kv(SPACE, 2 * N)
    inner = FaultyStore(store)
    cache = opened(inner)
    handle = cache.store(tokens, kv)
    until(lambda: cache.lookup(tokens).tokens == 2 * N)
    cache.close()
    assert handle.result(1).stored_chunks == 2
    with pytest.raises(Unavailable):
        cache.store(random_tokens(2 * N, 1), kv).result(1)


def test_a_store_that_is_down_fails_its_stores_and_leaves_nothing() -> None:
    inner = open_store(fresh_memory_url())
    faulty = FaultyStore(inner)
    tokens, kv = random_tokens(2 * N), random_kv(SPACE, 2 * N)
    with opened(faulty) as cache:
        handle = cache.store(tokens, kv)
        until(lambda: cache.lookup(tokens).tokens == 2 * N)
        faulty.faults = [Fault(mode="error", key="/c/")]
        cache.flush()
        with pytest.raises(Unavailable):
            handle.result(5)
        assert cache.lookup(tokens).tokens == 0
        until(lambda: resting(cache) == 0)
        faulty.faults = []
        again = cache.store(tokens, kv)
        until(lambda: cache.lookup(tokens).tokens == 2 * N)
        cache.flush()
        assert again.result(5).stored_chunks == 2


@pytest.mark.parametrize("head_groups", [1, 2])
def test_more_than_may_rest_is_refused(head_groups: int) -> None:
    store = open_store(fresh_memory_url())
    n_bytes = int(2.5 * SPACE.geometry.chunk_bytes)
    with opened(store, write_behind_bytes=n_bytes, head_groups=head_groups) as cache:
        with pytest.raises(Unavailable, match="write_behind_bytes"):
            cache.store(random_tokens(3 * N), random_kv(SPACE, 3 * N)).result(5)
        cache.transfer.drain(5)
        assert resting(cache) == 0


def test_prefetch_names_tiers_that_can_be_set_up() -> None:
    tokens, kv = random_tokens(N), random_kv(SPACE, N)
    with opened(open_store(fresh_memory_url()), host_bytes="1MiB") as cache:
        cache.store(tokens, kv)
        until(lambda: cache.lookup(tokens).tokens == N)
        for tier in ("disk", "resting", "object"):
            with pytest.raises(Invalid, match=rf"tier '{tier}' is not there to prefetch into \(there is: host\)"):
                cache.prefetch(cache.lookup(tokens), tier)
        assert cache.prefetch(cache.lookup(tokens), "host").result(5).loaded_chunks == 1


def test_under_pressure_the_oldest_goes_up() -> None:
    store = open_store(fresh_memory_url())
    n_bytes = 4 * SPACE.geometry.chunk_bytes
    with opened(store, write_behind_bytes=n_bytes) as cache:
        first = cache.store(random_tokens(2 * N, 1), random_kv(SPACE, 2 * N, 1))
        until(lambda: resting(cache) > 0)
        second = cache.store(random_tokens(N, 2), random_kv(SPACE, N, 2))
        assert first.result(5).stored_chunks == 2
        assert not second.done()


def test_what_is_cancelled_leaves_nothing() -> None:
    inner = open_store(fresh_memory_url())
    tokens, kv = random_tokens(2 * N), random_kv(SPACE, 2 * N)
    with opened(inner) as cache:
        cache.store(tokens, kv).cancel()
        cache.transfer.drain(5)
        cache.flush()
        until(lambda: resting(cache) == 0)


def test_many_chats_at_once_keep_every_byte() -> None:
    """Writers, readers and flushes race; whatever is retrieved is what was stored."""
    store = open_store(fresh_memory_url())
    chats = [(random_tokens(8 * N, seed), random_kv(SPACE, 8 * N, seed)) for seed in range(6)]
    wrong: list[str] = []

    def talk(seed: int) -> None:
        rng = np.random.default_rng(seed)
        tokens, kv = chats[seed % len(chats)]
        for _ in range(12):
            n = int(rng.integers(1, 9))
            cache.store(tokens[: n * N], kv[:, :, : n * N])
            got = cache.retrieve(cache.lookup(tokens)).result(10)
            if not same_bits(got.array, kv[:, :, : got.tokens]):
                wrong.append(f"chat {seed}: {got.tokens} tokens")
            if rng.random() < 0.3:
                cache.flush()

    with opened(store, write_behind_s=0.05) as cache:
        threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        until(lambda: resting(cache) == 0)
        for tokens, kv in chats:
            got = cache.retrieve(cache.lookup(tokens)).result(10)
            assert got.tokens > 0
            assert same_bits(got.array, kv[:, :, : got.tokens])
