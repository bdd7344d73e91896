"""The data path of one process: tiers, codec, threads and one memory budget. No index: callers bring `ChunkRef`s.

Loads and stores have threads of their own, for requests (as many at once as pay) and for coding, so that neither waits
for the other; cells fetched from a slow tier are kept in the faster ones by a background thread, passed over when it
falls behind. Memory in flight, and what is kept of it for later, stays within `staging_bytes`: loads wait for room
within their deadline, uploads are refused, promotions are skipped.
Raises `Invalid` (arguments, settings); everything else ends up in a `LoadReport` or in the handle of an upload.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcache_s3.alarms import Alarms
from lmcache_s3.budget import ByteBudget
from lmcache_s3.calibration_store import attached
from lmcache_s3.codecs.base import CellSpec, KVCodec
from lmcache_s3.coded import CodedSink
from lmcache_s3.errors import Invalid, LMCacheS3Error, Unavailable
from lmcache_s3.extent import shard_index
from lmcache_s3.handle import Deadlines, Handle, Work
from lmcache_s3.lane import Lane
from lmcache_s3.loading import Codecs, LoadReport, Sink, make_plan
from lmcache_s3.metrics import Metrics
from lmcache_s3.pipeline import Load, Means, OnFetched, decoding_bytes
from lmcache_s3.promotions import Promotions
from lmcache_s3.reading import Reader
from lmcache_s3.rested_upload import RestedUpload
from lmcache_s3.resting import RestingTier
from lmcache_s3.sharing import Sharing
from lmcache_s3.tier_stack import TierStack
from lmcache_s3.tiers.base import Tier, TierStats
from lmcache_s3.tiers.buffers import BufferPool, rounded
from lmcache_s3.tiers.object import ObjectTier
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tracebacks import without_locals
from lmcache_s3.types import Buffer, CellRef, ChunkRef, ExtentName, Geometry, Grid
from lmcache_s3.uploading import ShardJob, StoredShard, Upload, UploadMeans

PROMOTE_SHARE = 0.5
"""Promotions use at most this part of the budget: a slow disk must not hold up loads."""

WAITING_SHARE = 0.25
"""Promotions wait for the end of their load, but with at most this part of the budget, and no more than leaves room for
any piece, so no load waits for promotions that wait for it; more go on at once."""

OBJECTS_SHARE = 1 / 128
"""Of `staging_bytes`, for the small objects around the buffers."""

STORE_SHARE = 0.75
"""Uploads use at most this part."""


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """staging_bytes: memory in flight at most, encoded and decoded, loads and stores together. io_threads: requests at
    once for loads (half as many for stores) at most; how many are worth while is learnt. piece_bytes: stored bytes that
    are read together at most (one cell at least). load_deadline_s, store_deadline_s: where a call states none."""

    staging_bytes: int = 512 << 20
    io_threads: int = 16
    piece_bytes: int = 16 << 20
    load_deadline_s: float = 30.0
    store_deadline_s: float = 60.0


def check_staging(staging_bytes: int, geometry: Geometry, codec: KVCodec) -> None:
    """Raises `Invalid` if the budget does not hold one chunk on its way."""
    spec = CellSpec.of(geometry, Grid())
    stored = max(codec.max_encoded_bytes(spec) + geometry.chunk_bytes, codec.encode_memory_bytes(spec))
    loaded = rounded(codec.max_encoded_bytes(spec)) + _decoding_bytes(geometry, codec)
    least = int(max(stored / STORE_SHARE, loaded / (1 - OBJECTS_SHARE))) + 1
    if staging_bytes < least:
        raise Invalid(
            f"staging_bytes={staging_bytes} does not hold a chunk of this model: give at least {least}",
            kind="setting",
            key="staging_bytes",
        )


def _decoding_bytes(geometry: Geometry, codec: KVCodec) -> int:
    """What a stored chunk takes at most, beside its own bytes, while it is decoded."""
    spec = CellSpec.of(geometry, Grid())
    return decoding_bytes(codec, spec, geometry.chunk_bytes, codec.max_encoded_bytes(spec))


def _waiting_bytes(staging_bytes: int, left_bytes: int) -> int:
    """Room for promotions that wait. They hold their bytes twice: in buffers, up to a sixteenth larger, and beside."""
    return max(1, min(int(staging_bytes * WAITING_SHARE), left_bytes * 16 // 33))


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
        budget_bytes = settings.staging_bytes - int(settings.staging_bytes * OBJECTS_SHARE)
        self.budget = ByteBudget(budget_bytes)
        self.buffers = BufferPool(budget_bytes, budget_bytes)
        # Several pieces must fit at once, or nothing overlaps.
        left_bytes = budget_bytes - _decoding_bytes(geometry, codec)
        piece_bytes = max(1, min(settings.piece_bytes, settings.staging_bytes // 4, left_bytes * 16 // 17))
        left_bytes -= rounded(max(piece_bytes, codec.max_encoded_bytes(CellSpec.of(geometry, Grid()))))
        self._waiting = ByteBudget(_waiting_bytes(settings.staging_bytes, left_bytes))
        self._promoting = ByteBudget(max(1, int(settings.staging_bytes * PROMOTE_SHARE)))
        self._resting = resting
        in_front = tiers if resting is None else (resting, *tiers)
        self.stack = TierStack(in_front, ObjectTier(store, space_id, shard_index))
        self._codecs = Codecs(codec)
        self._calibrations = attached(store)
        check_staging(settings.staging_bytes, geometry, codec)
        self._deadlines = Deadlines(name="lmcache-s3-deadlines")
        self._hedges = Alarms(name="lmcache-s3-hedges")
        n, self.cores = settings.io_threads, _cores()
        self._lanes = tuple(
            Lane(f"lmcache-s3-{name}", most, start=start, on_thread_start=on_thread_start)
            for name, most, start in (("load", n, 4), ("store", max(2, n // 2), 2))
        )
        coders = min(n, self.cores)
        pools = (("tiers", coders), ("decode", coders), ("encode", coders), ("promote", 1))
        self._pools = tuple(
            ThreadPoolExecutor(threads, f"lmcache-s3-{name}", on_thread_start) for name, threads in pools
        )
        tier_threads, decoders, encoders, self._background = self._pools
        reader = Reader(
            self.stack.bucket,
            self._lanes[0],
            self.budget,
            self.buffers,
            self._hedges,
            self._step,
            self.metrics,
            part_bytes=piece_bytes,
        )
        self._load_means = Means(
            geometry,
            self.stack,
            self._codecs,
            self.budget,
            self.buffers,
            reader,
            tier_threads,
            decoders,
            coders,
            self._step,
            piece_bytes,
            Sharing(self._step, decoders),
        )
        self._upload_means = UploadMeans(
            geometry,
            self.stack.bucket,
            self.budget,
            STORE_SHARE,
            self.buffers,
            shard_index,
            encoders,
            self._lanes[1],
            self._step,
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
        coded: CodedSink | None = None,
    ) -> Handle[LoadReport]:
        """Fetch, verify, decode and hand over chunks; `layers`, `heads`: of the model, all where None.

        coded: takes cells undecoded, those that it says it does.

        The handle's result is always a report, unless it was cancelled or the sink raised. Raises `Invalid`.
        """
        want_layers = range(self.geometry.layers) if layers is None else layers
        want_heads = range(self.geometry.heads) if heads is None else heads
        self.metrics.add("loads")
        promotions = Promotions(lambda keep: self._step(lambda: self._background.submit(keep)), self._waiting)

        def fetched(cells: list[tuple[CellRef, Buffer]], level: int) -> None:
            self._promote(promotions, cells, level)

        try:
            handle = self._start_load(chunks, sink, want_layers, want_heads, deadline_s, fetched, coded)
        except BaseException:
            promotions.begin()
            raise
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
        """Bring chunks into a tier (and those between it and where they are); done when they are there, or when another
        is just putting them there.

        `layers`, `heads`: as for `load`; cells that hold any of them are brought.

        Raises `Invalid` if there is no such tier.
        """
        target = self.stack.level(tier)
        into = [one.name for one in self.stack.tiers if one is not self._resting]
        if target is None or tier not in into:
            names = ", ".join(into) or "none"
            raise Invalid(f"tier {tier!r} is not there to prefetch into (there is: {names})", kind="argument")

        def keep(cells: list[tuple[CellRef, Buffer]], level: int) -> None:
            self._keep(cells, range(target, level))

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
        on_fetched: OnFetched,
        coded: CodedSink | None = None,
    ) -> Handle[LoadReport]:
        chunks = tuple(chunks)
        plan = make_plan(self.geometry, self._codecs, chunks, layers, heads)
        if sink is not None:  # what is fetched before anybody asks is no use yet
            for cells in plan.prompts():
                self.stack.use(cells)
        load = Load(self._load_means, chunks, plan, sink, on_fetched, coded)
        load.work.handle.add_done_callback(self._count_load)
        self.watch(load.work, self.settings.load_deadline_s if deadline_s is None else deadline_s)
        load.start()
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
        rest_in = self._resting_tier() if rest else None
        upload = Upload(job, self._upload_means, self.codec, self._keep_everywhere, rest_in)
        upload.work.handle.add_done_callback(self._count_upload)
        self.watch(upload.work, self.settings.store_deadline_s if deadline_s is None else deadline_s)
        upload.start()
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
            means=self._upload_means,
            on_stored=self._keep_everywhere,
        )
        upload.work.handle.add_done_callback(self._count_upload)
        self.watch(upload.work, self.settings.store_deadline_s if deadline_s is None else deadline_s)
        self._step(lambda: self._lanes[1].submit(upload.run), upload.work)
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

    def _promote(self, promotions: Promotions, cells: list[tuple[CellRef, Buffer]], level: int) -> None:
        """Keep fetched cells in the tiers above `level`, in the background; skipped when that falls behind.

        What was read from the bucket lies in buffers that hold their part of the budget; what a tier gave out does not.
        """
        n_bytes = sum(cell.length for cell, _ in cells)
        beside = n_bytes if level < len(self.stack.tiers) else 0
        if not self._promoting.try_take(n_bytes):
            self.metrics.add("promotions_skipped", len(cells))
            return
        if beside and not self.budget.try_take(beside, PROMOTE_SHARE):
            self._promoting.give_back(n_bytes)
            self.metrics.add("promotions_skipped", len(cells))
            return

        def over() -> None:
            cells.clear()
            self._promoting.give_back(n_bytes)
            self.budget.give_back(beside)

        def keep() -> None:
            try:
                self._keep(cells, range(level))
            finally:
                over()

        first, last = cells[0][0], cells[-1][0]
        held = last.offset + last.length - first.offset if beside else n_bytes  # gaps were read, too
        if not promotions.add(keep, held):
            over()

    def _keep_everywhere(self, cells: list[tuple[CellRef, Buffer]]) -> None:
        self._keep(cells, range(len(self.stack.tiers)))

    def _keep(self, cells: Sequence[tuple[CellRef, Buffer]], levels: range) -> None:
        for level in levels:
            tier = self.stack.tiers[level]
            try:
                self.metrics.add(f"kept_{tier.name}_cells", tier.put(cells))
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

    def _step(self, submit: Callable[[], Future[None]], work: Work[Any] | None = None) -> bool:
        """Hand a call to threads, counted until it is done; False if we are closed.

        An exception nobody foresaw (the sink's, memory) ends the work with it.
        """
        with self._changed:
            if self._closed:
                return False
            self._steps += 1
        try:
            future = submit()
        except RuntimeError:  # closed meanwhile
            self._one_step_less()
            return False

        def done(ended: Future[None]) -> None:
            error = None if ended.cancelled() else ended.exception()
            if error is not None and work is not None:
                self.metrics.add("bugs")
                work.fail(without_locals(error))
            self._one_step_less()

        future.add_done_callback(done)
        return True

    def _one_step_less(self) -> None:
        with self._changed:
            self._steps -= 1
            self._changed.notify_all()

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
        for lane in self._lanes:
            lane.shutdown(wait=False)
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        self.drain(timeout_s)
        self._deadlines.close()
        self._hedges.close()
        self._calibrations.__exit__(None, None, None)
        self.buffers.close()
        self.stack.close()


def _cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
