"""`lmcache-s3 bench soak`: half an hour of mixed stores and loads through every tier, every byte checked.

Chats grow turn by turn: a thread looks one up, loads what is known, compares every byte with what must have been
stored, and stores the next turn. Meanwhile others sample what the tiers hold, what the disk tier really takes, and this
process's memory, and collect garbage in the bucket. KV is made from (chat, chunk), so nothing is kept to compare with.

Figures: soak.wrong_bytes and soak.over_budget_bytes must be 0; soak.rss_slope is fitted to the last third, when chats,
and so what the threads here hold of them, are as long as they get. Raises what opening a cache raises.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lmcache_s3.analysis.catalog import tending
from lmcache_s3.benchmarks.figures import Figure, report
from lmcache_s3.cache import Cache
from lmcache_s3.config import load_settings
from lmcache_s3.errors import Unavailable
from lmcache_s3.identity import KVGroup, Space
from lmcache_s3.index.gc import Collector, GcSettings
from lmcache_s3.testing.servers import SeaweedFS
from lmcache_s3.tiers.disk import DiskTier
from lmcache_s3.tiers.stores.open import open_store

HOST_BYTES, DISK_BYTES = 512 << 20, 2 << 30
BUCKET_BYTES = 4 << 30
_CHATS, _MOST_CHUNKS = 160, 16
_THREADS = 4
_STORED_BYTES_PER_S = 8 << 20
"""New KV a second, all threads together: what is collected in the bucket must keep up."""
_MIB = 1 << 20
_M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h."""


def soak_space() -> Space:
    """A small model: 16 KiB a token, 4 MiB a chunk."""
    return Space("50" * 32, "bfloat16", (KVGroup("full", 16, 2, 4, 64),), {}, 256)


@dataclass
class Tally:
    """What the threads saw. Their lock guards it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    checked_bytes: int = 0
    wrong_bytes: int = 0
    stored_bytes: int = 0
    loads: int = 0
    short_loads: int = 0
    over_budget_bytes: Counter[str] = field(default_factory=Counter)
    """Of each budget, the most by which it was exceeded."""
    tier_bytes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    rss: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, MiB)."""


def chunk_kv(space: Space, chat: int, chunk: int) -> np.ndarray:
    """KV of one chunk of a chat: any bits, always the same. `[kv, layer, token, head, channel]`, storage dtype."""
    geometry = space.geometry
    words = np.random.Generator(np.random.Philox(key=[chat, chunk])).integers(
        0, 1 << 64, geometry.chunk_bytes // 8, np.uint64
    )
    return words.view(geometry.storage_dtype).reshape(geometry.chunk_shape)


def chat_tokens(space: Space, chat: int, n_chunks: int) -> np.ndarray:
    tokens = np.random.Generator(np.random.Philox(key=[chat, 1 << 32])).integers(
        0, 50_000, _MOST_CHUNKS * space.chunk_tokens
    )
    return tokens[: n_chunks * space.chunk_tokens]


