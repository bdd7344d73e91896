"""What the processes of `bench fleet` do: store as many writers, watch what others stored, and read everything back.

An extent's cells and prefix hashes are a function of (run, writer, number), so any process knows what to look for, and
what it must find. Times are of `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import gc
import hashlib
import random
import secrets
import struct
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from ulid import ULID

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.checksum import xxh3
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import LMCacheS3Error, Missing
from lmcache_s3.extent import array_metadata, build_shard
from lmcache_s3.identity import KVGroup, Space, root_hash
from lmcache_s3.index.gc import Collector, GcSettings
from lmcache_s3.index.log import Log, LogLimits
from lmcache_s3.index.service import Index, IndexSettings, Verdict
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.lean_store import LeanStore
from lmcache_s3.testing.shared_history import SharedHistory
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import StoreOptions, open_store
from lmcache_s3.types import HASH_BYTES, ExtentName, ExtentRecord, Grid, extent_prefix, shard_key

CHUNK_TOKENS = 16
SPACE = Space(
    weights="f1" * 32,
    kv_dtype="bfloat16",
    groups=(KVGroup("full", layers=1, kv=2, heads=1, head_dim=64),),
    rope={},
    chunk_tokens=CHUNK_TOKENS,
)
"""A chunk has 4 KiB of KV."""
GRID = Grid()
_CODEC = make_codec("fast")
_WATCH_S = 0.05
"""Pause of who looks what became visible: times are late by half of it on average."""
_LOOK_AHEAD = 4
"""Extents of a writer that are looked for at once."""


@dataclass(frozen=True, slots=True)
class Where:
    """How to reach the bucket. slow_s: added to every request. lean: by the client made for load, else by ours."""

    url: str
    endpoint_url: str
    slow_s: float = 0.0
    lean: bool = False

    def open(self) -> ObjectStore:
        options = StoreOptions(endpoint_url=self.endpoint_url, addressing_style="path", max_connections=48)
        store = LeanStore(self.url, self.endpoint_url) if self.lean else open_store(self.url, options=options)
        if self.slow_s:
            return FaultyStore(store, [Fault(mode="latency", latency_s=self.slow_s)])
        return store


@dataclass(frozen=True, slots=True)
class Load:
    """writers: numbers of this process's writers; watched: of others', whose extents are looked for here.

    chunks: of an extent; every_s: between a writer's extents; begin_s, end_s: of storing, monotonic. stall: share of
    extents whose commit waits `stall_s` after the upload. milestone: None for the format's.
    """

    run: str
    writers: tuple[int, ...]
    watched: tuple[int, ...]
    chunks: int
    every_s: float
    begin_s: float
    end_s: float
    settings: IndexSettings
    seed: int
    stall: float = 0.0
    stall_s: float = 0.0
    milestone: int | None = None


@dataclass(slots=True)
class Done:
    """asked_s, acknowledged_s, seen_s: by (writer, number): upload answered and commit asked; commit answered; hit by a
    look-up here. names: of what was acknowledged live. requests: of the index, by verb. behind_s: how late the last
    extent of the slowest writer was begun."""

    asked_s: dict[tuple[int, int], float] = field(default_factory=dict)
    acknowledged_s: dict[tuple[int, int], float] = field(default_factory=dict)
    seen_s: dict[tuple[int, int], float] = field(default_factory=dict)
    names: dict[tuple[int, int], str] = field(default_factory=dict)
    verdicts: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    behind_s: float = 0.0
    cpu_s: float = 0.0


def hashes_of(run: str, writer: int, number: int, chunks: int) -> bytes:
    """Prefix hashes of an extent, 16 bytes a chunk."""
    return hashlib.shake_128(f"{run} {writer} {number}".encode()).digest(HASH_BYTES * chunks)


def bits_of(run: str, writer: int, number: int, chunks: int) -> np.ndarray:
    """An extent's KV: [chunk, 2048] of any bits, a function of its name in the run."""
    seed = int.from_bytes(hashes_of(run, writer, number, 1)[:8], "little")
    n = SPACE.geometry.chunk_bytes // 2
    return np.frombuffer(np.random.default_rng(seed).bytes(2 * n * chunks), np.uint16).reshape(chunks, n)


def cells_of(run: str, writer: int, number: int, chunks: int) -> list[bytes]:
    """The stored cells."""
    geometry = SPACE.geometry
    spec, shape = CellSpec.of(geometry, GRID), geometry.cell_shape(GRID)
    hashes = hashes_of(run, writer, number, chunks)
    return [
        _CODEC.encode(
            one.reshape(shape),
            spec,
            CellPosition(hashes[HASH_BYTES * i : HASH_BYTES * (i + 1)], i * CHUNK_TOKENS, 0, 0),
        )
        for i, one in enumerate(bits_of(run, writer, number, chunks))
    ]


