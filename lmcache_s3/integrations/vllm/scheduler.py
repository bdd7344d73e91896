"""The scheduler role: the one owner of the index. Matches prompts, plans loads and stores, commits extents.

Everything the engine waits for is a look-up in memory. Opening the index (digest, probe, checkpoint) runs in the
background; until it is there, and whenever it is not, the answer is "no match". A request whose load failed is computed
and never matched again. Extents: chunks are gathered as they fill, one extent closes at the end of prefill, at shard
length, or when its request ends; it is committed when every rank has reported its shards, counted across steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.identity import PrefixHasher, root_hash
from lmcache_s3.integrations.vllm.extents import Extents
from lmcache_s3.integrations.vllm.metadata import (
    GatherOrder,
    LoadOrder,
    PrefetchOrder,
    StepOrders,
    WorkerReport,
)
from lmcache_s3.integrations.vllm.model import ModelFacts
from lmcache_s3.integrations.vllm.opening import OpenCache, Opening
from lmcache_s3.integrations.vllm.prefetching import Queue
from lmcache_s3.integrations.vllm.requests import extra_keys, uncacheable
from lmcache_s3.integrations.vllm.stats import Counters
from lmcache_s3.types import HASH_BYTES, ChunkRef, ExtentName

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from lmcache_s3.config import Settings

logger = logging.getLogger("lmcache_s3.vllm")

_PAUSE_FIRST_S, _PAUSE_MOST_S = 1.0, 30.0
"""After a load that the store did not answer, no matches for this long, doubled each time in a row."""


@dataclass
class _Growing:
    """An extent being gathered: consecutive chunks of one request."""

    staging: str
    first_chunk: int
    hashes: list[bytes]


@dataclass
class _Tracked:
    """One live request."""

    request: Request
    hasher: PrefixHasher
    blocks: list[int] = field(default_factory=list)
    next_chunk: int = 0
    growing: _Growing | None = None
    match: Sequence[ChunkRef] = ()
    local_tokens: int = 0
    may_match: bool = True
    admitted: bool = True
    """Whether all chunks so far were worth storing (setting `admission`)."""
    loading: frozenset[ExtentName] = frozenset()
    """Extents of the load ordered last; `pins` holds them until it ends."""
    pins: ExitStack | None = None


class SchedulerRole:
    """Called by the engine's scheduler thread alone; futures resolve on background threads."""

    def __init__(
        self,
        facts: ModelFacts,
        settings: Settings,
        codec: KVCodec,
        opening: Opening,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._facts, self._settings, self._codec, self._clock = facts, settings, codec, clock
        self._opening = opening
        self._cache: OpenCache | None = None
        self.counters = Counters("scheduler")
        self._extents = self._make_extents()
        self._admission = settings.make_admission()
        self._tracked: dict[str, _Tracked] = {}
        self._orders = StepOrders()
        self._staging_number = 0
        self._pause_s, self._paused_until_s = _PAUSE_FIRST_S, 0.0
        self._off = False
        self._queue = Queue()

    def _make_extents(self) -> Extents | None:
        """None where nothing is stored."""
        facts, settings = self._facts, self._settings
        if settings.read_only:
            return None
        grid = facts.grid(settings)
        if grid is None:
            logger.warning(
                "layers or KV heads do not divide evenly over the ranks: this engine loads but stores nothing"
            )
            return None
        return Extents(
            facts,
            self._codec,
            grid,
            self.counters,
            chunk_tokens=settings.chunk_tokens,
            extent_bytes=settings.extent_bytes,
            store_deadline_s=settings.store_deadline_s,
            write_behind_s=settings.write_behind_s,
            write_behind_bytes=settings.write_behind_bytes,
            clock=self._clock,
            on_settled=self.write_stats,
        )

    # ---- matching --------------------------------------------------------------------------------------------------

    def _ready(self) -> OpenCache | None:
        if self._cache is None:
            self._cache = self._opening.poll()
        return self._cache

    def _track(self, request: Request, cache: OpenCache) -> _Tracked | None:
        """The request's record; None if it cannot be cached at all."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            reason = uncacheable(request)
            extra = () if reason else extra_keys(request, self._opening.adapter_digest)
            if extra is None:
                self.counters.add(skipped_requests=1)
                return None
            salt = request.cache_salt or ""
            hasher = PrefixHasher(cache.space.id, self._settings.chunk_tokens, salt=salt, extra=extra)
            tracked = self._tracked[request.request_id] = _Tracked(request, hasher)
            if reason:
                tracked.may_match, tracked.next_chunk = False, 1 << 60
                self.counters.add(skipped_requests=1)
        return tracked

    def _hashes(self, tracked: _Tracked, confirmed_tokens: int) -> list[bytes]:
        """Prefix hashes of the full chunks among the first `confirmed_tokens` tokens."""
        hashed = tracked.hasher.n_tokens
        if confirmed_tokens > hashed:
            tracked.hasher.extend(tracked.request.all_token_ids[hashed:confirmed_tokens])
        return tracked.hasher.hashes[: confirmed_tokens // self._settings.chunk_tokens]

    def arrived(self, request: Request) -> None:
        """A new request; it may wait in the engine's queue before it is matched."""
        if self._settings.prefetch != "off" and not self._off:
            self._queue.arrived(request)

    def match(self, request: Request, computed_tokens: int) -> int:
        """Tokens beyond `computed_tokens` that can be loaded: a look-up in memory."""
        cache = self._ready() if not self._off else None
        tracked = self._track(request, cache) if cache is not None else None
        if cache is None or tracked is None or not tracked.may_match or self._clock() < self._paused_until_s:
            return 0
        before = cache.store.requests_by_this_thread()
        tracked.match = self._match(cache, self._hashes(tracked, request.num_tokens))
        tracked.local_tokens = computed_tokens
        self.counters.add(lookups=1, lookup_requests=cache.store.requests_by_this_thread() - before)
        return max(0, len(tracked.match) * self._settings.chunk_tokens - computed_tokens)

    def _match(self, cache: OpenCache, hashes: Sequence[bytes]) -> Sequence[ChunkRef]:
        return cache.index.match(hashes) if self._extents is None else self._extents.match(cache, hashes)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """Blocks for `external_tokens` loaded tokens are there: order the load with the next step."""
        if external_tokens == 0:
            return
        self._queue.left(request.request_id)
        tracked, cache = self._tracked.get(request.request_id), self._cache
        if tracked is None or cache is None:
            self._orders.fail.append(request.request_id)
            return
        chunk_tokens, block_tokens = self._settings.chunk_tokens, self._facts.block_tokens
        start, end = tracked.local_tokens, tracked.local_tokens + external_tokens
        first, last = start // chunk_tokens, -(-end // chunk_tokens)
        chunks = tuple(tracked.match[first:last])
        ids = blocks.get_block_ids()[0][start // block_tokens : -(-end // block_tokens)]
        if len(chunks) != last - first or len(ids) * block_tokens < external_tokens:
            self._orders.fail.append(request.request_id)
            tracked.may_match = False
            return
        tracked.loading = frozenset(ref.extent.name for ref in chunks)
        tracked.pins = ExitStack()
        tracked.pins.enter_context(cache.index.pin(tracked.loading))
        if self._extents is not None:
            tracked.pins.enter_context(self._extents.reading(chunks))
        self._go_on_at(tracked, max(tracked.next_chunk, len(tracked.match)))
        self._orders.loads.append(LoadOrder(request.request_id, chunks, first * chunk_tokens, start, end, tuple(ids)))
        self.counters.add(matched_requests=1, matched_tokens=external_tokens)

    # ---- storing ---------------------------------------------------------------------------------------------------

    def orders(self, output: SchedulerOutput) -> StepOrders:
        """This step's orders to the workers; follows every scheduled request's blocks and full chunks."""
        orders, self._orders = self._orders, StepOrders()
        whole = False
        try:
            self._plan(orders, output)
            whole = True
        finally:
            if not whole:  # for `failed_orders`: nothing that was ordered may be forgotten
                self._orders = orders
        return orders

    def _plan(self, orders: StepOrders, output: SchedulerOutput) -> None:
        cache = self._ready()
        if self._extents is not None:
            self._extents.step(orders, None if self._off else cache)
        if cache is None or self._off:
            return
        orders.space_id, orders.calibration = cache.space.id, cache.calibration
        for new in output.scheduled_new_reqs:
            self._queue.left(new.req_id)
            self._progress(orders, new.req_id, new.block_ids[0], True, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            ids = cached.new_block_ids[i]
            resumed = request_id in cached.resumed_req_ids
            self._progress(orders, request_id, ids[0] if ids else [], resumed, cached.num_computed_tokens[i], output)
        for request in self._queue.step():
            self._prefetch(orders, request, cache)

    def _prefetch(self, orders: StepOrders, request: Request, cache: OpenCache) -> None:
        tracked = self._track(request, cache)
        if tracked is None or not tracked.may_match or self._clock() < self._paused_until_s:
            return
        chunks = tuple(cache.index.match(self._hashes(tracked, request.num_tokens)))
        if chunks:
            orders.prefetches.append(PrefetchOrder(request.request_id, chunks))
            self.counters.add(prefetched_requests=1)

    def _progress(
        self, orders: StepOrders, request_id: str, ids: list[int], fresh: bool, computed: int, output: SchedulerOutput
    ) -> None:
        tracked, cache, extents = self._tracked.get(request_id), self._cache, self._extents
        if tracked is None or cache is None:
            return
        if tracked.pins is not None:  # scheduled, so its load is whole: a failed one was unpinned when it was reported
            cache.index.touch(tracked.loading)
        self._unpin(tracked)
        tracked.blocks = list(ids) if fresh else tracked.blocks + list(ids)
        request = tracked.request
        after = min(computed + output.num_scheduled_tokens.get(request_id, 0), len(request.all_token_ids))
        if extents is None or request.num_prompt_tokens < self._settings.store_min_tokens:
            return
        hashes = self._hashes(tracked, after)
        while tracked.next_chunk < len(hashes):
            self._advance(orders, tracked, hashes, cache, extents)
        if computed < request.num_prompt_tokens <= after:
            self._close(orders, tracked)

    def _advance(
        self, orders: StepOrders, tracked: _Tracked, hashes: list[bytes], cache: OpenCache, extents: Extents
    ) -> None:
        """The next full chunk of a request: known already, or gathered into its growing extent."""
        chunk, prefix_hash = tracked.next_chunk, hashes[tracked.next_chunk]
        tracked.next_chunk += 1
        if extents.is_pending(prefix_hash) or cache.index.find(prefix_hash) is not None:
            self._close(orders, tracked)
            return
        if self._admission is not None and (not self._admission.admit([prefix_hash]) or not tracked.admitted):
            # What follows a chunk that is not stored could not be reached.
            tracked.admitted = False
            self._close(orders, tracked)
            return
        per_chunk = self._settings.chunk_tokens // self._facts.block_tokens
        ids = tracked.blocks[chunk * per_chunk : (chunk + 1) * per_chunk]
        if len(ids) != per_chunk:
            self._close(orders, tracked)
            return
        growing = tracked.growing
        if growing is None:
            self._staging_number += 1
            growing = tracked.growing = _Growing(f"{self._staging_number}", chunk, [])
        orders.gathers.append(GatherOrder(growing.staging, len(growing.hashes), prefix_hash, tuple(ids)))
        growing.hashes.append(prefix_hash)
        extents.gathering(prefix_hash)
        if len(growing.hashes) >= extents.extent_chunks:
            self._close(orders, tracked)

    def _go_on_at(self, tracked: _Tracked, chunk: int) -> None:
        """Store from this chunk on. An extent's chunks follow one another, so what is growing ends before a gap."""
        if chunk != tracked.next_chunk:
            self._close(self._orders, tracked)
            tracked.next_chunk = chunk

    def _close(self, orders: StepOrders, tracked: _Tracked) -> None:
        """The growing extent grows no more."""
        growing, tracked.growing = tracked.growing, None
        if growing is None or self._cache is None or self._extents is None:
            return
        if growing.first_chunk:
            parent = tracked.hasher.hashes[growing.first_chunk - 1]
        else:
            parent = root_hash(self._cache.space.id, tracked.request.cache_salt or "")[:HASH_BYTES]
        first_token = growing.first_chunk * self._settings.chunk_tokens
        self._extents.close(orders, self._cache, growing.staging, parent, first_token, growing.hashes)

    def finished(self, request: Request) -> None:
        """The request ended, well or not: what it has gathered is stored with the next step."""
        self._queue.left(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None:
            self._unpin(tracked)
            self._close(self._orders, tracked)
            self._prefetch_next_turn(tracked)

    def _prefetch_next_turn(self, tracked: _Tracked) -> None:
        """Its next turn begins with the same tokens. What the engine had in its own cache never came through our tiers,
        and would have to come from the bucket once the engine has dropped it."""
        cache = self._cache
        if self._settings.prefetch != "next_turn" or cache is None or not tracked.may_match:
            return
        chunks = tuple(cache.index.match(tracked.hasher.hashes))
        if chunks:
            self._orders.prefetches.append(PrefetchOrder(tracked.request.request_id, chunks))

    def _unpin(self, tracked: _Tracked) -> None:
        if tracked.pins is not None:
            tracked.pins.close()
            tracked.pins = None

    # ---- what the workers report -----------------------------------------------------------------------------------

    def reported(self, output: KVConnectorOutput) -> None:
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._take_report(report)
        for request_id in output.failed_recving or ():
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                tracked.may_match = False
                # What is computed instead is stored again, as far as the index does not (or no longer) name it.
                first = -(-tracked.local_tokens // self._settings.chunk_tokens)
                self._go_on_at(tracked, min(tracked.next_chunk, first))
                self._unpin(tracked)
            self.counters.add(failed_loads=1)

    def _take_report(self, report: WorkerReport) -> None:
        cache = self._cache
        if report.off is not None:
            self.turn_off(report.off)
        if self._extents is not None and cache is not None:
            for part in report.stored:
                self._extents.stored(cache, part)
            for lost in report.failed:
                self._extents.failed(lost)
        if report.loads_done:
            self._pause_s = _PAUSE_FIRST_S
        said: set[str] = set()
        for bad in report.bad:
            if bad.request_id not in said:  # one line a request, whatever else of it failed
                said.add(bad.request_id)
                logger.warning("load failed, the engine computes instead: %s", bad.message)
            if bad.unusable and cache is not None:
                cache.damage.report(ExtentName.parse(bad.extent), bad.message)
            elif not bad.unusable:
                self._pause()

    def _pause(self) -> None:
        now = self._clock()
        if now >= self._paused_until_s:
            self._paused_until_s, self._pause_s = now + self._pause_s, min(2 * self._pause_s, _PAUSE_MOST_S)

    # ---- life ------------------------------------------------------------------------------------------------------

    def busy(self) -> bool:
        """Orders not sent or parts not reported: the engine must keep stepping, until the store deadline at most."""
        return bool(self._orders.uploads) or (self._extents is not None and self._extents.busy())

    def fail_load(self, request_id: str) -> None:
        """A load that vLLM waits for cannot be ordered: have the workers report it failed."""
        self._orders.fail.append(request_id)

    def failed_orders(self) -> StepOrders:
        """After an error of ours: every load ordered and not yet sent fails, so that no request waits for ever."""
        orders, self._orders = self._orders, StepOrders()
        if self._extents is not None:
            self._extents.give_up_orders(orders)
        return StepOrders(
            fail=[order.request_id for order in orders.loads] + orders.fail,
            discard=[upload.staging for upload in orders.uploads] + orders.discard,
            forget=orders.forget,
        )

    def turn_off(self, why: str) -> None:
        """Match and store nothing any more, until the engine is started again."""
        if self._off:
            return
        self._off = True
        logger.warning("LMCache-S3 is off until the engine is started again: %s", why)
        for tracked in self._tracked.values():
            self._unpin(tracked)
            if tracked.growing is not None:
                self._orders.discard.append(tracked.growing.staging)
        self._tracked.clear()
        self._queue.clear()

    def reset(self) -> None:
        """The engine's weights may have changed, in its memory and not in the files that we know them by."""
        self.turn_off("its cache was reset, so its weights may be others than those in the model's files")

    def write_stats(self) -> None:
        facts: dict[str, Any] = {"ready": self._cache is not None}
        facts |= self._extents.counts() if self._extents is not None else {}
        facts["committed_extents"] = self.counters.total("stored_extents")
        if self._cache is not None:
            facts.update(self._cache.facts())
        self.counters.write(facts)

    def close(self, timeout_s: float) -> None:
        """Commits under way get `timeout_s` to end; what is not committed then is an orphan for garbage collection."""
        begin = time.monotonic()
        end = begin + timeout_s
        if self._extents is not None:
            self._extents.drain(timeout_s)
        if self._cache is not None:
            self._cache.close(max(0.1, end - time.monotonic()))
        self._opening.close()
        self.write_stats()
        logger.info("scheduler role closed in %.2f s", time.monotonic() - begin)
