"""The worker role: moves KV between this rank's engine blocks and the tiers. No index, no decisions.

Loads run on the transfer's threads and write straight into the engine's blocks (those of a GPU through a decoder of its
own, once that has proven itself); they are reported finished (or failed) by `take_finished`. Gathers copy full chunks
into staging memory right after the forward that filled them, so the engine may reuse its blocks at once; uploads then
run in the background. Staging memory is bounded: what does not fit is dropped and its extent given up; the engine is
never held up.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lmcache_s3.calibration_store import with_calibration
from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.config_sizes import check_sizes
from lmcache_s3.errors import Bug, Invalid, LMCacheS3Error, Unusable
from lmcache_s3.integrations.vllm.audit import Audit
from lmcache_s3.integrations.vllm.blocks import EngineBlocks
from lmcache_s3.integrations.vllm.metadata import (
    BadExtent,
    FailedPart,
    GatherOrder,
    LoadOrder,
    PrefetchOrder,
    RestedOrder,
    StepOrders,
    StoredPart,
    UploadOrder,
    WorkerReport,
)
from lmcache_s3.integrations.vllm.model import ModelFacts
from lmcache_s3.integrations.vllm.stats import Counters
from lmcache_s3.loading import LoadReport
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.transfer import Transfer, check_staging
from lmcache_s3.types import HASH_BYTES, ExtentName, Geometry, Grid
from lmcache_s3.uploading import StoredShard

if TYPE_CHECKING:
    from lmcache_s3.config import Settings
    from lmcache_s3.handle import Handle
    from lmcache_s3.integrations.vllm.on_device import DeviceDecoder
    from lmcache_s3.tiers.base import Tier

logger = logging.getLogger("lmcache_s3.vllm")

DECODING_DEVICES = frozenset({"cuda"})
"""Types of devices that decode into their blocks themselves."""
_DECODED_THERE = frozenset({"cachegen", "transform"})
"""Codecs that devices decode."""

_MOST_ENGINES = 16
"""Engines on one host that may have their part of one `disk_path`."""

_PREFETCH_SHARE = 0.25
"""Prefetches under way may be worth this part of the tier they go to: more would evict each other."""


@dataclass
class _Staged:
    """Chunks of an extent to be, gathered so far: position → [kv, layer, token, head, channel] of this rank."""

    chunks: dict[int, np.ndarray] = field(default_factory=dict)
    n_bytes: int = 0


def _leave_compute_cores() -> None:
    """vLLM's CPU backend binds a worker, and so every thread it starts, to the cores it computes on. Ours run wherever
    the process that started the worker may."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))


