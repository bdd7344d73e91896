"""The data path of one process: tiers, codec, threads and one memory budget. No index: callers bring `ChunkRef`s.

Loads and stores have threads of their own, so that neither waits for the other's I/O; cells fetched from a slow tier
are kept in the faster ones by a background thread, passed over when it falls behind. Bytes in flight stay within
`staging_bytes`: loads wait for room within their deadline, uploads are refused, promotions are skipped.
Raises `Invalid` (arguments, settings); everything else ends up in a `LoadReport` or in the handle of an upload.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcache_s3.budget import ByteBudget
from lmcache_s3.calibration_store import attached
from lmcache_s3.codecs.base import CellSpec, KVCodec
from lmcache_s3.errors import Invalid, LMCacheS3Error, Unavailable
from lmcache_s3.extent import shard_index
from lmcache_s3.handle import Deadlines, Handle, Work
from lmcache_s3.loading import Codecs, Load, LoadReport, Sink, make_plan
from lmcache_s3.metrics import Metrics
from lmcache_s3.rested_upload import RestedUpload
from lmcache_s3.resting import RestingTier
from lmcache_s3.tier_stack import TierStack
from lmcache_s3.tiers.base import Tier, TierStats
from lmcache_s3.tiers.object import ObjectTier
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import Buffer, CellRef, ChunkRef, ExtentName, Geometry, Grid
from lmcache_s3.uploading import ShardJob, StoredShard, Upload

PROMOTE_SHARE = 0.5
"""Promotions use at most this part of the budget: a slow disk must not hold up loads."""

WAITING_SHARE = 0.25
"""Promotions wait for the end of their load, but hold at most this part of the budget meanwhile; more go on at once.
What is left is enough for any piece, so no load waits for promotions that wait for it."""

KEEP_SHARE = 0.25
"""Memory for reads that is kept, beside the budget, for the next ones."""

STORE_SHARE = 0.75
"""Uploads use at most this part."""


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """staging_bytes: bytes in flight at most, encoded and decoded, loads and stores together. io_threads: requests at
    once for loads (half as many for stores). piece_bytes: stored bytes of one GET at most (one cell at least).
    load_deadline_s, store_deadline_s: where a call states none."""

    staging_bytes: int = 512 << 20
    io_threads: int = 8
    piece_bytes: int = 16 << 20
    load_deadline_s: float = 30.0
    store_deadline_s: float = 60.0


def check_staging(staging_bytes: int, geometry: Geometry, codec: KVCodec) -> None:
    """Raises `Invalid` if the budget does not hold one chunk on its way."""
    least = codec.max_encoded_bytes(CellSpec.of(geometry, Grid())) + geometry.chunk_bytes
    if staging_bytes * STORE_SHARE < least:
        raise Invalid(
            f"staging_bytes={staging_bytes} does not hold a chunk of this model: give at least "
            f"{int(least / STORE_SHARE) + 1}",
            kind="setting",
            key="staging_bytes",
        )


class _Promotions:
    """The promotions of one load: held back until it has ended, so that they do not compete with it. Thread-safe.

    start: runs a call in the background, False if there is none any more. room: for what waits, of all loads.
    """

    def __init__(self, start: Callable[[Callable[[], None]], bool], room: ByteBudget) -> None:
        self._start, self._room = start, room
        self._lock = threading.Lock()
        self._waiting: list[tuple[Callable[[], None], int]] | None = []

    def add(self, keep: Callable[[], None], n_bytes: int) -> bool:
        """Run `keep` in the background, later if there is room to wait; False if it will not be run any more."""
        with self._lock:
            if self._waiting is not None and self._room.try_take(n_bytes):
                self._waiting.append((keep, n_bytes))
                return True
        return self._start(keep)

    def begin(self) -> None:
        """The load has ended."""
        with self._lock:
            waiting, self._waiting = self._waiting or [], None
        for keep, n_bytes in waiting:
            self._room.give_back(n_bytes)
            self._start(keep)


class Transfer:
    """Moves cells between callers, tiers and the bucket. Thread-safe; nothing here blocks its caller on I/O.

    tiers: fast → slow, without the object tier; closed with the transfer. The store stays its opener's.
    on_thread_start: called by each of its threads first. resting: where cells rest before they are uploaded; None:
    nothing may rest.
    """

    def __init__(
        self,
        store: ObjectStore,
        space_id: str,
        geometry: Geometry,
        codec: KVCodec,
        tiers: Sequence[Tier],
        *,
        settings: TransferSettings = TransferSettings(),
        metrics: Metrics | None = None,
        on_thread_start: Callable[[], None] | None = None,
        resting: RestingTier | None = None,
    ) -> None:
        self.geometry = geometry
        self.codec = codec
        self.settings = settings
        self.metrics = metrics or Metrics()
        self.budget = ByteBudget(settings.staging_bytes)
        self._waiting = ByteBudget(max(1, int(settings.staging_bytes * WAITING_SHARE)))
        keep_bytes = int(settings.staging_bytes * KEEP_SHARE)
        self._resting = resting
        in_front = tiers if resting is None else (resting, *tiers)
        self.stack = TierStack(in_front, ObjectTier(store, space_id, shard_index, keep_buffers_bytes=keep_bytes))
        self._codecs = Codecs(codec)
        self._calibrations = attached(store)
        check_staging(settings.staging_bytes, geometry, codec)
        # Several pieces must fit at once, or nothing overlaps.
        self._piece_bytes = min(settings.piece_bytes, settings.staging_bytes // 4)
        self._deadlines = Deadlines()
        n = settings.io_threads
        pools = (("load", n), ("store", max(2, n // 2)), ("promote", 1))
        self._loads, self._stores, self._background = (
            ThreadPoolExecutor(threads, f"lmcache-s3-{name}", on_thread_start) for name, threads in pools
        )
        self._changed = threading.Condition()
        self._running: set[Work[Any]] = set()
        self._steps = 0
        self._closed = False
        self._calibrations.__enter__()

    # --- loads

    def load(
        self,
        chunks: Sequence[ChunkRef],
        sink: Sink,
        *,
        layers: range | None = None,
        heads: range | None = None,
        deadline_s: float | None = None,
    ) -> Handle[LoadReport]:
        """Fetch, verify, decode and hand over chunks; `layers`, `heads`: of the model, all where None.

        The handle's result is always a report, unless it was cancelled or the sink raised. Raises `Invalid`.
        """
        want_layers = range(self.geometry.layers) if layers is None else layers
        want_heads = range(self.geometry.heads) if heads is None else heads
        self.metrics.add("loads")
        promotions = _Promotions(lambda keep: self._step(self._background, keep), self._waiting)

        def fetched(cells: Sequence[CellRef], data: Sequence[Buffer], level: int) -> None:
            self._promote(promotions, cells, data, level)

        handle = self._start_load(chunks, sink, want_layers, want_heads, deadline_s, fetched)
        handle.add_done_callback(lambda _: promotions.begin())
        return handle

    def prefetch(
        self,
        chunks: Sequence[ChunkRef],
        tier: str = "host",
        *,
        layers: range | None = None,
        heads: range | None = None,
        deadline_s: float | None = None,
    ) -> Handle[LoadReport]:
        """Bring chunks into a tier (and those between it and where they are); done when they are there.

        `layers`, `heads`: as for `load`; cells that hold any of them are brought.

        Raises `Invalid` if there is no such tier.
        """
        target = self.stack.level(tier)
        if target is None or target == len(self.stack.tiers):
            names = ", ".join(one.name for one in self.stack.tiers) or "none"
            raise Invalid(f"tier {tier!r} is not there to prefetch into (there is: {names})", kind="argument")

        def keep(cells: Sequence[CellRef], data: Sequence[Buffer], level: int) -> None:
            self._keep(cells, data, range(target, level))

        want_layers = range(self.geometry.layers) if layers is None else layers
        want_heads = range(self.geometry.heads) if heads is None else heads
        self.metrics.add("prefetches")
        return self._start_load(chunks, None, want_layers, want_heads, deadline_s, keep)

    def _start_load(
        self,
        chunks: Sequence[ChunkRef],
        sink: Sink | None,
        layers: range,
        heads: range,
        deadline_s: float | None,
        on_fetched: Callable[[Sequence[CellRef], Sequence[Buffer], int], None],
    ) -> Handle[LoadReport]:
        chunks = tuple(chunks)
        plan = make_plan(self.geometry, self._codecs, chunks, layers, heads, self._piece_bytes)
        load = Load(
            self.geometry,
            chunks,
            plan,
            sink,
            stack=self.stack,
            codecs=self._codecs,
            budget=self.budget,
            on_fetched=on_fetched,
        )
        load.work.handle.add_done_callback(self._count_load)
        self.watch(load.work, self.settings.load_deadline_s if deadline_s is None else deadline_s)
        for piece in plan.pieces:
            self._submit(self._loads, load.work, load.run, piece)
        return load.work.handle

    def _count_load(self, handle: Handle[LoadReport]) -> None:
        error = handle.error()
        if error is not None:
            self.metrics.add(f"loads_{error.kind if isinstance(error, LMCacheS3Error) else 'bug'}")
            return
        report = handle.result()
        self.metrics.add("loaded_chunks", report.loaded_chunks)
        self.metrics.add("load_requests", report.requests)
        for name, n_bytes in report.tier_bytes.items():
            self.metrics.add(f"load_{name}_bytes", n_bytes)
        if report.failed:
            self.metrics.add("loads_failed")
            self.metrics.add(f"load_failures_{report.failed[0][2].kind}")

    # --- stores

    def upload_shard(
        self,
        name: ExtentName,
        grid: Grid,
        shard: int,
        first_token: int,
        hashes: bytes,
        cells: Sequence[np.ndarray],
        *,
        parent: bytes = b"",
        deadline_s: float | None = None,
        rest: bool = False,
    ) -> Handle[StoredShard]:
        """Encode the cells of one shard, PUT them as one object, keep them in the tiers.

        cells: one a chunk, `geometry.cell_shape(grid)`, storage dtype, any strides; not to be changed until the handle
        is done, nor freed while it runs. hashes: 16 bytes each, of the extent's chunks; parent: of the chunk before
        them, empty where it is not known (tiers then take the first for a prompt's beginning). The handle ends with
        `Unavailable` (full: no room in the budget, or the store's) or what else the store says. Raises `Invalid`.
        rest: put nothing yet; the cells rest, and can be loaded by the extent's name, until `upload_rested`.
        """
        job = ShardJob(name, grid, shard, first_token, hashes, cells, parent)
        job.check(self.geometry, self.codec)
        upload = Upload(
            job,
            self.geometry,
            self.codec,
            bucket=self.stack.bucket,
            close_shard=shard_index,
            budget=self.budget,
            share=STORE_SHARE,
            on_stored=self._keep_everywhere,
            rest_in=self._resting_tier() if rest else None,
        )
        upload.work.handle.add_done_callback(self._count_upload)
        self.watch(upload.work, self.settings.store_deadline_s if deadline_s is None else deadline_s)
        for i in range(len(cells)):
            # Also when the first cells have failed already: the last to run gives the memory back.
            self._step(self._stores, functools.partial(upload.run, i), upload.work)
        return upload.work.handle

    def upload_rested(
        self,
        name: ExtentName,
        grid: Grid,
        shard: int,
        first_token: int,
        chunks: Sequence[ChunkRef],
        *,
        deadline_s: float | None = None,
    ) -> Handle[StoredShard]:
        """PUT one shard of an extent made of cells that rest, and keep them in the tiers. They rest on until
        `forget_rested`. chunks: by the names they rest under. Raises `Invalid`."""
        upload = RestedUpload(
            name,
            grid,
            shard,
            first_token,
            chunks,
            resting=self._resting_tier(),
            bucket=self.stack.bucket,
            close_shard=shard_index,
            budget=self.budget,
            share=STORE_SHARE,
            on_stored=self._keep_everywhere,
        )
        upload.work.handle.add_done_callback(self._count_upload)
        self.watch(upload.work, self.settings.store_deadline_s if deadline_s is None else deadline_s)
        self._step(self._stores, upload.run, upload.work)
        return upload.work.handle

    def forget_rested(self, names: Sequence[ExtentName]) -> None:
        """Let go of cells that rest under these names."""
        if names:
            self._resting_tier().forget(names)

    def _resting_tier(self) -> RestingTier:
        if self._resting is None:
            raise Invalid("nothing can rest: write_behind_s is 0", kind="setting", key="write_behind_s")
        return self._resting

    def _count_upload(self, handle: Handle[StoredShard]) -> None:
        error = handle.error()
        if error is not None:
            self.metrics.add(f"uploads_{error.kind if isinstance(error, LMCacheS3Error) else 'bug'}")
            return
        stored = handle.result()
        self.metrics.add("uploads")
        self.metrics.add("upload_bytes", stored.n_bytes)

    # --- tiers

    def _promote(self, promotions: _Promotions, cells: Sequence[CellRef], data: Sequence[Buffer], level: int) -> None:
        """Keep fetched cells in the tiers above `level`, in the background; skipped when that falls behind."""
        n_bytes = sum(cell.length for cell in cells)
        if not self.budget.try_take(n_bytes, PROMOTE_SHARE):
            self.metrics.add("promotions_skipped", len(cells))
            return

        def keep() -> None:
            try:
                self._keep(cells, data, range(level))
            finally:
                self.budget.give_back(n_bytes)

        if not promotions.add(keep, n_bytes):
            self.budget.give_back(n_bytes)

    def _keep_everywhere(self, cells: Sequence[CellRef], data: Sequence[Buffer]) -> None:
        self._keep(cells, data, range(len(self.stack.tiers)))

    def _keep(self, cells: Sequence[CellRef], data: Sequence[Buffer], levels: range) -> None:
        for level in levels:
            tier = self.stack.tiers[level]
            try:
                self.metrics.add(f"kept_{tier.name}_cells", tier.put(list(zip(cells, data, strict=True))))
            except LMCacheS3Error as e:
                self.metrics.add(f"{tier.name}_put_{e.kind}")

    def discard(self, cells: Sequence[CellRef]) -> None:
        """Forget damaged cells in every tier."""
        self.stack.discard(cells)

    # --- life

    def watch(self, work: Work[Any], deadline_s: float) -> None:
        """From now on a deadline or `close` ends the work."""
        with self._changed:
            closed = self._closed
            if not closed:
                self._running.add(work)
        if closed:
            work.abort(Unavailable("the transfer is closed", kind="closed"))
            return
        work.handle.add_done_callback(lambda _: self._forget(work))
        self._deadlines.watch(work, deadline_s)

    def _forget(self, work: Work[Any]) -> None:
        with self._changed:
            self._running.discard(work)

    def _submit(self, pool: ThreadPoolExecutor, work: Work[Any], call: Callable[..., None], *args: object) -> None:
        """Run a step; an exception nobody foresaw (the sink's, memory) ends the work with it."""
        if not work.over:
            self._step(pool, lambda: call(*args), work)

    def _step(self, pool: ThreadPoolExecutor, call: Callable[[], None], work: Work[Any] | None = None) -> bool:
        """Hand a call to a pool, counted until it is done; False if we are closed."""
        with self._changed:
            if self._closed:
                return False
            self._steps += 1
            future = pool.submit(call)

        def done(ended: Future[None]) -> None:
            with self._changed:
                self._steps -= 1
                self._changed.notify_all()
            error = None if ended.cancelled() else ended.exception()
            if error is not None and work is not None:
                self.metrics.add("bugs")
                work.fail(error)

        future.add_done_callback(done)
        return True

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is going on, promotions included; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._steps, timeout_s)

    def stats(self) -> dict[str, TierStats]:
        """By tier's name, `object` included; counters are in `metrics`."""
        return self.stack.stats()

    def close(self, timeout_s: float = 5.0) -> None:
        """End all work with `Unavailable(closed)`, wait for requests under way, close the tiers."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            running = list(self._running)
        for work in running:
            work.abort(Unavailable("the transfer is closed", kind="closed"))
        for pool in (self._loads, self._stores, self._background):
            pool.shutdown(wait=False, cancel_futures=True)
        self.drain(timeout_s)
        self._deadlines.close()
        self._calibrations.__exit__(None, None, None)
        self.stack.close()
