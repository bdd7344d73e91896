"""What loads and stores ask for: how many requests, how many bytes, how much memory. Counted, not timed."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lmcache_s3.benchmarks.figures import Figure
from lmcache_s3.benchmarks.transfer_parts import LLAMA_8B, SPACE_ID, Engine, LinkedStore, LinkSpeed, made_up_kv, upload
from lmcache_s3.cache import Cache
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Bug, Unavailable
from lmcache_s3.identity import KVGroup, Space
from lmcache_s3.testing.small import fresh_memory_url, random_tokens, small_settings
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.transfer import Transfer, TransferSettings
from lmcache_s3.types import ChunkRef, Geometry, Grid

_TOKENS = 4096
_LOADS = 4
"""Of each rank: second requests of a busy machine, one in twenty at most, count as read too."""
_SMALLER = Geometry(kv=2, layers=8, heads=8, head_dim=128, kv_dtype="bfloat16", chunk_tokens=256)


def shape() -> list[Figure]:
    return [*_requests(), _overread(), *_memory()]


def _requests() -> list[Figure]:
    """4,096 tokens of an 8B model through two caches on one counted store; index included, once both are open."""
    codec = make_codec("cachegen")
    group = KVGroup("full", LLAMA_8B.layers, LLAMA_8B.kv, LLAMA_8B.heads, LLAMA_8B.head_dim)
    fidelity = f"unmeasured-cachegen-{codec.level}"
    space = Space(SPACE_ID, "bfloat16", (group,), {}, LLAMA_8B.chunk_tokens, fidelity=fidelity)
    url = fresh_memory_url()
    settings = small_settings(url, codec="cachegen", host_bytes=None, staging_bytes="512MiB", io_threads=32)
    tokens, kv = random_tokens(_TOKENS), made_up_kv(LLAMA_8B, _TOKENS // LLAMA_8B.chunk_tokens)
    puts, gets = CountingStore(open_store(url)), CountingStore(open_store(url))
    with Cache.on_store(puts, space, settings) as writer, Cache.on_store(gets, space, settings) as reader:
        puts.reset()
        writer.store(tokens, kv).result(120)
        stored = puts.counts["put"] + puts.counts["create"]
        gets.reset()
        reader.sync()
        if reader.retrieve(reader.lookup(tokens)).result(120).tokens != _TOKENS:
            raise Bug("not all tokens were retrieved")
        read = sum(gets.counts.values())
    return [
        Figure("transfer.puts_per_4096_tokens_stored", stored, "requests", 3, "lower"),
        Figure("transfer.gets_per_4096_tokens_read", read, "requests", 16, "lower"),
    ]


def _overread() -> Figure:
    """Bytes read ÷ bytes needed by readers of another tensor-parallel size than the writer's, codec `fast`."""
    store = CountingStore(open_store(fresh_memory_url()))
    transfer = Transfer(store, SPACE_ID, _SMALLER, make_codec("fast"), [])
    kv = made_up_kv(_SMALLER, 4)
    worst = 0.0
    try:
        # TP1 with four head groups and TP4 write the same grid: four shards.
        for ranks in (4, 2):
            chunks = upload(transfer, kv, 16, Grid(1, 4))
            store.reset()
            for rank in [*range(ranks)] * _LOADS:
                n = _SMALLER.heads // ranks
                report = transfer.load(chunks, _nothing, heads=range(rank * n, (rank + 1) * n)).result(60)
                if report.loaded_chunks != len(chunks):
                    raise Bug(f"rank {rank} of {ranks} did not load all")
            worst = max(worst, store.read_bytes / (_SMALLER.chunk_bytes * len(chunks) * _LOADS))
    finally:
        transfer.close()
    return Figure("transfer.relayout_overread", worst, "×", 1.1, "lower")


def _nothing(*_: object) -> None:
    pass


def _memory() -> list[Figure]:
    """Loads and stores of both kinds of codec at once, more than the budget holds; what Python allocates meanwhile.

    Counted by tracemalloc, which sees every NumPy array and every bytes object; engine blocks and source are there
    before, the store answers from memory that is there too.
    """
    staging_bytes, peak = 256 << 20, 0
    settings = TransferSettings(staging_bytes=staging_bytes, io_threads=16)
    kv, engine = made_up_kv(_SMALLER, 4), Engine(_SMALLER, 16)
    for codec in ("fast", "cachegen"):
        store = _Canned()
        transfer = Transfer(store, SPACE_ID, _SMALLER, make_codec(codec), [], settings=settings)
        try:
            extents = [upload(transfer, kv, 16, seed=seed) for seed in range(4)]
            transfer.load(extents[0][:1], engine.sink).result(60)  # what is imported and compiled is no buffer
        finally:
            transfer.close()
        store.keep = False
        del transfer
        gc.collect()
        tracemalloc.start()
        try:
            linked = LinkedStore(store, LinkSpeed(0.002, 2e9))
            measured = Transfer(linked, SPACE_ID, _SMALLER, make_codec(codec), [], settings=settings)
            try:
                _at_once(measured, engine, kv, extents)
            finally:
                measured.close()
            peak = max(peak, tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return [
        Figure("transfer.peak_over_budget", max(0, peak - staging_bytes), "bytes", 0, "lower"),
        Figure("transfer.peak_of_budget", peak / staging_bytes, "×", None, "lower"),
    ]


def _at_once(transfer: Transfer, engine: Engine, kv: np.ndarray, extents: Sequence[Sequence[ChunkRef]]) -> None:
    """Loads of different extents and many stores side by side; stores may find no room."""

    def store(seed: int) -> None:
        try:
            upload(transfer, kv, 8, seed=seed)
        except Unavailable as e:
            if e.kind != "full":
                raise

    def load(i: int) -> None:
        for chunks in (*extents[i:], *extents[:i]):
            report = transfer.load(chunks, engine.sink, deadline_s=120).result()
            if report.loaded_chunks != len(chunks):
                raise Bug(f"loaded {report.loaded_chunks} of {len(chunks)} chunks")

    with ThreadPoolExecutor(6) as pool:
        for future in [*(pool.submit(load, i) for i in range(3)), *(pool.submit(store, 100 + i) for i in range(12))]:
            future.result()
    if not transfer.drain(60):
        raise Bug("the transfer does not come to rest")


class _Canned(CountingStore):
    """A store in memory that reads without allocating, and forgets what is put once `keep` is off."""

    def __init__(self) -> None:
        super().__init__(open_store(fresh_memory_url()))
        self.keep = True
        self._objects: dict[str, bytes] = {}

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        if self.keep:
            self._objects[key] = bytes(data)

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(self._objects[key], np.uint8, into.nbytes, start))