def upload(store: ObjectStore, born: int, run: str, writer: int, number: int, chunks: int) -> ExtentRecord:
    """Put an extent's objects as the cache does: the shard, then zarr.json. Returns what the index should say."""
    cells, hashes = cells_of(run, writer, number, chunks), hashes_of(run, writer, number, chunks)
    record = ExtentRecord(
        name=ExtentName.fresh(hashes[-HASH_BYTES:], chunks, "fast", born),
        grid=GRID,
        parent=root_hash(SPACE.id, "")[:HASH_BYTES],
        first_token=0,
        hashes=hashes,
        lengths=struct.pack(f"<{chunks}I", *map(len, cells)),
        sums=struct.pack(f"<{chunks}Q", *map(xxh3, cells)),
        raw_bytes=SPACE.geometry.chunk_bytes * chunks,
    )
    store.put(shard_key(SPACE.id, record.name, GRID, 0), build_shard(cells))
    document = array_metadata(
        record, SPACE.geometry, _CODEC, space_id=SPACE.id, fidelity=SPACE.fidelity, writer=f"w{writer}"
    )
    store.put(f"{extent_prefix(SPACE.id, record.name)}/zarr.json", document)
    return record


def work(where: Where, load: Load) -> Done:
    """One process: its writers store until the end and drain; meanwhile what others stored is looked for."""
    done, lock = Done(), threading.Lock()
    with ExitStack() as stack:
        # Each version is decoded once a process, not once a writer: 64 machines would have the cores for it.
        stack.enter_context(SharedHistory(time.monotonic).sharing())
        data, counting = where.open(), CountingStore(where.open())
        stack.callback(data.close)
        stack.callback(counting.close)
        limits = None if load.milestone is None else LogLimits(milestone=load.milestone)
        indexes = []
        for _ in load.writers:
            indexes.append(Index.open(counting, SPACE, settings=load.settings, limits=limits))
            stack.callback(indexes[-1].close)
        while time.monotonic() < load.begin_s:
            time.sleep(0.01)
        counting.reset()
        cpu_s = time.process_time()
        gc.collect()
        gc.freeze()  # what is there stays; and looking for cycles among 16 instances' objects is no instance's work
        gc.disable()
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(load, indexes, done, stop))
        watcher.start()
        writers = [
            threading.Thread(target=_write, args=(load, writer, data, index, done, lock))
            for writer, index in zip(load.writers, indexes, strict=True)
        ]
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join()
        time.sleep(max(0.0, load.end_s + 8.0 - time.monotonic()))  # others' last extents become visible
        stop.set()
        watcher.join()
        done.requests = Counter(counting.counts)
        done.cpu_s = time.process_time() - cpu_s
        for index in indexes:
            done.errors.update(index.stats().errors)
    return done


def _write(load: Load, writer: int, data: ObjectStore, index: Index, done: Done, lock: threading.Lock) -> None:
    rng = random.Random(f"{load.seed} {writer}")
    due_s, number = load.begin_s + rng.uniform(0.0, load.every_s), 0
    futures: list[Future[list[Verdict]]] = []
    while due_s < load.end_s:
        time.sleep(max(0.0, due_s - time.monotonic()))
        with lock:
            done.behind_s = max(done.behind_s, time.monotonic() - due_s)
        try:
            record = upload(data, index.version, load.run, writer, number, load.chunks)
        except LMCacheS3Error as e:
            with lock:
                done.errors[e.kind] += 1
        else:
            if load.stall and rng.random() < load.stall:
                time.sleep(load.stall_s)
                due_s += load.stall_s
            futures.append(_commit(index, record, (writer, number), done, lock))
        number += 1
        due_s += load.every_s
    for future in futures:
        future.exception(timeout=120)


def _commit(
    index: Index, record: ExtentRecord, key: tuple[int, int], done: Done, lock: threading.Lock
) -> Future[list[Verdict]]:
    with lock:
        done.asked_s[key] = time.monotonic()

    def answered(future: Future[list[Verdict]]) -> None:
        now_s, error = time.monotonic(), future.exception()
        with lock:
            if error is not None:
                done.errors[type(error).__name__] += 1
                return
            (verdict,) = future.result()
            done.verdicts[verdict.value] += 1
            done.acknowledged_s[key] = now_s
            if verdict is Verdict.LIVE:
                done.names[key] = str(record.name)

    future = index.commit([record])
    future.add_done_callback(answered)
    return future


