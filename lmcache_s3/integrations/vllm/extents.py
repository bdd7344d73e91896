"""Extents of one engine from gathering to commit: uploads ordered, shards reported, commits, and what rests before.

    gathered ─▶ uploading ─────────────────────────────────▶ publishing ─▶ committed
          └───▶ going to rest ─▶ resting ─ due ─▶ uploading ──▲             (write-behind only)

Part of the scheduler role. A chunk is *pending* from its gathering until the step after its extent is committed or
given up: nobody gathers it again. Commits are acknowledged on background threads; all else happens on the scheduler's.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.errors import LMCacheS3Error
from lmcache_s3.index.service import Verdict
from lmcache_s3.integrations.vllm.metadata import FailedPart, RestedOrder, StepOrders, StoredPart, UploadOrder
from lmcache_s3.integrations.vllm.model import ModelFacts
from lmcache_s3.integrations.vllm.opening import OpenCache
from lmcache_s3.integrations.vllm.stats import Counters
from lmcache_s3.publish import make_record
from lmcache_s3.resting import RestingIndex
from lmcache_s3.types import HASH_BYTES, ChunkRef, ExtentName, Grid
from lmcache_s3.uploading import StoredShard
from lmcache_s3.write_behind import PRESSURE, Run, WriteBehind

logger = logging.getLogger("lmcache_s3.vllm")


@dataclass
class _Uploading:
    """An extent the workers are storing, or laying to rest; shards arrive across steps."""

    name: ExtentName
    grid: Grid
    parent: bytes
    first_token: int
    hashes: bytes
    deadline_s: float
    to_rest: bool
    shards: dict[int, StoredShard] = field(default_factory=dict)


def _each(hashes: bytes) -> list[bytes]:
    return [hashes[i : i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)]


class Extents:
    """grid: how this engine divides chunks. extent_bytes: of an extent at most. on_settled: called whenever an
    extent is committed or given up, from any thread."""

    def __init__(
        self,
        facts: ModelFacts,
        codec: KVCodec,
        grid: Grid,
        counters: Counters,
        *,
        chunk_tokens: int,
        extent_bytes: int,
        store_deadline_s: float,
        write_behind_s: float,
        write_behind_bytes: int,
        clock: Callable[[], float],
        on_settled: Callable[[], None],
    ) -> None:
        self._facts, self._codec, self._grid, self._counters = facts, codec, grid, counters
        self._chunk_tokens = chunk_tokens
        self.extent_chunks = max(1, extent_bytes // facts.group_chunk_bytes(chunk_tokens))
        """Chunks that are gathered for one upload at most."""
        self._deadline_s, self._clock, self._on_settled = store_deadline_s, clock, on_settled
        self._uploading: dict[str, _Uploading] = {}
        self._publishing: dict[str, Future[Verdict]] = {}
        self._pending: set[bytes] = set()
        self._resting = RestingIndex()
        self._settled: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        """Hashes of extents that were committed or given up since the last step."""
        self._abandoned: dict[ExtentName, float] = {}
        """What was given up on its way to rest → until when."""
        self._all_hold = facts.writers == facts.tensor_parallel
        """Whether every rank holds what it would load of what rests: one of several with the same heads lays them to
        rest, and the others cannot read its memory."""
        self._behind: WriteBehind | None = None
        if write_behind_s > 0:
            max_bytes = int(write_behind_bytes * PRESSURE) * grid.shards  # each rank has its own memory
            self._behind = WriteBehind(extent_bytes=extent_bytes, age_s=write_behind_s, max_bytes=max_bytes)
        self._flush = False

    # ---- looking up --------------------------------------------------------------------------------------------------

    def match(self, cache: OpenCache, hashes: Sequence[bytes]) -> Sequence[ChunkRef]:
        """The longest prefix of what is stored and what rests here."""
        if not self._all_hold:
            return cache.index.match(hashes)
        return self._resting.match(hashes, cache.index.match, cache.index.find)

    def reading(self, chunks: Sequence[ChunkRef]) -> AbstractContextManager[None]:
        """Keeps what rests among these from being forgotten."""
        return self._resting.reading(chunks)

    def is_pending(self, prefix_hash: bytes) -> bool:
        return prefix_hash in self._pending

    # ---- on the way --------------------------------------------------------------------------------------------------

    def gathering(self, prefix_hash: bytes) -> None:
        self._pending.add(prefix_hash)

    def close(
        self,
        orders: StepOrders,
        cache: OpenCache,
        staging: str,
        parent: bytes,
        first_token: int,
        hashes: Sequence[bytes],
    ) -> None:
        """Gathered chunks are an extent now: order its upload, or that it rests."""
        # As many as are gathered at most are, of an exact codec, an extent's worth; coded they are fewer bytes.
        whole = self._codec.exact and len(hashes) >= self.extent_chunks
        to_rest = self._behind is not None and not whole
        begun = self._begin(cache, parent, first_token, hashes, to_rest)
        orders.uploads.append(UploadOrder(staging, begun.name, self._grid, first_token, begun.hashes, parent, to_rest))

    def _begin(
        self, cache: OpenCache, parent: bytes, first_token: int, hashes: Sequence[bytes], to_rest: bool
    ) -> _Uploading:
        """Named, born now."""
        name = ExtentName.fresh(hashes[-1], len(hashes), self._codec.id, cache.index.version)
        deadline = self._clock() + self._deadline_s
        begun = _Uploading(name, self._grid, parent, first_token, b"".join(hashes), deadline, to_rest)
        self._uploading[str(name)] = begun
        return begun

    def step(self, orders: StepOrders, cache: OpenCache | None) -> None:
        """Once a step: what rests and is due goes up, what is settled is forgotten. cache: None where nothing is to be
        stored any more."""
        self.expire()
        now = self._clock()
        if self._behind is not None:
            for run in self._behind.flush() if self._flush or cache is None else self._behind.due(now):
                if cache is not None:
                    self._upload_rested(orders, cache, run)
                else:
                    self._settle(b"".join(run.hashes))
        self._flush = False
        while not self._settled.empty():
            # Not before, and both at once: else a chunk could come to rest again under a name that goes now.
            settled = _each(self._settled.get_nowait())
            self._pending.difference_update(settled)
            self._resting.uploaded(settled)
        orders.forget += self._resting.take_idle()
        # A rank may lay its cells to rest until the deadline, though another has failed to.
        orders.forget += [name for name, deadline_s in self._abandoned.items() if now > deadline_s]
        self._abandoned = {name: deadline_s for name, deadline_s in self._abandoned.items() if now <= deadline_s}

    def _upload_rested(self, orders: StepOrders, cache: OpenCache, run: Run) -> None:
        chunks = tuple(self._resting.refs(run.hashes))
        first_token = chunks[0].extent.first_token + chunks[0].position * self._chunk_tokens
        begun = self._begin(cache, run.parent, first_token, run.hashes, to_rest=False)
        orders.rested.append(RestedOrder(begun.name, self._grid, first_token, chunks))

    def stored(self, cache: OpenCache, part: StoredPart) -> None:
        """A rank has stored a shard, or laid it to rest."""
        upload = self._uploading.get(part.name)
        if upload is None:
            return
        upload.shards[part.shard] = StoredShard(part.lengths, part.sums, part.n_bytes)
        if len(upload.shards) < upload.grid.shards:
            return
        del self._uploading[part.name]
        if upload.to_rest:
            self._rest(upload)
        else:
            self._publish(cache, upload)

    def failed(self, lost: FailedPart) -> None:
        self._give_up(lost.name, f"{lost.kind}: {lost.message}")

    def _parts(self, upload: _Uploading) -> tuple[ExtentName, Grid, bytes, int, bytes, int, list[StoredShard]]:
        """What `make_record` and `Publisher.publish` take, of an extent whose ranks have all reported."""
        raw_bytes = self._facts.group_chunk_bytes(self._chunk_tokens) * (len(upload.hashes) // HASH_BYTES)
        shards = [upload.shards[i] for i in range(upload.grid.shards)]
        return upload.name, upload.grid, upload.parent, upload.first_token, upload.hashes, raw_bytes, shards

    def _rest(self, upload: _Uploading) -> None:
        assert self._behind is not None
        self._resting.add(make_record(*self._parts(upload)))
        n_bytes = sum(shard.n_bytes for shard in upload.shards.values())
        self._behind.add(upload.parent, _each(upload.hashes), n_bytes, self._clock())
        self._counters.add(rested_chunks=upload.name.n_chunks)

    def _publish(self, cache: OpenCache, upload: _Uploading) -> None:
        name = str(upload.name)
        self._publishing[name] = future = cache.publisher.publish(*self._parts(upload))
        future.add_done_callback(lambda f: self._published(name, upload.hashes, f))

    def _published(self, name: str, hashes: bytes, future: Future[Verdict]) -> None:
        """On a background thread: the commit was acknowledged, judged void, or failed."""
        self._settle(hashes)
        error = future.exception() if not future.cancelled() else None
        if future.cancelled() or error is not None:
            self._counters.add(failed_extents=1)
            logger.warning("extent %s was not committed: %s", name, error or "shut down")
        elif future.result() is Verdict.VOID:
            self._counters.add(void_extents=1)
        else:
            self._counters.add(stored_extents=1)
        self._publishing.pop(name, None)  # counted first: whoever watches sees it in one place at least
        self._on_settled()

    def _give_up(self, name: str, why: str) -> None:
        upload = self._uploading.pop(name, None)
        if upload is not None:
            self._settle(upload.hashes)
            if upload.to_rest:
                # A rank's own time begins only after the forward.
                self._abandoned[upload.name] = upload.deadline_s + self._deadline_s
            self._counters.add(failed_extents=1)
            logger.warning("extent %s is not stored: %s", name, why)

    def _settle(self, hashes: bytes) -> None:
        self._settled.put(hashes)

    def expire(self) -> None:
        """Give up what the ranks have not reported in time."""
        now = self._clock()
        for name in [name for name, upload in self._uploading.items() if now > upload.deadline_s]:
            self._give_up(name, f"not stored within {self._deadline_s} s")

    def give_up_orders(self, orders: StepOrders) -> None:
        """Orders that will not be sent."""
        for name in [upload.name for upload in orders.uploads] + [rested.name for rested in orders.rested]:
            self._give_up(str(name), "an error of ours, see above")

    # ---- life --------------------------------------------------------------------------------------------------------

    def busy(self) -> bool:
        """Whether the engine, which has nothing else to do, must keep stepping for us. What rests then goes up: an idle
        engine's requests cost next to nothing, and without steps it would rest for ever."""
        self.expire()
        if self._behind is not None and self._behind.next_due_s is not None:
            self._flush = True
        return self._flush or bool(self._uploading)

    def counts(self) -> dict[str, int]:
        return {
            "uploading": len(self._uploading),
            "publishing": len(self._publishing),
            "resting": len(self._resting),
        }

    def drain(self, timeout_s: float) -> None:
        """Wait for commits under way; what is not committed then is an orphan for garbage collection."""
        end = time.monotonic() + timeout_s
        for future in list(self._publishing.values()):
            try:
                future.result(max(0.0, end - time.monotonic()))
            except (LMCacheS3Error, TimeoutError):
                continue