class Soak:
    """The threads of one soak; `cache` is what is tested."""

    def __init__(self, cache: Cache, tally: Tally) -> None:
        self._cache, self._tally = cache, tally
        self._stop = threading.Event()
        self._turns = Counter[int]()
        self._begin = self._next_store_s = time.monotonic()

    def run(self, seconds: float) -> None:
        """Raises what a thread raised."""
        with ThreadPoolExecutor(_THREADS + 2, "soak") as pool:
            running = [pool.submit(self._talk, seed) for seed in range(_THREADS)]
            running += [pool.submit(self._watch), pool.submit(self._collect)]
            end = time.monotonic() + seconds
            while time.monotonic() < end and not any(one.done() for one in running):
                time.sleep(0.5)
            self._stop.set()
            for one in running:
                one.result()

    def _talk(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not self._stop.is_set():
            chat = min(int(rng.zipf(1.2)) - 1, _CHATS - 1) if rng.random() < 0.5 else int(rng.integers(_CHATS))
            known, turn = self._next_turn(chat, int(rng.integers(0, 4)))
            self._load(chat, known)
            if turn > known:
                self._store(chat, turn)
            elif rng.random() < 0.01:
                with self._tally.lock:
                    self._turns[chat] = 0  # what was collected in the bucket is stored anew
            self._stop.wait(0.02)

    def _next_turn(self, chat: int, new_chunks: int) -> tuple[int, int]:
        """(chunks that the chat has, chunks it will have); no new ones while enough was stored lately."""
        now = time.monotonic()
        with self._tally.lock:
            known = self._turns[chat]
            turn = min(_MOST_CHUNKS, known + new_chunks) if now >= self._next_store_s else known
            self._turns[chat] = turn
            new_bytes = (turn - known) * self._cache.space.geometry.chunk_bytes
            if new_bytes:
                self._next_store_s = now + new_bytes / _STORED_BYTES_PER_S
            return known, turn

    def _load(self, chat: int, n_chunks: int) -> None:
        if not n_chunks:
            return
        space = self._cache.space
        match = self._cache.lookup(chat_tokens(space, chat, n_chunks))
        with self._cache.pin(match):
            got = self._cache.retrieve(match).result()
        wrong = 0
        for chunk in range(got.tokens // space.chunk_tokens):
            part = got.array[:, :, chunk * space.chunk_tokens : (chunk + 1) * space.chunk_tokens]
            different = part != chunk_kv(space, chat, chunk)
            wrong += int(np.count_nonzero(different)) * part.itemsize
        with self._tally.lock:
            self._tally.loads += 1
            self._tally.short_loads += got.tokens < match.tokens
            self._tally.checked_bytes += got.array.nbytes
            self._tally.wrong_bytes += wrong
            self._tally.tier_bytes.update(got.report.tier_bytes)

    def _store(self, chat: int, n_chunks: int) -> None:
        space = self._cache.space
        kv = np.concatenate([chunk_kv(space, chat, chunk) for chunk in range(n_chunks)], axis=2)
        handle = self._cache.store(chat_tokens(space, chat, n_chunks), kv)
        with self._tally.lock:
            self._tally.stored_bytes += handle.total_bytes
        handle.add_done_callback(lambda done: self._note(done.error()))

    def _note(self, error: BaseException | None) -> None:
        if error is not None:
            with self._tally.lock:
                self._tally.refused[getattr(error, "kind", "bug")] += 1

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            held = {name: (one.used_bytes, one.budget_bytes) for name, one in self._cache.stats().tiers.items()}
            budget = self._cache.transfer.budget
            held |= {"staging": (budget.peak_bytes, budget.total_bytes)}
            for tier in self._cache.transfer.stack.tiers:
                if isinstance(tier, DiskTier):
                    held["disk_blocks"] = (tier.blocks_bytes(), tier.budget_bytes)
            with self._tally.lock:
                for name, (n_bytes, most_bytes) in held.items():
                    if most_bytes is not None:
                        over = self._tally.over_budget_bytes
                        over[name] = max(over[name], n_bytes - most_bytes, 0)
                self._tally.rss.append((time.monotonic() - self._begin, rss_mib()))

    def _collect(self) -> None:
        settings = GcSettings(grace_s=30.0, history_s=120.0, max_bytes=BUCKET_BYTES)
        while not self._stop.wait(20.0):
            store = open_store(self._cache.settings.url, options=self._cache.settings.store_options())
            try:
                with ThreadPoolExecutor(4) as executor:
                    Collector(tending(store, self._cache.space, executor), settings, executor=executor).run()
            except Unavailable as e:
                self._note(e)
            finally:
                store.close()


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


def slope_per_hour(rss: list[tuple[float, float]]) -> float:
    """Least squares over the last third, MiB an hour; 0 for fewer than three samples there."""
    late = rss[len(rss) * 2 // 3 :]
    if len(late) < 3:
        return 0.0
    seconds, mib = np.array(late).T
    return float(np.polyfit(seconds, mib, 1)[0] * 3600)


def _give_memory_back() -> None:
    """glibc raises its threshold for mappings with each large array that is freed, and then keeps what the next ones
    leave in pieces: gigabytes within minutes, of this program's own arrays, in which a leak would not be seen."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MIB)


@contextmanager
def _bucket(url: str | None) -> Iterator[tuple[str, dict[str, str]]]:
    """(URL, settings) of the bucket: the given one, else one on a server of our own."""
    if url is not None:
        yield url, {}
        return
    with SeaweedFS() as server:
        before = dict(os.environ)
        os.environ |= server.env()
        try:
            yield f"{server.make_bucket('soak')}/soak", {"endpoint_url": server.endpoint_url}
        finally:
            os.environ.clear()
            os.environ |= before


def main(json_path: Path | None = None, *, minutes: float = 30.0, url: str | None = None) -> bool:
    """Run it; whether all goals are met. url: a bucket to use (its `soak` space is filled), else SeaweedFS here."""
    tally = Tally()
    _give_memory_back()
    with tempfile.TemporaryDirectory(prefix="lmcache-s3-soak-") as folder, _bucket(url) as (root, where):
        disk = Path(folder)
        settings = load_settings(
            url=root,
            host_bytes=HOST_BYTES,
            disk_bytes=DISK_BYTES,
            disk_path=disk,
            staging_bytes=256 << 20,
            write_behind_s=10.0,
            write_behind_bytes=128 << 20,
            extent_bytes=32 << 20,
            **where,
        )
        with Cache.open(root, soak_space(), settings) as cache:
            Soak(cache, tally).run(minutes * 60)
    return report(figures(tally), json_path)


def figures(tally: Tally) -> list[Figure]:
    gib = 1 << 30
    shown = [
        Figure("soak.checked", tally.checked_bytes / gib, "GiB", None, "higher"),
        Figure("soak.stored", tally.stored_bytes / gib, "GiB", None, "higher"),
        Figure("soak.loads", tally.loads, "loads", None, "higher"),
        Figure("soak.short_loads", tally.short_loads, "loads", None, "lower"),
        Figure("soak.refused_stores", sum(tally.refused.values()), "stores", None, "lower"),
        Figure("soak.wrong_bytes", tally.wrong_bytes, "bytes", 0, "lower"),
        Figure("soak.over_budget_bytes", max(tally.over_budget_bytes.values(), default=0), "bytes", 0, "lower"),
        Figure("soak.rss_last", tally.rss[-1][1] if tally.rss else 0.0, "MiB", None, "lower"),
        Figure("soak.rss_slope", slope_per_hour(tally.rss), "MiB/h", None, "lower"),
    ]
    for name, n_bytes in sorted(tally.over_budget_bytes.items()):
        shown.append(Figure(f"soak.over_budget_{name}", n_bytes, "bytes", None, "lower"))
    for name, n_bytes in sorted(tally.tier_bytes.items()):
        shown.append(Figure(f"soak.from_{name}", n_bytes / gib, "GiB", None, "higher"))
    return shown
