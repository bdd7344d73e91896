"""Finishing an extent: all shards are stored, so put its `zarr.json`, then commit it to the index.

The order is that of FORMAT.md §4.4: an extent's objects are all durable before its commit begins. One background
thread, so the caller (an engine's scheduler) never waits for the store.
Raises nothing; what goes wrong is in the future: `Unavailable`, `Invalid`, `Unusable` (shards that do not add up).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.errors import LMCacheS3Error, Unavailable
from lmcache_s3.extent import array_metadata
from lmcache_s3.identity import Space
from lmcache_s3.index.service import Index, Verdict
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import ExtentName, ExtentRecord, Grid, extent_prefix
from lmcache_s3.uploading import StoredShard


class Publisher:
    """Puts metadata and commits, for one space and codec. Thread-safe.

    before_commit: called on the background thread, may block a while. An extent that replaces a damaged one is judged
    COVERED while that is live, so pass `DamageControl.settled_soon`: removals then come first.
    """

    def __init__(
        self,
        store: ObjectStore,
        index: Index,
        space: Space,
        codec: KVCodec,
        *,
        writer: str = "",
        before_commit: Callable[[], object] = lambda: None,
    ) -> None:
        self._store = store
        self._index = index
        self._space = space
        self._codec = codec
        self._writer = writer
        self._before_commit = before_commit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lmcache-s3-publish")

    def publish(
        self,
        name: ExtentName,
        grid: Grid,
        parent: bytes,
        first_token: int,
        hashes: bytes,
        raw_bytes: int,
        shards: Sequence[StoredShard],
    ) -> Future[Verdict]:
        """Never blocks. shards: one per shard of the grid, in order. The future resolves after the fence check.

        parent: 16-byte prefix hash of the chunk before (of the root for token 0). hashes: 16 bytes a chunk. The future
        cannot be cancelled: the commit may have happened.
        """
        answer: Future[Verdict] = Future()
        answer.set_running_or_notify_cancel()

        def put() -> None:
            record = make_record(name, grid, parent, first_token, hashes, raw_bytes, shards)
            document = array_metadata(
                record,
                self._space.geometry,
                self._codec,
                space_id=self._space.id,
                fidelity=self._space.fidelity,
                writer=self._writer,
            )
            self._store.put(f"{extent_prefix(self._space.id, name)}/zarr.json", document)
            self._before_commit()
            self._index.commit([record]).add_done_callback(lambda done: _pass_on(done, answer))

        try:
            step = self._thread.submit(put)
        except RuntimeError:  # the pool is shut down
            answer.set_exception(_closed())
            return answer
        step.add_done_callback(lambda done: _fail(done, answer))
        return answer

    def close(self) -> None:
        """What has not begun fails with `Unavailable(closed)`; commits under way are the index's to drain."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def make_record(
    name: ExtentName,
    grid: Grid,
    parent: bytes,
    first_token: int,
    hashes: bytes,
    raw_bytes: int,
    shards: Sequence[StoredShard],
) -> ExtentRecord:
    """The index's entry of an extent whose shards are stored. Raises `Unusable` if the parts do not add up."""
    lengths = b"".join(shard.lengths for shard in shards)
    sums = b"".join(shard.sums for shard in shards)
    return ExtentRecord(name, grid, parent, first_token, hashes, lengths, sums, raw_bytes)


def _closed() -> LMCacheS3Error:
    return Unavailable("closed before the extent was published", kind="closed")


def _fail(step: Future[None], answer: Future[Verdict]) -> None:
    error = _closed() if step.cancelled() else step.exception()
    if error is not None:
        answer.set_exception(error)


def _pass_on(done: Future[list[Verdict]], answer: Future[Verdict]) -> None:
    error = done.exception()
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(done.result()[0])
