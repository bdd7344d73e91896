"""`Cache` end to end, on memory, files and a real S3 server."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr

import lmcache_s3
from lmcache_s3 import Cache, ExtraKey, Invalid, Unavailable
from lmcache_s3.codecs.registry import fidelity_class, make_codec
from lmcache_s3.index.service import Verdict
from lmcache_s3.testing.faults import Fault, FaultyStore, Verb
from lmcache_s3.testing.small import (
    fresh_memory_url,
    random_kv,
    random_tokens,
    same_bits,
    small_settings,
    small_space,
)
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import ITEM_BYTES, KVDtype, extent_prefix

N = 16  # tokens a chunk, in small spaces
SPACE = small_space()
DATA_KEY = "/c/"


def open_cache(url: str, space: lmcache_s3.Space = SPACE, **overrides: object) -> Cache:
    return Cache.open(url, space, small_settings(url, **overrides))


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return fresh_memory_url()
    found = request.getfixturevalue("local_url" if request.param == "file" else "bucket_url")
    return f"{found}/{secrets.token_hex(4)}"


@pytest.fixture
def pair() -> Iterator[tuple[Cache, Cache]]:
    """A writer and a reader of one space, each with tiers of its own."""
    url = fresh_memory_url()
    with open_cache(url) as writer, open_cache(url) as reader:
        yield writer, reader


# --- the main job


def test_one_cache_stores_another_retrieves(url: str) -> None:
    tokens, kv = random_tokens(10 * N + 5), random_kv(SPACE, 10 * N + 5)
    with open_cache(url) as writer, open_cache(url) as reader:
        before = dict(writer.stats().requests)
        report = writer.store(tokens, kv).result(20)
        requests = {verb: n - before.get(verb, 0) for verb, n in writer.stats().requests.items()}
        assert (report.stored_chunks, report.known_chunks, report.verdicts) == (10, 0, (Verdict.LIVE,))
        # 3 PUTs (shard, zarr.json, version), and the commit's own two GETs.
        assert (requests["put"], requests["create"], requests.get("list", 0)) == (2, 1, 0)
        assert requests["get"] <= 2
        assert reader.lookup(tokens).tokens == 0, "not synchronised yet"
        reader.sync()
        before = dict(reader.stats().requests)
        match = reader.lookup(tokens)
        assert reader.stats().requests == before, "looking up makes no request"
        assert match.tokens == 10 * N
        assert reader.stats().index.accesses == 0, "a match is no hit yet"
        with reader.pin(match):
            got = reader.retrieve(match).result(20)
        assert reader.stats().index.accesses == 1, "one extent was loaded"
        assert (got.tokens, got.report.requests, set(got.report.tier_bytes)) == (10 * N, 1, {"object"})
        assert same_bits(got.array, kv[:, :, : 10 * N])
        again = reader.store(tokens, kv).result(5)
        assert (again.stored_chunks, again.known_chunks, again.extents) == (0, 10, ())
        assert reader.transfer.drain(5)
        assert set(reader.retrieve(match).result(5).report.tier_bytes) == {"host"}


@pytest.mark.parametrize("kv_dtype", ITEM_BYTES)
@pytest.mark.parametrize("codec", ["fast", "torch", "safetensors", "lossless"])
def test_exact_codecs_and_dtypes_come_back_bit_for_bit(codec: str, kv_dtype: KVDtype) -> None:
    space = small_space(kv_dtype)
    tokens, kv = random_tokens(3 * N), random_kv(space, 3 * N)
    url = fresh_memory_url()
    with open_cache(url, space, codec=codec, head_groups=2) as writer:
        writer.store(tokens, kv).result(10)
    with open_cache(url, space) as reader:  # whatever its own codec
        got = reader.retrieve(reader.lookup(tokens)).result(10)
    assert same_bits(got.array, kv)


def test_a_lossy_codec_has_spaces_of_its_own() -> None:
    space = small_space(fidelity=fidelity_class(make_codec("cachegen"), None))
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 4, 4 * N, 4, 8)).astype(ml_dtypes.bfloat16)
    url, tokens = fresh_memory_url(), random_tokens(4 * N)
    with pytest.raises(Invalid, match="codec=cachegen writes spaces of fidelity"):
        open_cache(url, codec="cachegen")
    with pytest.raises(Invalid, match="codec=fast writes spaces of fidelity 'exact'"):
        open_cache(url, space)
    with open_cache(url, space, codec="cachegen") as writer, open_cache(url, space, codec="cachegen") as reader:
        writer.store(tokens, values).result(10)
        reader.sync()
        got = reader.retrieve(reader.lookup(tokens)).result(60)
    assert got.tokens == 4 * N
    decoded = got.array.view(ml_dtypes.bfloat16).astype(np.float32)
    assert same_bits(got.array[:, :, 0], values.view(np.uint16)[:, :, 0]), "the first token is exact"
    errors = np.abs(decoded - values.astype(np.float32)).mean(axis=(1, 2, 3, 4))
    assert 0 < errors[0] < 10 / 16 / 4, "K: a quarter of a step"
    assert 0 < errors[1] < 23 / 16 / 4, "V"
    with open_cache(url, space, read_only=True) as anyone:
        assert anyone.retrieve(anyone.lookup(tokens)).result(10).tokens == 4 * N


@pytest.mark.parametrize("head_groups", [1, 2, 4])
@pytest.mark.parametrize("codec", ["fast", "torch", "safetensors", "lossless"])
def test_plain_zarr_reads_what_the_cache_wrote(tmp_path: Path, codec: str, head_groups: int) -> None:
    tokens, kv = random_tokens(3 * N), random_kv(SPACE, 3 * N)
    with open_cache(str(tmp_path), codec=codec, head_groups=head_groups) as cache:
        [name] = cache.store(tokens, kv).result(10).extents
    array = zarr.open_array(str(tmp_path / extent_prefix(SPACE.id, name)), mode="r")
    assert same_bits(np.asarray(array[:]), kv)
    assert array.metadata.dimension_names == ("kv", "layer", "token", "head", "channel")  # type: ignore[union-attr]


def test_mla() -> None:
    space = small_space(kv=1, heads=1, head_dim=24)
    tokens, kv = random_tokens(2 * N), random_kv(space, 2 * N)
    with open_cache(fresh_memory_url(), space) as cache:
        cache.store(tokens, kv).result(10)
        assert same_bits(cache.retrieve(cache.lookup(tokens)).result(10).array, kv)


# --- prefixes


@pytest.mark.parametrize("n_tokens", [0, 1, N - 1, N, N + 1, 3 * N - 1, 3 * N, 3 * N + 1])
def test_only_full_chunks_count(pair: tuple[Cache, Cache], n_tokens: int) -> None:
    writer, reader = pair
    tokens, kv = random_tokens(n_tokens), random_kv(SPACE, n_tokens)
    full = n_tokens // N
    assert writer.store(tokens, kv).result(10).stored_chunks == full
    reader.sync()
    match = reader.lookup(tokens)
    assert match.tokens == full * N
    assert same_bits(reader.retrieve(match).result(10).array, kv[:, :, : full * N])


def test_a_prompt_matches_as_far_as_it_agrees(pair: tuple[Cache, Cache]) -> None:
    writer, _ = pair
    tokens, kv = random_tokens(6 * N), random_kv(SPACE, 6 * N)
    writer.store(tokens, kv).result(10)
    for at in (0, 1, N - 1, N, 3 * N + 2, 6 * N - 1):
        other = [*tokens]
        other[at] += 1
        match = writer.lookup(other)
        assert match.tokens == at // N * N
        assert same_bits(writer.retrieve(match).result(5).array, kv[:, :, : match.tokens])
    assert writer.lookup(tokens + random_tokens(100, seed=1)).tokens == 6 * N
    assert writer.lookup(tokens[: 2 * N + 3]).tokens == 2 * N


def test_salts_and_extra_keys_keep_tenants_apart(pair: tuple[Cache, Cache]) -> None:
    writer, _ = pair
    tokens, kv = random_tokens(2 * N), random_kv(SPACE, 2 * N)
    lora = [ExtraKey("lora", "ab", 0)]
    image = [ExtraKey("image", "cd", N + 3)]
    writer.store(tokens, kv, salt="tenant", extra=lora).result(10)
    assert writer.lookup(tokens).tokens == 0
    assert writer.lookup(tokens, salt="other", extra=lora).tokens == 0
    assert writer.lookup(tokens, salt="tenant", extra=lora).tokens == 2 * N
    assert writer.lookup(tokens, salt="tenant", extra=[*lora, *image]).tokens == N


def test_a_longer_prompt_stores_only_what_is_new(pair: tuple[Cache, Cache]) -> None:
    writer, reader = pair
    tokens, kv = random_tokens(9 * N), random_kv(SPACE, 9 * N)
    writer.store(tokens[: 3 * N], kv[:, :, : 3 * N]).result(10)
    reader.sync()
    report = reader.store(tokens[: 7 * N], kv[:, :, : 7 * N]).result(10)
    assert (report.stored_chunks, report.known_chunks) == (4, 3)
    # The last token of a prompt has no KV yet.
    assert writer.store(tokens, kv[:, :, : 9 * N - 1]).result(10).stored_chunks in (1, 5)
    writer.sync()
    match = writer.lookup(tokens)
    assert match.tokens == 8 * N
    assert same_bits(writer.retrieve(match).result(10).array, kv[:, :, : 8 * N])


def test_long_prompts_become_several_extents(tmp_path: Path) -> None:
    url = str(tmp_path)
    chunk_bytes = SPACE.geometry.chunk_bytes
    tokens, kv = random_tokens(8 * N), random_kv(SPACE, 8 * N)
    with open_cache(url, extent_bytes=3 * chunk_bytes + 10) as cache:
        report = cache.store(tokens, kv).result(10)
        records = [live.record for live in cache.index.extents()]
    assert [name.n_chunks for name in report.extents] == [3, 3, 2]
    assert [record.first_token for record in records] == [0, 3 * N, 6 * N]
    assert [record.parent for record in records[1:]] == [record.name.last_hash for record in records[:-1]]
    with open_cache(url) as reader:
        got = reader.retrieve(reader.lookup(tokens)).result(10)
    assert same_bits(got.array, kv)


def test_stores_do_not_wait_for_one_anothers_commits() -> None:
    """With a leader a commit takes seconds. All that is uploaded meanwhile rides in the next version."""
    inner, go_on = open_store(fresh_memory_url()), threading.Event()
    slow = FaultyStore(
        inner,
        [Fault(mode="latency", verbs=frozenset({"create"}), key="manifest/log/", latency_s=1)],
        sleep=lambda _: go_on.wait(30),
    )
    settings = small_settings("memory://unused", extent_bytes=SPACE.geometry.chunk_bytes)
    with Cache.on_store(slow, SPACE, settings) as cache:
        handles = [cache.store(random_tokens(3 * N, seed), random_kv(SPACE, 3 * N, seed)) for seed in range(10)]
        deadline = time.monotonic() + 20
        while sum(DATA_KEY in info.key for info in inner.list("")) < 30 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert sum(DATA_KEY in info.key for info in inner.list("")) == 30
        assert not any(handle.done() for handle in handles)
        go_on.set()
        reports = [handle.result(20) for handle in handles]
        assert all(report.verdicts == (Verdict.LIVE,) * 3 and report.stored_chunks == 3 for report in reports)
        assert cache.index.version < 10


def test_two_that_store_the_same_at_once_agree(pair: tuple[Cache, Cache]) -> None:
    a, b = pair
    tokens, kv = random_tokens(4 * N), random_kv(SPACE, 4 * N)
    reports = [handle.result(10) for handle in [cache.store(tokens, kv) for cache in (a, b)]]
    assert {report.verdicts for report in reports} <= {(Verdict.LIVE,), (Verdict.COVERED,)}
    for cache in pair:
        cache.sync()
        assert same_bits(cache.retrieve(cache.lookup(tokens)).result(5).array, kv)
    assert (Verdict.LIVE,) in {report.verdicts for report in reports}


# --- arguments


def test_kv_may_be_a_tensor_or_a_true_bfloat16_array(pair: tuple[Cache, Cache]) -> None:
    writer, _ = pair
    tensor = torch.randn(4 * N, 4, 2, 4, 8).to(torch.bfloat16).permute(2, 1, 0, 3, 4)
    bits = tensor.view(torch.uint16).numpy()
    for seed, kv in enumerate((tensor, tensor.view(torch.uint16), bits, bits.view(ml_dtypes.bfloat16))):
        tokens = random_tokens(4 * N, seed)
        assert writer.store(tokens, kv).result(10).stored_chunks == 4
        assert same_bits(writer.retrieve(writer.lookup(tokens)).result(5).array, np.ascontiguousarray(bits))


def test_out_may_be_the_callers(pair: tuple[Cache, Cache]) -> None:
    writer, _ = pair
    tokens, kv = random_tokens(4 * N), random_kv(SPACE, 4 * N)
    writer.store(tokens, kv).result(10)
    match = writer.lookup(tokens)
    out = np.zeros((5 * N, 4, 2, 4, 8), np.uint16).transpose(2, 1, 0, 3, 4)  # larger, and token-major
    got = writer.retrieve(match, out=out).result(5)
    assert np.shares_memory(got.array, out)
    assert same_bits(got.array, kv)
    assert not out[:, :, 4 * N :].any()
    frozen = np.zeros_like(kv)
    frozen.flags.writeable = False
    for bad in (np.zeros((2, 4, 3 * N, 4, 8), np.uint16), np.zeros(kv.shape, np.float16), np.zeros(3), frozen):
        with pytest.raises(Invalid):
            writer.retrieve(match, out=bad)
    with pytest.raises(Invalid, match="out is a list"):
        writer.retrieve(match, out=[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("kv", [np.zeros((2, 4, N, 4, 7), np.uint16), np.zeros((2, 4, N, 4, 8), np.float16), [1, 2]])
def test_kv_of_another_shape_is_refused(pair: tuple[Cache, Cache], kv: object) -> None:
    with pytest.raises(Invalid, match="KV is") as e:
        pair[0].store(random_tokens(N), kv)
    assert "\n" not in str(e.value)


def test_more_kv_than_tokens_is_refused(pair: tuple[Cache, Cache]) -> None:
    with pytest.raises(Invalid, match=f"KV of {N} tokens for a prompt of {N - 1}"):
        pair[0].store(random_tokens(N - 1), random_kv(SPACE, N))


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(Invalid, match="head_groups=3 does not divide this model's 4 heads"):
        open_cache(fresh_memory_url(), head_groups=3)
    with pytest.raises(Invalid, match="staging_bytes"):
        open_cache(fresh_memory_url(), staging_bytes=100)


def test_sizes_of_little_use_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with open_cache(fresh_memory_url(), extent_bytes=10):
        (said,) = caplog.messages
    assert said.startswith("extent_bytes=10 is less than one chunk of this model")


def test_short_prompts_can_be_left_out() -> None:
    with open_cache(fresh_memory_url(), store_min_tokens=3 * N) as cache:
        assert cache.store(random_tokens(2 * N), random_kv(SPACE, 2 * N)).result(5).stored_chunks == 0
        assert cache.store(random_tokens(3 * N), random_kv(SPACE, 3 * N)).result(5).stored_chunks == 3


def test_second_touch_stores_what_was_offered_before() -> None:
    url = fresh_memory_url()
    tokens, kv = random_tokens(5 * N), random_kv(SPACE, 5 * N)
    with open_cache(url, admission="second_touch") as cache:
        assert cache.store(tokens[: 3 * N], kv[:, :, : 3 * N]).result(5).stored_chunks == 0
        assert cache.store(tokens, kv).result(5).stored_chunks == 3
        assert cache.store(tokens, kv).result(5).stored_chunks == 2
        assert same_bits(cache.retrieve(cache.lookup(tokens)).result(5).array, kv)


def test_read_only_writes_nothing() -> None:
    url = fresh_memory_url()
    tokens, kv = random_tokens(2 * N), random_kv(SPACE, 2 * N)
    with open_cache(url) as writer:
        writer.store(tokens, kv).result(5)
    with open_cache(url, read_only=True) as reader:
        assert same_bits(reader.retrieve(reader.lookup(tokens)).result(5).array, kv)
        with pytest.raises(Invalid, match="read_only"):
            reader.store(tokens, kv)
        requests = reader.stats().requests
        assert not any(requests.get(verb) for verb in ("put", "create", "delete"))


# --- tiers


def test_prefetch_and_a_restart_on_the_same_disk(tmp_path: Path) -> None:
    url = fresh_memory_url()
    disk: dict[str, Any] = {"disk_bytes": "1MiB", "disk_path": str(tmp_path / "disk")}
    tokens, kv = random_tokens(4 * N), random_kv(SPACE, 4 * N)
    with open_cache(url) as writer:
        writer.store(tokens, kv).result(5)
    with open_cache(url, **disk) as first:
        assert first.prefetch(first.lookup(tokens), "disk").result(5).loaded_chunks == 4
        with pytest.raises(Invalid, match="disk_path"):
            open_cache(url, **disk)
    with open_cache(url, **disk) as second:
        got = second.retrieve(second.lookup(tokens)).result(5)
        assert set(got.report.tier_bytes) == {"disk"}
        assert same_bits(got.array, kv)
        assert second.stats().tiers["disk"].hits == 4
        assert second.transfer.drain(5)
        assert second.stats().tiers["host"].cells == 4


def test_without_any_tier(tmp_path: Path) -> None:
    tokens, kv = random_tokens(4 * N), random_kv(SPACE, 4 * N)
    with open_cache(str(tmp_path), host_bytes=None) as cache:
        cache.store(tokens, kv).result(5)
        got = cache.retrieve(cache.lookup(tokens)).result(5)
        assert same_bits(got.array, kv)
        assert set(cache.stats().tiers) == {"object"}


# --- a store that is slow or down


def test_a_store_that_is_down_is_a_miss_for_now() -> None:
    inner = open_store(fresh_memory_url())
    faulty = FaultyStore(inner)
    settings = small_settings("memory://unused", host_bytes=None)
    tokens, kv = random_tokens(4 * N), random_kv(SPACE, 4 * N)
    with Cache.on_store(faulty, SPACE, settings) as cache:
        faulty.faults = [Fault(mode="error", key=DATA_KEY)]
        with pytest.raises(Unavailable):
            cache.store(tokens, kv).result(5)
        assert cache.lookup(tokens).tokens == 0
        faulty.faults = []
        cache.store(tokens, kv).result(5)
        faulty.faults = [Fault(mode="error", key=DATA_KEY)]
        match = cache.lookup(tokens)
        got = cache.retrieve(match).result(5)
        assert got.tokens == 0
        assert isinstance(got.report.failed[0][2], Unavailable)
        assert cache.lookup(tokens).tokens == 4 * N, "not the extent's fault"
        faulty.faults = []
        assert same_bits(cache.retrieve(match).result(5).array, kv)


@pytest.mark.parametrize("verb", ["put", "create"])
def test_a_store_that_fails_halfway_is_not_seen(verb: Verb) -> None:
    inner = open_store(fresh_memory_url())
    faulty = FaultyStore(inner)
    tokens, kv = random_tokens(2 * N), random_kv(SPACE, 2 * N)
    with Cache.on_store(faulty, SPACE, small_settings("memory://unused")) as cache:
        faulty.faults = [Fault(mode="error", verbs=frozenset({verb}), key="" if verb == "create" else "zarr.json")]
        with pytest.raises(Unavailable):
            cache.store(tokens, kv, deadline_s=0.3).result(5)
        with Cache.on_store(inner, SPACE, small_settings("memory://unused")) as other:
            assert other.lookup(tokens).tokens == 0
        cache.close(timeout_s=0.2)


def test_deadlines() -> None:
    inner = open_store(fresh_memory_url())
    faulty = FaultyStore(inner)
    tokens, kv = random_tokens(2 * N), random_kv(SPACE, 2 * N)
    with Cache.on_store(faulty, SPACE, small_settings("memory://unused", host_bytes=None)) as cache:
        cache.store(tokens, kv).result(5)
        faulty.faults = [Fault(mode="latency", key=DATA_KEY, latency_s=0.3)]
        got = cache.retrieve(cache.lookup(tokens), deadline_s=0.05).result(5)
        assert (got.tokens, got.report.failed[0][2].kind) == (0, "timeout")
        with pytest.raises(Unavailable) as e:
            cache.store(random_tokens(N, 1), kv[:, :, :N], deadline_s=0.05).result(5)
        assert e.value.kind == "timeout"


def test_what_was_cancelled_is_never_committed() -> None:
    """Its array may have changed while it was encoded."""
    inner = open_store(fresh_memory_url())
    faulty = FaultyStore(inner, [Fault(mode="latency", key=DATA_KEY, latency_s=0.2)])
    tokens, kv = random_tokens(2 * N), random_kv(SPACE, 2 * N).copy()
    with Cache.on_store(faulty, SPACE, small_settings("memory://unused")) as cache:
        handle = cache.store(tokens, kv)
        assert handle.cancel()
        kv[:] = 0
        with pytest.raises(Unavailable):
            handle.result(0)
        cache.transfer.drain(5)
        faulty.faults = []
        cache.store(random_tokens(N, 1), random_kv(SPACE, N)).result(5)
        assert cache.lookup(tokens).tokens == 0


def test_close_with_work_in_flight() -> None:
    inner = open_store(fresh_memory_url())
    faulty = FaultyStore(inner)
    tokens, kv = random_tokens(2 * N), random_kv(SPACE, 2 * N)
    cache = Cache.on_store(faulty, SPACE, small_settings("memory://unused", host_bytes=None))
    cache.store(tokens, kv).result(5)
    faulty.faults = [Fault(mode="latency", key=DATA_KEY, latency_s=0.2)]
    loading = cache.retrieve(cache.lookup(tokens))
    storing = [cache.store(random_tokens(N, seed), kv[:, :, :N]) for seed in range(1, 6)]
    cache.close()
    assert (loading.result(1).tokens, loading.result().report.failed[0][2].kind) == (0, "closed")
    for handle in storing:
        with pytest.raises(Unavailable) as e:
            handle.result(1)
        assert e.value.kind == "closed"
    cache.close()
    with pytest.raises(Unavailable):
        cache.store(random_tokens(N, 9), kv[:, :, :N]).result(1)


# --- asyncio, package


async def test_asyncio() -> None:
    url = fresh_memory_url()
    prompts = [random_tokens(2 * N, seed) for seed in range(4)]
    kvs = [random_kv(SPACE, 2 * N, seed) for seed in range(4)]
    async with await Cache.open_async(url, SPACE, small_settings(url)) as cache:
        reports = await asyncio.gather(*(cache.store(t, kv) for t, kv in zip(prompts, kvs, strict=True)))
        assert [report.stored_chunks for report in reports] == [2] * 4
        got = await asyncio.gather(*(cache.retrieve(cache.lookup(tokens)) for tokens in prompts))
        assert all(same_bits(one.array, kv) for one, kv in zip(got, kvs, strict=True))


def test_open_takes_settings_by_name() -> None:
    with Cache.open(fresh_memory_url(), SPACE, codec="torch", single_writer=True) as cache:
        assert cache.transfer.codec.id == "torch"
    with pytest.raises(Invalid, match="did you mean codec"):
        Cache.open(fresh_memory_url(), SPACE, codek="torch")


def test_the_package_is_lazy_and_its_list_is_true() -> None:
    code = (
        "import sys, lmcache_s3; "
        "bad = {'torch', 'vllm', 'numba', 'triton', 'zarr', 'pyarrow'} & set(sys.modules); assert not bad, bad; "
        "[getattr(lmcache_s3, name) for name in lmcache_s3.__all__]; "
        "bad = {'torch', 'vllm', 'triton'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(lmcache_s3.__all__) <= set(dir(lmcache_s3))
    with pytest.raises(AttributeError):
        lmcache_s3.nothing  # noqa: B018
