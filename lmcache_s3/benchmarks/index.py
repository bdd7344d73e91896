"""`lmcache-s3 bench index`: what the central index costs its reader at ten million chunks.

A checkpoint of 10 M entries (extents of 64 chunks, one shard) is put on a real S3 server; a fresh process opens it and
looks prompts up in it: how many of their chunks are known (what a scheduler asks for each request), and, apart, with a
`ChunkRef` made of each (what it asks for those that it loads). Beside each figure its raw counterpart from the same
run: hashlib over the same bytes, the bare GETs of the same segments, one request a chunk instead of a look-up. Then
versions of 100 extents each, bytes as they come from the store, are read, decoded and applied as fast as they go, while
another thread looks up.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import random
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from lmcache_s3.benchmarks.figures import Figure, report
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.identity import prefix_hashes
from lmcache_s3.index.courtesy import be_courteous
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import (
    Delta,
    State,
    apply,
    checkpoint_key,
    encode_delta,
    log_key,
    segments_prefix,
    state_on,
)
from lmcache_s3.index.replica import Replica
from lmcache_s3.index.segments import encode_checkpoint
from lmcache_s3.index.service import Index, IndexSettings
from lmcache_s3.index.space_file import ensure_space
from lmcache_s3.index.table import Batch, Table
from lmcache_s3.testing.servers import CephRGW, S3Server, SeaweedFS
from lmcache_s3.testing.small import fresh_memory_url, small_space
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.tiers.stores.options import StoreOptions
from lmcache_s3.types import ExtentName, ExtentRecord, Grid

ENTRIES = 10_000_000
CHUNKS = 64
"""Of an extent."""
PROMPT_TOKENS, CHUNK_TOKENS = 131_072, 256
_LOOKUPS = 500
_OPENS = 5
_VERSIONS, _EXTENTS_A_VERSION = 240, 100
SPACE = small_space()
_WRITER = "01JDXB4Z5T8V6Q2W3E4R5T6Y7H"


def main(json_path: Path | None = None, *, entries: int = ENTRIES, versions: int = _VERSIONS) -> bool:
    """Run it, print the table, write the JSON; whether every goal was met. About a minute and 3 GiB of memory."""
    steps = Steps()
    with ExitStack() as stack:
        figures = _hashing()
        server: S3Server = stack.enter_context(SeaweedFS() if CephRGW.missing() else CephRGW())
        url = server.make_bucket("lmcache-bench") + "/index"
        os.environ.update(server.env())
        with steps(f"putting a checkpoint of {entries:,} entries on {type(server).__name__} (loopback)"):
            samples, stored_bytes = _fill(url, server.endpoint_url, entries)
        with steps(f"opening it in {_OPENS} fresh processes"):
            opened = [_in_a_fresh_process(url, server.endpoint_url, samples) for _ in range(_OPENS)]
        figures += _opened(opened, stored_bytes / entries)
    with steps("applying versions while look-ups go on"):
        figures += _applying(versions)
    return report(figures, json_path)


# ---- hashing ---------------------------------------------------------------------------------------------------------


def _hashing() -> list[Figure]:
    tokens = np.random.default_rng(0).integers(0, 150_000, PROMPT_TOKENS, dtype=np.uint32)
    parts = [tokens[i : i + CHUNK_TOKENS].tobytes() for i in range(0, PROMPT_TOKENS, CHUNK_TOKENS)]

    def plain() -> None:
        parent = bytes(32)
        for part in parts:
            parent = hashlib.sha256(parent + part).digest()

    ours = _median_s(lambda: prefix_hashes("5" * 64, tokens, CHUNK_TOKENS), 51)
    bare = _median_s(plain, 51)
    return [
        Figure("index.hash_128k_tokens_ms", 1e3 * ours, "ms", 1.5, "lower"),
        Figure("index.hash_128k_tokens_hashlib_ms", 1e3 * bare, "ms", None, "lower"),
    ]


def _median_s(action: Callable[[], object], times: int) -> float:
    action()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


# ---- ten million entries ---------------------------------------------------------------------------------------------


def large_state(entries: int, seed: int = 0) -> State:
    """A state of so many entries in extents of 64 chunks, twenty extents a version; hashes and checksums are random."""
    rng, n = np.random.default_rng(seed), entries // CHUNKS
    rows, i = n * CHUNKS, np.arange(n)
    batch = Batch(
        hashes=_random_pairs(rng, rows),
        lengths=rng.integers(60_000, 64_096, rows, dtype=np.uint32),
        sums=rng.integers(0, 2**63, rows, dtype=np.uint64),
        owners={
            "nonces": _random_pairs(rng, n),
            "parents": _random_pairs(rng, n),
            "counts": np.full(n, CHUNKS),
            "stages": np.ones(n, np.uint32),
            "head_groups": np.ones(n, np.uint32),
            "first_token": (i % 2) * CHUNKS * CHUNK_TOKENS,
            "born": i // 20,
            "raw_bytes": np.full(n, CHUNKS * 100_000),
            "created": i // 20 + 1,
            "place": (i % 20).astype(np.uint32),
        },
        codecs=(["cachegen"], np.zeros(n, np.int64)),
    )
    table = Table(rows, rows, n)
    table.append(batch)
    return state_on(table, n // 20 + 1, 0, None, np.empty(0, np.int64), n, rows)


def _random_pairs(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 2**64, (n, 2), dtype=np.uint64)


def _store(url: str, endpoint_url: str) -> ObjectStore:
    return open_store(url, options=StoreOptions(endpoint_url=endpoint_url))


def _fill(url: str, endpoint_url: str, entries: int) -> tuple[list[list[bytes]], int]:
    """Put the space and a checkpoint; (prompts of 512 chunks that it holds, bytes of its entries)."""
    store, nonce = _store(url, endpoint_url), secrets.token_hex(16)
    ensure_space(store, SPACE)
    state = large_state(entries)
    files, index = encode_checkpoint(state, nonce, _WRITER)
    prefix = segments_prefix(SPACE.id, state.version, nonce)
    for file, data in files.items():
        store.put(prefix + file, data)
    store.put(checkpoint_key(SPACE.id, state.version, nonce), index)
    store.close()
    rng, hashes = random.Random(0), state.arrays.rows.hashes
    firsts = [rng.randrange(state.rows - 512) for _ in range(_LOOKUPS)]
    prompts = [[hashes[row].tobytes() for row in range(first, first + 512)] for first in firsts]
    return prompts, sum(len(data) for file, data in files.items() if ".entries." in file)


@dataclass(frozen=True)
class _Opened:
    """What a fresh process measured."""

    open_s: float
    raw_get_s: float
    table_bytes_per_entry: float
    extents_bytes_per_extent: float
    resident_bytes_per_entry: float
    lookup_64_s: float
    lookup_512_s: float
    with_chunks_64_s: float
    with_chunks_512_s: float
    requests: int
    ask_64_s: float


def _in_a_fresh_process(url: str, endpoint_url: str, prompts: list[list[bytes]]) -> _Opened:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, url, endpoint_url, prompts))
    process.start()
    theirs.close()
    try:
        result: _Opened = ours.recv()
        return result
    finally:
        process.join()


def _child(answer: Connection, url: str, endpoint_url: str, prompts: list[list[bytes]]) -> None:
    _warm()
    store = CountingStore(_store(url, endpoint_url))
    settings = IndexSettings(read_only=True)
    gc.collect()
    resident = _resident_bytes()
    start = time.perf_counter()
    index = Index.open(store, SPACE, settings=settings, background=False)
    open_s = time.perf_counter() - start
    resident = _resident_bytes() - resident
    state = index.state
    store.reset()

    def median_s(look: Callable[[list[bytes]], object], n: int) -> float:
        return statistics.median([_timed(partial(look, prompt[:n])) for prompt in prompts])

    lookups = {n: median_s(lambda hashes: len(index.match(hashes)), n) for n in (512, 64)}
    with_chunks = {n: median_s(lambda hashes: list(index.match(hashes)), n) for n in (512, 64)}
    assert all(len(index.match(prompt)) == len(prompt) for prompt in prompts)
    requests = sum(store.counts.values())
    owners = sum(getattr(state.arrays.owners, name)[: state.owners].nbytes for name in state.arrays.owners.__slots__)
    owners += state.arrays.names.nbytes
    answer.send(
        _Opened(
            open_s=open_s,
            raw_get_s=_raw_gets_s(store, settings.read_ahead),
            table_bytes_per_entry=(state.table.nbytes() - owners) / state.rows,
            extents_bytes_per_extent=owners / state.owners,
            resident_bytes_per_entry=resident / state.rows,
            lookup_64_s=lookups[64],
            lookup_512_s=lookups[512],
            with_chunks_64_s=with_chunks[64],
            with_chunks_512_s=with_chunks[512],
            requests=requests,
            ask_64_s=_timed(lambda: [_ask(store, prompt_hash) for prompt_hash in prompts[0][:64]]),
        )
    )
    index.close()
    store.close()


def _warm() -> None:
    """Kernels are compiled once a machine and then kept; what is measured is opening, not compiling."""
    store = open_store(fresh_memory_url())
    state = large_state(20 * CHUNKS, seed=1)
    nonce = "0" * 32
    files, index = encode_checkpoint(state, nonce, _WRITER)
    for file, data in files.items():
        store.put(segments_prefix(SPACE.id, state.version, nonce) + file, data)
    store.put(checkpoint_key(SPACE.id, state.version, nonce), index)
    Index.open(store, SPACE, settings=IndexSettings(single_writer=True), background=False).close()


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _raw_gets_s(store: ObjectStore, readers: int) -> float:
    """The bare GETs of all segments, as many at once as the index makes."""
    prefix = f"spaces/{SPACE.id}/segments/"
    keys = [info.key for info in store.list(prefix)]
    with ThreadPoolExecutor(readers) as pool:
        return _timed(lambda: [None for _ in pool.map(lambda key: len(store.get(key)), keys)])


def _ask(store: ObjectStore, prefix_hash: bytes) -> bool:
    """What a cache without an index asks of the store for each chunk: is it there?"""
    return bool(list(store.list(f"spaces/{SPACE.id}/extents/{prefix_hash.hex()}", limit=1)))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _opened(runs: Sequence[_Opened], stored_bytes_per_entry: float) -> list[Figure]:
    def median(name: str) -> float:
        return statistics.median([float(getattr(run, name)) for run in runs])

    return [
        Figure("index.lookup_64_ms", 1e3 * median("lookup_64_s"), "ms", 0.05, "lower"),
        Figure("index.lookup_64_with_chunks_ms", 1e3 * median("with_chunks_64_s"), "ms", None, "lower"),
        Figure("index.lookup_requests", median("requests"), "requests", 0, "lower"),
        Figure("index.lookup_64_by_requests_ms", 1e3 * median("ask_64_s"), "ms", None, "lower"),
        Figure("index.lookup_512_of_10m_ms", 1e3 * median("lookup_512_s"), "ms", 0.2, "lower"),
        Figure("index.lookup_512_with_chunks_ms", 1e3 * median("with_chunks_512_s"), "ms", None, "lower"),
        Figure("index.cold_open_10m_s", median("open_s"), "s", 1.0, "lower"),
        Figure("index.cold_open_raw_gets_s", median("raw_get_s"), "s", None, "lower"),
        Figure("index.memory_bytes_per_entry", median("table_bytes_per_entry"), "bytes", 48, "lower"),
        Figure("index.memory_bytes_per_extent", median("extents_bytes_per_extent"), "bytes", None, "lower"),
        Figure("index.resident_bytes_per_entry", median("resident_bytes_per_entry"), "bytes", None, "lower"),
        Figure("index.stored_bytes_per_entry", stored_bytes_per_entry, "bytes", 34, "lower"),
    ]


# ---- applying --------------------------------------------------------------------------------------------------------


def _applying(versions: int) -> list[Figure]:
    """A replica of a million entries catches up with a long log, while another thread looks up 64 chunks at a time."""
    store = open_store(fresh_memory_url())
    rng = random.Random(0)
    for version in range(1, versions + 1):
        records = tuple(_record(rng, version) for _ in range(_EXTENTS_A_VERSION))
        store.put(log_key(SPACE.id, version), encode_delta(Delta(_WRITER, add=records)))
    replica, base = Replica(), large_state(1_000_000)
    known = [base.arrays.rows.hashes[row].tobytes() for row in range(64)]
    # The same extents as version 0, so that the log goes on from there.
    replica.publish(state_on(base.table, 0, 0, None, np.empty(0, np.int64), base.n_extents, base.n_chunks))
    log = Log(store, SPACE.id, _WRITER, time.sleep, random.Random(0), lambda: secrets.token_hex(16), replica=replica)
    apply(replica.state, Delta(_WRITER, add=(_record(rng, 1),)))  # compiles; that state is thrown away
    taken: list[float] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            taken.append(_timed(lambda: list(replica.match(known))))
            time.sleep(0.0005)

    thread = threading.Thread(target=look)
    thread.start()
    start = time.perf_counter()
    sync = threading.Thread(target=_sync, args=(log,))
    sync.start()
    sync.join()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    applied = versions * _EXTENTS_A_VERSION * CHUNKS
    assert replica.state.version == versions
    assert replica.state.n_chunks == base.n_chunks + applied
    return [
        Figure("index.apply_entries_per_s", applied / seconds, "entries/s", 1e6, "higher"),
        Figure("index.lookup_under_apply_p99_ms", 1e3 * float(np.quantile(taken, 0.99)), "ms", 0.5, "lower"),
        Figure("index.lookup_under_apply_median_ms", 1e3 * statistics.median(taken), "ms", None, "lower"),
    ]


def _sync(log: Log) -> None:
    """As the index's own thread does it."""
    be_courteous()
    log.sync()


def _record(rng: random.Random, version: int) -> ExtentRecord:
    hashes = rng.randbytes(16 * CHUNKS)
    name = ExtentName(hashes[-16:], CHUNKS, "cachegen", version - 1, rng.randbytes(16).hex())
    lengths = np.array([60_000 + rng.randrange(4096) for _ in range(CHUNKS)], np.uint32).tobytes()
    return ExtentRecord(
        name, Grid(), rng.randbytes(16), 0, hashes, lengths, rng.randbytes(8 * CHUNKS), CHUNKS * 100_000
    )
