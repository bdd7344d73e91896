"""How much of a real server's speed arrives: extents of an 8B model loaded into an engine's blocks, and stored.

Beside each the raw client (obstore) on the same bytes, and plain zarr over s3fs; in turn, so that what disturbs the
machine disturbs all. Extents are of 256 MiB, codec `fast`.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import numpy as np

from lmcache_s3.benchmarks.figures import Figure
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.benchmarks.transfer_parts import LLAMA_8B, SPACE_ID, Engine, made_up_kv, publish, upload
from lmcache_s3.benchmarks.transfer_raw import Meter, Range, RawClient, Spent
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Bug
from lmcache_s3.testing.servers import CephRGW, S3Server, SeaweedFS
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.tiers.stores.options import StoreOptions
from lmcache_s3.transfer import Transfer, TransferSettings
from lmcache_s3.types import ChunkRef, Grid, shard_key

EXTENT_CHUNKS = 8
_STAGING_BYTES = 1 << 30
_RAW = ((4 << 20, 8), (8 << 20, 4), (8 << 20, 8), (16 << 20, 4), (16 << 20, 8))
"""(bytes of a range, requests at once) tried with the raw client; it is measured with the best."""
_PUT_AT_ONCE = (2, 4)


def wire(steps: Steps, *, extents: int, rounds: int) -> list[Figure]:
    """extents: of 256 MiB, to be loaded. rounds: how often each is measured. Storing and loading have a server each,
    for a server frees what is deleted when it likes."""
    n = max(1, extents // 4)
    room = (2 * (rounds + 2) * n + 2) * EXTENT_CHUNKS * LLAMA_8B.chunk_bytes
    figures: list[Figure] = []
    with _opened(room) as (store, transfer, raw), steps(f"storing beside obstore, {rounds} rounds"):
        figures += _put(store, transfer, raw, made_up_kv(LLAMA_8B, 2), n, rounds)
    room = (extents + 2) * EXTENT_CHUNKS * LLAMA_8B.chunk_bytes
    with _opened(room) as (store, transfer, raw), steps(f"loading {extents} extents beside obstore and zarr"):
        figures += _get(store, transfer, raw, made_up_kv(LLAMA_8B, 2), extents, rounds)
    return figures


@contextmanager
def _opened(room_bytes: int) -> Iterator[tuple[ObjectStore, Transfer, RawClient]]:
    """A fresh server with so much room, a transfer over it, and the raw client of a process of its own."""
    server: S3Server
    with ExitStack() as stack:
        if CephRGW.missing():
            server = stack.enter_context(SeaweedFS())
        else:
            server = stack.enter_context(CephRGW(capacity_bytes=max(room_bytes, 4 << 30)))
        url = server.make_bucket("lmcache-transfer") + "/cache"
        os.environ.update(server.env())
        store = open_store(url, options=StoreOptions(endpoint_url=server.endpoint_url, max_connections=64))
        stack.callback(store.close)
        settings = TransferSettings(staging_bytes=_STAGING_BYTES)
        transfer = Transfer(store, SPACE_ID, LLAMA_8B, make_codec("fast"), [], settings=settings)
        stack.callback(transfer.close)
        yield store, transfer, stack.enter_context(RawClient(url, server.env()))


def _put(store: ObjectStore, transfer: Transfer, raw: RawClient, kv: np.ndarray, n: int, rounds: int) -> list[Figure]:
    """n: extents a round."""
    seed = [1000]

    def clear() -> None:
        for info in list(store.list("")):
            store.delete(info.key)

    def ours() -> Spent:
        geometry = LLAMA_8B
        jobs = []
        for _ in range(n):
            seed[0] += 1
            jobs.append(seed[0])
        with Meter() as meter:
            refs = _side_by_side([lambda s=s: upload(transfer, kv, EXTENT_CHUNKS, seed=s) for s in jobs])  # type: ignore[misc]
        if any(len(chunks) != EXTENT_CHUNKS for chunks in refs):
            raise Bug("an extent was not stored whole")
        clear()
        return meter.spent(n * EXTENT_CHUNKS * geometry.chunk_bytes)

    def theirs(at_once: int) -> Spent:
        spent = raw.put({f"raw/{i}": EXTENT_CHUNKS * LLAMA_8B.chunk_bytes for i in range(n)}, at_once)
        clear()
        return spent

    at_once = max(_PUT_AT_ONCE, key=lambda n: theirs(n).mb_per_s)
    ours()
    a, b = _in_turn([ours, lambda: theirs(at_once)], rounds)
    return [
        Figure("transfer.put_vs_raw", _ratio(a, b), "×", 0.9, "higher"),
        Figure("transfer.put_mb_per_s", _median(a).mb_per_s, "MB/s", None, "higher"),
        Figure("transfer.put_raw_mb_per_s", _median(b).mb_per_s, "MB/s", None, "higher"),
        Figure("transfer.put_cpu_s_per_gb", _median(a).cpu_s_per_gb, "s/GB", None, "lower"),
    ]


def _get(
    store: ObjectStore, transfer: Transfer, raw: RawClient, kv: np.ndarray, extents: int, rounds: int
) -> list[Figure]:
    engine, chunks, prefixes = Engine(LLAMA_8B, 16), list[ChunkRef](), list[str]()
    for i in range(extents):
        stored = upload(transfer, kv, EXTENT_CHUNKS, seed=i)
        prefixes.append(publish(store, LLAMA_8B, transfer.codec, stored))
        chunks += stored
    n_bytes = len(chunks) * LLAMA_8B.chunk_bytes
    keys = [shard_key(SPACE_ID, stored.extent.name, Grid(), 0) for stored in chunks[::EXTENT_CHUNKS]]

    def ours() -> Spent:
        with Meter() as meter:
            report = transfer.load(chunks, engine.sink, deadline_s=300).result()
        if report.loaded_chunks != len(chunks):
            raise Bug(f"loaded {report.loaded_chunks} of {len(chunks)} chunks: {report.failed[:1]}")
        return meter.spent(n_bytes)

    def theirs(how: tuple[int, int]) -> Spent:
        size, at_once = how
        whole = EXTENT_CHUNKS * LLAMA_8B.chunk_bytes
        return raw.get([Range(key, i, min(i + size, whole)) for key in keys for i in range(0, whole, size)], at_once)

    best = max(_RAW, key=lambda how: theirs(how).mb_per_s)
    ours()
    _check(engine, kv, len(chunks))
    a, b = _in_turn([ours, lambda: theirs(best)], rounds)
    zarr = raw.zarr(prefixes[: max(1, extents // 4)], 4)
    return [
        Figure("transfer.get_vs_raw", _ratio(a, b), "×", 0.9, "higher"),
        Figure("transfer.get_mb_per_s", _median(a).mb_per_s, "MB/s", None, "higher"),
        Figure("transfer.get_raw_mb_per_s", _median(b).mb_per_s, "MB/s", None, "higher"),
        Figure("transfer.get_cpu_s_per_gb", _median(a).cpu_s_per_gb, "s/GB", 0.8, "lower"),
        Figure("transfer.get_raw_cpu_s_per_gb", _median(b).cpu_s_per_gb, "s/GB", None, "lower"),
        Figure("transfer.get_vs_s3fs_zarr", _median(a).mb_per_s / zarr.mb_per_s, "×", 3.0, "higher"),
        Figure("transfer.get_s3fs_zarr_mb_per_s", zarr.mb_per_s, "MB/s", None, "higher"),
    ]


def _check(engine: Engine, kv: np.ndarray, chunks: int) -> None:
    """What lies in the engine's blocks is what was stored."""
    n, held = LLAMA_8B.chunk_tokens, kv.shape[2] // LLAMA_8B.chunk_tokens
    out = np.empty((*kv.shape[:2], n, *kv.shape[3:]), kv.dtype)
    for chunk in (chunks - 2, chunks - 1):
        engine.read(chunk, out)
        i = chunk % EXTENT_CHUNKS % held
        if not np.array_equal(out, kv[:, :, i * n : (i + 1) * n]):
            raise Bug("what was loaded is not what was stored")


def _side_by_side(calls: list[Callable[[], list[ChunkRef]]]) -> list[list[ChunkRef]]:
    """Two at a time: as many extents as half the staging memory holds."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def _in_turn(actions: list[Callable[[], Spent]], rounds: int) -> list[list[Spent]]:
    taken: list[list[Spent]] = [[] for _ in actions]
    for i in range(rounds):
        order = range(len(actions)) if i % 2 else reversed(range(len(actions)))
        for at in order:
            taken[at].append(actions[at]())
    return taken


def _ratio(ours: list[Spent], theirs: list[Spent]) -> float:
    """Median over the rounds of our speed ÷ theirs of the same round."""
    return statistics.median(a.mb_per_s / b.mb_per_s for a, b in zip(ours, theirs, strict=True))


def _median(spent: list[Spent]) -> Spent:
    return sorted(spent, key=lambda one: one.seconds)[len(spent) // 2]