class WorkerRole:
    """One rank. Methods are called by the engine's worker thread; callbacks by the transfer's threads."""

    def __init__(
        self,
        facts: ModelFacts,
        settings: Settings,
        codec: KVCodec,
        *,
        attention_layers: Mapping[str, Any],
        tensor_rank: int = 0,
        stage: int = 0,
        replica: int = 0,
    ) -> None:
        """attention_layers: vLLM's layers by name, to learn from where they keep what. replica: data-parallel rank."""
        self._facts, self._settings, self._codec = facts, settings, codec
        self._attention_layers = attention_layers
        self._tensor_rank = tensor_rank
        self.rank = tensor_rank + facts.tensor_parallel * stage
        self._owner = f"rank{self.rank}" if not replica else f"rank{self.rank}-replica{replica}"
        self._geometry = Geometry(
            facts.group.kv,
            facts.group.layers,
            facts.group.heads,
            facts.group.head_dim,
            facts.kv_dtype,
            settings.chunk_tokens,
        )
        check_staging(settings.staging_bytes, self._geometry, codec)
        grid = facts.grid(settings) or Grid()
        for warning in check_sizes(settings, self._geometry, codec, grid, processes=facts.writers * grid.stages):
            if self.rank == 0:
                logger.warning("%s", warning)
        self.counters = Counters("worker", self.rank)
        self._store = CountingStore(open_store(settings.url, options=settings.store_options()))
        self._transfer: Transfer | None = None
        self._blocks: EngineBlocks | None = None
        self._decoder: DeviceDecoder | None = None
        self._loads: dict[str, tuple[LoadOrder, Handle[LoadReport]]] = {}
        self._failed_at_once: set[str] = set()
        self._prefetches: dict[str, Handle[LoadReport]] = {}
        self._staging: dict[str, _Staged] = {}
        self._staged_bytes = 0
        self._lock = threading.Lock()
        self._report = WorkerReport()
        self._audit = Audit.from_environment()

    # ---- set-up ----------------------------------------------------------------------------------------------------

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn where the engine keeps what. Raises `Unsupported` or `Invalid` where it cannot be learnt."""
        self._blocks = EngineBlocks.learn(kv_caches, self._attention_layers, self._facts, self._tensor_rank)
        self._decoder = self._device_decoder(self._blocks)

    def _device_decoder(self, blocks: EngineBlocks) -> DeviceDecoder | None:
        device = blocks.views[0].device
        if device.type not in DECODING_DEVICES or self._codec.id not in _DECODED_THERE:
            return None
        try:
            from lmcache_s3.integrations.vllm.on_device import proven_decoder  # Triton only where there is a use for it
        except Exception as error:  # noqa: BLE001 - whatever Triton says when it is drawn in: the host decodes
            logger.warning("cells are decoded on the host, not on %s: %r", device, error)
            return None
        return proven_decoder(blocks, self._codec.id, self._facts.kv_dtype)

    def turn_off(self, why: str) -> None:
        """Tell the scheduler that this rank can neither load nor store."""
        with self._lock:
            self._report.off = why

    def _tiers(self, space_id: str) -> list[Tier]:
        """The tiers before the bucket. A disk directory is one process's: another engine here takes the next."""
        if self._settings.disk_path is None:
            return self._settings.make_tiers(space_id, self._owner)
        problem: Invalid | None = None
        for i in range(_MOST_ENGINES):
            try:
                return self._settings.make_tiers(space_id, self._owner + (f".{i}" if i else ""))
            except Invalid as error:
                problem = error
        logger.warning("going on without the disk tier: %s", problem)
        return self._settings.model_copy(update={"disk_path": None, "disk_bytes": None}).make_tiers(space_id, "")

    def _transfer_for(self, space_id: str) -> Transfer:
        if self._transfer is None:
            self._transfer = Transfer(
                self._store,
                space_id,
                self._geometry,
                self._codec,
                self._tiers(space_id),
                settings=self._settings.transfer_settings(),
                on_thread_start=_leave_compute_cores,
                resting=self._settings.make_resting(),
            )
        return self._transfer

    # ---- loads -----------------------------------------------------------------------------------------------------

    def start_loads(self, orders: StepOrders) -> None:
        """Begin this step's loads; returns at once. A load that cannot begin is failed, never forgotten."""
        self._failed_at_once.update(orders.fail)
        if orders.space_id is not None and self._transfer is None:  # made before the first load needs it
            try:
                if orders.calibration is not None:
                    self._codec = with_calibration(self._codec, orders.calibration)
                self._transfer_for(orders.space_id)
            except LMCacheS3Error as error:
                self.turn_off(str(error))
        for order in orders.loads:
            try:
                self._start_load(order, orders.space_id)
            except LMCacheS3Error as error:
                self._note_failure(order, [(0, order.chunks[0].extent.name, error)])
                self._failed_at_once.add(order.request_id)
        for prefetch in orders.prefetches:
            self._start_prefetch(prefetch, orders.space_id)

    def _start_prefetch(self, order: PrefetchOrder, space_id: str | None) -> None:
        """Bring chunks into the host tier, else the disk's, unless there is none or too much is on its way to it."""
        blocks = self._blocks
        if blocks is None or space_id is None:
            return
        transfer = self._transfer_for(space_id)
        tier = next((one for one in transfer.stack.tiers if one.name in ("host", "disk")), None)
        if tier is None or tier.budget_bytes is None:
            return
        self._prefetches = {one: handle for one, handle in self._prefetches.items() if not handle.done()}
        running_bytes = sum(handle.total_bytes for handle in self._prefetches.values())
        if running_bytes > tier.budget_bytes * _PREFETCH_SHARE:
            self.counters.add(dropped_prefetches=1)
            return
        self._prefetches[order.request_id] = transfer.prefetch(
            order.chunks, tier.name, layers=blocks.layers, heads=blocks.heads, deadline_s=self._settings.load_deadline_s
        )

    def fail_loads(self, orders: StepOrders) -> None:
        """Report all of this step's loads failed that did not begin."""
        self._failed_at_once.update(o.request_id for o in orders.loads if o.request_id not in self._loads)

    def _start_load(self, order: LoadOrder, space_id: str | None) -> None:
        blocks = self._blocks
        if blocks is None or space_id is None:
            self._failed_at_once.add(order.request_id)
            return
        chunk_tokens = self._geometry.chunk_tokens
        begun = blocks.mark()

        def place(chunk: int) -> tuple[np.ndarray, range]:
            """Blocks, and which tokens of the cell they are for."""
            first = order.first_chunk_token + chunk * chunk_tokens
            begin, end = max(first, order.start_token), min(first + chunk_tokens, order.end_token)
            ids = blocks.ids(order.block_ids, begin - order.start_token, end - order.start_token)
            return ids, range(begin - first, end - first)

        def sink(chunk: int, layers: range, heads: range, cell: np.ndarray) -> None:
            ids, tokens = place(chunk)
            blocks.scatter(ids, layers, heads, cell[:, :, tokens.start : tokens.stop], after=begun)

        handle = self._transfer_for(space_id).load(
            order.chunks,
            sink,
            coded=self._decoder.sink(place, begun) if self._decoder is not None else None,
            layers=blocks.layers,
            heads=blocks.heads,
            deadline_s=self._settings.load_deadline_s,
        )
        self._loads[order.request_id] = (order, handle)
        prefetch = self._prefetches.pop(order.request_id, None)
        if prefetch is not None:  # what it has brought stays; who waits for the rest of it now waits for the load
            prefetch.cancel()

    def take_finished(self) -> tuple[set[str], set[str]]:
        """(requests whose load ended, those of them that failed) since the last call; does not block."""
        failed, self._failed_at_once = self._failed_at_once, set()
        done = {request_id for request_id, (_, handle) in self._loads.items() if handle.done()}
        for request_id in done:
            order, handle = self._loads.pop(request_id)
            try:
                whole = self._finish_load(order, handle)
            except Exception:  # the request waits for an answer, whatever went wrong
                logger.exception("a load that ended could not be taken over; the engine computes")
                self.counters.add(internal_errors=1)
                whole = False
            if not whole:
                failed.add(request_id)
        return done | failed, failed

    def _finish_load(self, order: LoadOrder, handle: Handle[LoadReport]) -> bool:
        try:
            report = handle.result(0)
        except Exception as error:  # noqa: BLE001 - whatever our sink raised: the request is computed
            ours = error if isinstance(error, LMCacheS3Error) else Bug(f"writing into the engine's blocks: {error!r}")
            self._note_failure(order, [(0, order.chunks[0].extent.name, ours)])
            return False
        if report.failed or report.loaded_chunks != len(order.chunks):
            self._note_failure(order, report.failed)
            return False
        if self._audit is not None and self._blocks is not None:
            self._audit.loaded(order, self._blocks, self._geometry)
        with self._lock:
            self._report.loads_done += 1
        if self.rank == 0:
            self.counters.add(loaded_requests=1, loaded_tokens=order.end_token - order.start_token)
        return True

    def _note_failure(self, order: LoadOrder, failures: Sequence[tuple[int, Any, LMCacheS3Error]]) -> None:
        by_extent: dict[str, LMCacheS3Error] = {}
        for _, name, error in failures:
            by_extent.setdefault(str(name), error)
        with self._lock:
            for name, error in by_extent.items():
                bad = BadExtent(order.request_id, name, isinstance(error, Unusable), error.kind, str(error))
                self._report.bad.append(bad)
        self.counters.add(bad_chunks=sum(isinstance(e, Unusable) for _, _, e in failures))

    # ---- stores ----------------------------------------------------------------------------------------------------

    def gather(self, orders: StepOrders) -> None:
        """Copy full chunks out of the engine's blocks; called after the forward that filled them."""
        for key in orders.discard:
            self._forget(key)
        if not self._facts.writes(self._tensor_rank):
            return
        try:
            if self._blocks is not None:
                for order in orders.gathers:
                    self._gather_one(order, self._blocks)
        finally:  # each upload is answered, whatever happens
            for upload in orders.uploads:
                self._answer_upload(upload, orders.space_id)
            for rested in orders.rested:
                self._answer_rested(rested)
        if self._transfer is not None:
            self._transfer.forget_rested(orders.forget)

    def _answer_upload(self, upload: UploadOrder, space_id: str | None) -> None:
        try:
            self._start_upload(upload, space_id)
        except Exception as error:  # noqa: BLE001 - an extent that cannot be stored is given up, whatever the cause
            self._forget(upload.staging)
            self._fail(upload.name, getattr(error, "kind", "bug"), str(error))

    def _answer_rested(self, order: RestedOrder) -> None:
        try:
            self._upload_rested(order)
        except Exception as error:  # noqa: BLE001 - an extent that cannot be stored is given up, whatever the cause
            self._fail(order.name, getattr(error, "kind", "bug"), str(error))

    def _gather_one(self, order: GatherOrder, blocks: EngineBlocks) -> None:
        n_bytes = blocks.chunk_bytes(self._geometry)
        with self._lock:
            staged = self._staging.setdefault(order.staging, _Staged())
            fits = self._staged_bytes + n_bytes <= self._settings.staging_bytes
            if fits:
                staged.n_bytes += n_bytes
                self._staged_bytes += n_bytes
        if not fits:  # the upload that follows finds a chunk missing and gives the extent up
            self.counters.add(dropped_chunks=1)
            return
        ids = blocks.ids(order.block_ids, 0, self._geometry.chunk_tokens)
        chunk = blocks.gather(ids)
        staged.chunks[order.position] = chunk
        if self._audit is not None:
            self._audit.stored(order, chunk, blocks)

    def _start_upload(self, order: UploadOrder, space_id: str | None) -> None:
        staged = self._staging.get(order.staging) or _Staged()
        n_chunks = len(order.hashes) // HASH_BYTES
        if space_id is None or self._blocks is None or set(staged.chunks) != set(range(n_chunks)):
            self._forget(order.staging)
            self._fail(order.name, "full", "a chunk was dropped: staging memory was full")
            return
        chunks = [staged.chunks[i] for i in range(n_chunks)]
        transfer = self._transfer_for(space_id)
        mine = self._shards(order.grid, self._blocks)
        waiting = set(mine)

        def ended(shard: int) -> None:
            with self._lock:
                waiting.discard(shard)
                last = not waiting
            if last:
                self._forget(order.staging)

        for shard in mine:
            heads = self._blocks.local_heads(self._geometry.cell_heads(order.grid, shard))
            handle = transfer.upload_shard(
                order.name,
                order.grid,
                shard,
                order.first_token,
                order.hashes,
                [chunk[:, :, :, heads.start : heads.stop] for chunk in chunks],
                parent=order.parent,
                deadline_s=self._settings.store_deadline_s,
                rest=order.to_rest,
            )
            note = functools.partial(self._note_stored, name=order.name, shard=shard, to_rest=order.to_rest, then=ended)
            handle.add_done_callback(note)

    def _shards(self, grid: Grid, blocks: EngineBlocks) -> list[int]:
        """The shards this rank writes."""
        return [shard for shard in range(grid.shards) if blocks.covers(self._geometry, grid, shard)]

    def _upload_rested(self, order: RestedOrder) -> None:
        blocks, transfer = self._blocks, self._transfer
        if blocks is None or transfer is None:
            raise Bug("ordered to upload what cannot rest here")
        for shard in self._shards(order.grid, blocks):
            handle = transfer.upload_rested(
                order.name,
                order.grid,
                shard,
                order.first_token,
                order.chunks,
                deadline_s=self._settings.store_deadline_s,
            )
            handle.add_done_callback(functools.partial(self._note_stored, name=order.name, shard=shard))

    def _note_stored(
        self,
        handle: Handle[StoredShard],
        *,
        name: ExtentName,
        shard: int,
        to_rest: bool = False,
        then: Callable[[int], None] = lambda shard: None,
    ) -> None:
        """An upload (or its laying to rest) ended."""
        try:
            part = handle.result(0)
        except Exception as error:  # noqa: BLE001 - an extent that cannot be stored is given up, whatever the cause
            self._fail(name, getattr(error, "kind", "bug"), str(error))
        else:
            with self._lock:
                self._report.stored.append(StoredPart(str(name), shard, part.lengths, part.sums, part.n_bytes))
            self.counters.add(stored_chunks=0 if to_rest else name.n_chunks)
        then(shard)

    def _fail(self, name: ExtentName, kind: str, message: str) -> None:
        with self._lock:
            self._report.failed.append(FailedPart(str(name), kind, message))

    def _forget(self, staging: str) -> None:
        with self._lock:
            staged = self._staging.pop(staging, None)
            if staged is not None:
                self._staged_bytes -= staged.n_bytes

    # ---- reports ---------------------------------------------------------------------------------------------------

    def take_report(self) -> WorkerReport | None:
        with self._lock:
            report, self._report = self._report, WorkerReport()
        self.write_stats()
        return report or None

    def write_stats(self) -> None:
        counts = self._store.counts
        self.counters.write(
            {
                "loaded_bytes": self._store.read_bytes,
                "stored_bytes": self._store.written_bytes,
                "load_requests": counts["get"] + counts["get_into"],
                "store_puts": counts["put"] + counts["create"],
                "staged_bytes": self._staged_bytes,
                "device_cells": self._decoder.decoded_cells if self._decoder is not None else 0,
            }
        )

    def busy(self) -> bool:
        return bool(self._loads or self._staging)

    def close(self, timeout_s: float) -> None:
        """Wait for uploads under way, at most `timeout_s`, then let go."""
        begin = time.monotonic()
        end = begin + timeout_s
        while self._staging and time.monotonic() < end:
            time.sleep(0.01)
        if self._transfer is not None:
            self._transfer.close(max(0.1, end - time.monotonic()))
        self._store.close()
        self.write_stats()
        if self._audit is not None:
            self._audit.close()
        logger.info("worker role closed in %.2f s", time.monotonic() - begin)
