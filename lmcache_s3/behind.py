"""Write-behind for `Cache`: chunks rest, encoded, and go up together on a background thread.

The plan says what goes up when (`write_behind.py`), the transfer holds the cells and joins them, the publisher commits.
What rests is matched and loaded like what is stored, by this process alone. Raises nothing of its own; what goes wrong
is in the futures, and what could not be uploaded rests no more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from lmcache_s3.errors import Unavailable
from lmcache_s3.index.service import Index, Verdict
from lmcache_s3.publish import Publisher
from lmcache_s3.resting import RestingIndex
from lmcache_s3.transfer import Transfer
from lmcache_s3.types import ChunkRef, ExtentName, ExtentRecord, Grid
from lmcache_s3.write_behind import Run, WriteBehind


@dataclass
class _Part:
    """Chunks that one store laid to rest. left: how many of them are not judged yet. void: some came too late. judged:
    the store was told."""

    left: int
    verdict: Future[Verdict]
    void: bool = False
    judged: bool = False


class Behind:
    """One background thread. Thread-safe. clock: seconds, for the plan."""

    def __init__(
        self,
        transfer: Transfer,
        publisher: Publisher,
        index: Index,
        grid: Grid,
        plan: WriteBehind,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transfer, self._publisher, self._index, self._grid = transfer, publisher, index, grid
        self._plan, self._clock = plan, clock
        self._resting = RestingIndex()
        self._changed = threading.Condition()
        self._waiting: dict[bytes, list[_Part]] = {}
        """By prefix hash: who waits for its verdict."""
        self._flush = self._closing = False
        self._thread = threading.Thread(target=self._run, name="lmcache-s3-behind", daemon=True)
        self._thread.start()

    # ---- what rests --------------------------------------------------------------------------------------------------

    def rest(self, record: ExtentRecord) -> Future[Verdict]:
        """The cells of a provisional extent rest in the transfer now; done when all its chunks are judged."""
        hashes = list(record.chunk_hashes())
        part = _Part(len(hashes), Future())
        part.verdict.set_running_or_notify_cancel()
        with self._changed:
            if self._closing:
                part.verdict.set_exception(Unavailable("the cache is closed", kind="closed"))
                return part.verdict
            chunk_bytes = record.encoded_bytes // len(hashes)
            run = Run(record.parent, [], 0, self._clock())
            for prefix_hash in hashes:  # another store may have laid some to rest meanwhile
                if prefix_hash not in self._waiting:
                    run.hashes.append(prefix_hash)
                if prefix_hash in self._waiting or prefix_hash == hashes[-1]:
                    self._plan.add(run.parent, run.hashes, chunk_bytes * len(run.hashes), run.since_s)
                    run = Run(prefix_hash, [], 0, run.since_s)
                self._waiting.setdefault(prefix_hash, []).append(part)
            self._resting.add(record)
            self._changed.notify_all()
        self._tidy()
        return part.verdict

    def match(self, hashes: Sequence[bytes]) -> Sequence[ChunkRef]:
        """The longest prefix of what is stored and what rests. No I/O."""
        return self._resting.match(hashes, self._index.match, self._index.find)

    def verdicts(self, hashes: Sequence[bytes]) -> list[Future[Verdict]]:
        """What those of these chunks that rest wait for; none for what does not."""
        with self._changed:
            waiting = [self._waiting[one][-1] for one in hashes if one in self._waiting]
        return list({id(part): part.verdict for part in waiting}.values())

    def current(self, chunks: Sequence[ChunkRef]) -> tuple[ChunkRef, ...]:
        """Where these chunks, matched some time ago, are now: what rested then may have been uploaded since."""
        rested = [self._resting.find(ref.prefix_hash) for ref in chunks]  # first: from here chunks go to the index
        stored = self._index.match([ref.prefix_hash for ref in chunks])  # at once: they share their extents' records
        now = []
        for i, (ref, there) in enumerate(zip(chunks, rested, strict=True)):
            now.append(there or (stored[i] if i < len(stored) else self._index.find(ref.prefix_hash)) or ref)
        return tuple(now)

    def hold(self, chunks: Sequence[ChunkRef]) -> Callable[[], None]:
        """Keeps what rests among these until the answer is called."""
        context = self._resting.reading(chunks)
        context.__enter__()

        def release() -> None:
            context.__exit__(None, None, None)
            self._tidy()

        return release

    def _tidy(self) -> None:
        self._transfer.forget_rested(self._resting.take_idle())

    # ---- going up ----------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Have all that rests go up now."""
        with self._changed:
            self._flush = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._flush and not self._closing:
                    due_s = self._plan.next_due_s
                    runs = self._plan.due(self._clock())
                    if runs:
                        break
                    self._changed.wait(None if due_s is None else max(0.0, due_s - self._clock()))
                else:
                    runs = self._plan.flush()
                self._flush = False
                if self._closing and not runs:
                    return
            for run in runs:
                try:
                    self._upload(run)
                except Exception as e:  # noqa: BLE001 - whatever it is, what rests next must go up
                    self._judged(run.hashes, e)

    def _upload(self, run: Run) -> None:
        geometry, grid = self._transfer.geometry, self._grid
        chunks = self._resting.refs(run.hashes)
        first_token = chunks[0].extent.first_token + chunks[0].position * geometry.chunk_tokens
        name = ExtentName.fresh(run.hashes[-1], len(run.hashes), self._transfer.codec.id, self._index.version)
        uploads = [self._transfer.upload_rested(name, grid, shard, first_token, chunks) for shard in range(grid.shards)]
        shards = [upload.result() for upload in uploads]
        raw_bytes = geometry.chunk_bytes * len(run.hashes)
        verdict = self._publisher.publish(name, grid, run.parent, first_token, b"".join(run.hashes), raw_bytes, shards)
        verdict.add_done_callback(lambda done: self._judged(run.hashes, done.exception() or done.result()))

    def _judged(self, hashes: Sequence[bytes], outcome: Verdict | BaseException) -> None:
        """These chunks are committed, or given up. A store that failed in part has failed, one of which a part came too
        late came too late."""
        done = []
        with self._changed:  # at once, or a store in between would lay to rest what nobody would ever upload
            self._resting.uploaded(hashes)
            for part in [part for one in hashes for part in self._waiting.pop(one, ())]:
                part.left -= 1
                part.void = part.void or outcome is Verdict.VOID
                if not part.judged and (not part.left or isinstance(outcome, BaseException)):
                    part.judged = True
                    done.append(part)
            self._changed.notify_all()
        self._tidy()
        for part in done:
            if isinstance(outcome, BaseException):
                part.verdict.set_exception(outcome)
            else:
                part.verdict.set_result(Verdict.VOID if part.void else outcome)

    def close(self, timeout_s: float) -> None:
        """Upload what rests; what is not committed in time fails with `Unavailable(closed)`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting, timeout_s)
            left = list(self._waiting)
        self._judged(left, Unavailable("closed before what rested was uploaded", kind="closed"))
