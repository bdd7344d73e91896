"""How loads take their time: steps that overlap on a slow link, and requests that hang.

The link is made up (`transfer_parts.LinkedStore`), the steps are real.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lmcache_s3.benchmarks.figures import Figure
from lmcache_s3.benchmarks.transfer_parts import (
    LLAMA_1B,
    LLAMA_8B,
    SPACE_ID,
    Engine,
    LinkedStore,
    LinkSpeed,
    made_up_kv,
    upload,
)
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Bug
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.small import fresh_memory_url
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.tiers.verify import verify
from lmcache_s3.transfer import Transfer, TransferSettings
from lmcache_s3.types import CellRef, ChunkRef, Geometry, Grid, shard_key

_SLOW = LinkSpeed(latency_s=0.01, bytes_per_s=200e6)
_FAST = LinkSpeed(latency_s=0.01, bytes_per_s=1.25e9)
_HANGS = Fault(mode="latency", verbs=frozenset({"get"}), key="/c/", probability=0.01, latency_s=2.0)


def overlap(*, extents: int, rounds: int) -> list[Figure]:
    """extents: of 4,096 tokens of an 8B model, codec `cachegen`."""
    kv, engine = made_up_kv(LLAMA_8B, 4), Engine(LLAMA_8B, 16)
    store = LinkedStore(open_store(fresh_memory_url()), _SLOW)
    transfer = _transfer(store, LLAMA_8B)
    try:
        chunks = [one for seed in range(extents) for one in upload(transfer, kv, 16, seed=seed)]
        cells = [chunk.cell(0) for chunk in chunks]
        data = [bytes(_read(store, cell)) for cell in cells[:16]]
        spec, codec = CellSpec.of(LLAMA_8B, Grid()), transfer.codec
        places = [CellPosition(chunk.prefix_hash, i * LLAMA_8B.chunk_tokens, 0, 0) for i, chunk in enumerate(chunks)]
        outs = [np.empty(spec.shape, np.uint16) for _ in range(transfer.cores)]
        pool = ThreadPoolExecutor(transfer.cores)

        def decode(first: int) -> None:
            for i in range(first, len(cells), len(outs)):
                codec.decode(data[i % 16], spec, places[i % 16], outs[first])

        def scatter(first: int) -> None:
            for i in range(first, len(cells), len(outs)):
                engine.sink(i, range(LLAMA_8B.layers), range(LLAMA_8B.heads), outs[first])

        def check(first: int) -> None:
            for i in range(first, len(cells), len(outs)):
                verify(cells[i % 16], data[i % 16])

        def each(step: Callable[[int], None]) -> Callable[[], object]:
            return lambda: list(pool.map(step, range(len(outs))))

        steps: dict[str, Callable[[], object]] = {
            "whole": lambda: _load(transfer, chunks, engine),
            "fetch": lambda: _fetch(store, cells),
            "verify": each(check),
            "decode": each(decode),
            "scatter": each(scatter),
        }
        all_taken: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds + 1):  # in turn: what disturbs the machine disturbs all; the first is for warming up
            for name, step in steps.items():
                all_taken[name].append(_seconds(step))
        taken = {name: min(seconds[1:]) for name, seconds in all_taken.items()}
        pool.shutdown()
    finally:
        transfer.close()
    whole = taken.pop("whole")
    return [
        Figure("transfer.overlap", whole / max(taken.values()), "×", 1.15, "lower"),
        Figure("transfer.overlap_vs_sum", whole / sum(taken.values()), "×", None, "lower"),
        *(Figure(f"transfer.{name}_alone_s", seconds, "s", None, "lower") for name, seconds in taken.items()),
    ]


def slow_tail(*, loads: int) -> list[Figure]:
    """The 99th percentile of so many loads of 4,096 tokens, with and without 1 % of requests that take 2 s."""
    kv, engine = made_up_kv(LLAMA_1B, 4), Engine(LLAMA_1B, 16)
    faulty = FaultyStore(LinkedStore(open_store(fresh_memory_url()), _FAST), seed=7)
    transfer = _transfer(faulty, LLAMA_1B)
    taken: dict[str, list[float]] = {"without": [], "with": []}
    try:
        chunks = upload(transfer, kv, 16)
        for _ in range(20):
            _load(transfer, chunks, engine)
        for _ in range(4):
            for name, faults in (("without", ()), ("with", (_HANGS,))):
                faulty.faults = faults
                taken[name] += [_seconds(lambda: _load(transfer, chunks, engine)) for _ in range(loads // 4)]
        requests, hedged = transfer.metrics.count("load_requests"), transfer.metrics.count("hedged_requests")
        hung = faulty.fired["latency"]
    finally:
        transfer.close()
    p99 = {name: float(np.quantile(seconds, 0.99)) for name, seconds in taken.items()}
    return [
        Figure("transfer.slow_tail_p99_ratio", p99["with"] / p99["without"], "×", 1.5, "lower"),
        Figure("transfer.slow_tail_p99_ms", 1e3 * p99["with"], "ms", None, "lower"),
        Figure("transfer.load_p99_ms", 1e3 * p99["without"], "ms", None, "lower"),
        Figure("transfer.load_median_ms", 1e3 * statistics.median(taken["without"]), "ms", None, "lower"),
        Figure("transfer.hung_requests", hung, "requests", None, "lower"),
        Figure("transfer.second_requests_share", hedged / requests, "×", 0.06, "lower"),
    ]


def _transfer(store: ObjectStore, geometry: Geometry) -> Transfer:
    return Transfer(store, SPACE_ID, geometry, make_codec("cachegen"), [], settings=TransferSettings())


def _load(transfer: Transfer, chunks: list[ChunkRef], engine: Engine) -> None:
    report = transfer.load(chunks, engine.sink, deadline_s=120).result()
    if report.loaded_chunks != len(chunks):
        raise Bug(f"loaded {report.loaded_chunks} of {len(chunks)} chunks: {report.failed[:1]}")


def _fetch(store: ObjectStore, cells: Iterable[CellRef]) -> None:
    """All cells, two at a time in one request, four requests at once."""
    pairs = list(zip(*[iter(cells)] * 2, strict=True))

    def one(pair: tuple[CellRef, ...]) -> None:
        first, last = pair[0], pair[-1]
        into = memoryview(bytearray(last.offset + last.length - first.offset))
        store.get_into(shard_key(SPACE_ID, first.extent, first.grid, first.shard), first.offset, into)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, pairs))


def _read(store: ObjectStore, cell: CellRef) -> bytearray:
    into = bytearray(cell.length)
    store.get_into(shard_key(SPACE_ID, cell.extent, cell.grid, cell.shard), cell.offset, memoryview(into))
    return into


def _seconds(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s