def _watch(load: Load, indexes: list[Index], done: Done, stop: threading.Event) -> None:
    """Look in one index after another for the next extents of every watched writer: a hit is what an engine would get.
    Each writer is looked for in one index only: as if that engine wanted its chunks."""
    if not load.watched:
        return
    first = dict.fromkeys(load.watched, 0)
    """The first extent of a writer that was not hit yet."""
    seen: dict[int, set[int]] = {writer: set() for writer in load.watched}
    place = {writer: indexes[i % len(indexes)] for i, writer in enumerate(load.watched)}
    hashes: dict[tuple[int, int], bytes] = {}
    while not stop.wait(_WATCH_S):
        for writer in load.watched:
            for number in range(first[writer], first[writer] + _LOOK_AHEAD):
                if number in seen[writer]:
                    continue
                key = (writer, number)
                wanted = hashes.get(key)
                if wanted is None:
                    wanted = hashes[key] = hashes_of(load.run, writer, number, load.chunks)[-HASH_BYTES:]
                if place[writer].match([wanted]):
                    done.seen_s[key] = time.monotonic()
                    seen[writer].add(number)
                    del hashes[key]
            while first[writer] in seen[writer]:
                seen[writer].remove(first[writer])
                first[writer] += 1


def read_back(where: Where, run: str, chunks: int, wanted: dict[tuple[int, int], str], threads: int = 8) -> list[str]:
    """Another process: a cold open, then every cell of every extent wanted, by the index alone. What is wrong with
    which: nothing should be."""
    store = where.open()
    index = Index.open(store, SPACE, settings=IndexSettings(read_only=True), background=False)
    live = {str(extent.record.name): extent.record for extent in index.extents()}

    def look(item: tuple[tuple[int, int], str]) -> str | None:
        (writer, number), name = item
        record = live.get(name)
        if record is None:
            return f"writer {writer}, extent {number}: not in the index"
        if record.hashes != hashes_of(run, writer, number, chunks):
            return f"{name}: other prefix hashes"
        cells = record.cells(0)
        end = cells[-1].offset + cells[-1].length
        try:
            data = store.get(shard_key(SPACE.id, record.name, record.grid, 0), 0, end)
        except LMCacheS3Error as e:
            return f"{name}: {e}"
        for cell, true in zip(cells, cells_of(run, writer, number, chunks), strict=True):
            got = data[cell.offset : cell.offset + cell.length]
            if xxh3(got) != cell.checksum or got != true:
                return f"{name}: cell {cell.position} is not what was stored"
        return None

    try:
        with ThreadPoolExecutor(threads) as pool:
            return [wrong for wrong in pool.map(look, wanted.items()) if wrong is not None]
    finally:
        index.close()
        store.close()


# ---- collection at its most eager ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Collected:
    """What one collector did. deleted: objects of extents."""

    rounds: int = 0
    deleted: int = 0
    versions: int = 0
    errors: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Looked:
    """gone: live extents without their bytes, in words. looks: extents looked at."""

    gone: list[str] = field(default_factory=list)
    looks: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def collect(where: Where, grace_s: float, extents: int, milestone: int, end_s: float) -> Collected:
    """A process: round after round without a pause. extents: of four chunks, room for about so many."""
    out = Collected()
    room = extents * 4 * (SPACE.geometry.chunk_bytes + 4)
    settings = GcSettings(grace_s=grace_s, history_s=0.0, max_bytes=room)
    with ExitStack() as stack:
        store = where.open()
        stack.callback(store.close)
        executor = stack.enter_context(ThreadPoolExecutor(8))
        log = new_log(store, milestone)
        opened = False
        while time.monotonic() < end_s:
            try:
                if not opened:
                    log.open()
                    opened = True
                report = Collector(log, settings, executor=executor).run()
            except LMCacheS3Error as e:
                out.errors[e.kind] += 1
                continue
            out.rounds += 1
            out.deleted += report.objects["extent"]
            out.versions += report.objects["version"]
    return out


def look(where: Where, milestone: int, end_s: float) -> Looked:
    """A process: are the bytes of every live extent there? What is missing must be gone from the index by then."""
    out = Looked()
    store = where.open()
    log = new_log(store, milestone)
    opened = False
    while time.monotonic() < end_s + 10.0:  # and once more when all is at rest
        try:
            if not opened:
                log.open()
                opened = True
            look_once(store, log, out)
        except LMCacheS3Error as e:
            out.errors[e.kind] += 1
    store.close()
    return out


def look_once(store: ObjectStore, log: Log, out: Looked) -> None:
    """At every extent live now."""
    for extent in list(log.sync().in_order()):
        if not _exists(store, extent.record) and extent.record.name in log.sync().extents:
            out.gone.append(f"{extent.record.name} at version {log.state.version}")
        out.looks += 1


def _exists(store: ObjectStore, record: ExtentRecord) -> bool:
    try:
        store.get(f"{extent_prefix(SPACE.id, record.name)}/zarr.json", 0, 1)
        store.get(shard_key(SPACE.id, record.name, record.grid, 0), 0, 1)
    except Missing:
        return False
    return True


def new_log(store: ObjectStore, milestone: int) -> Log:
    return Log(
        store,
        SPACE.id,
        writer=str(ULID()),
        sleep=time.sleep,
        rng=random.Random(secrets.randbits(64)),
        nonce=lambda: secrets.token_hex(16),
        limits=LogLimits(milestone=milestone),
    )
