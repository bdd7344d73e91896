"""`Index`: one process's view of a space's manifest, kept up to date and committed to in the background.

Look-ups read the published replica: no I/O, no locks. One background thread polls the log every `poll_s` seconds and
commits what is queued as soon as it is queued, everything waiting in one version (group commit). Whatever goes wrong
there is counted, kept as `stats().last_error`, logged once per kind of error, and tried again after a growing pause;
what was queued stays queued, so nothing is lost while the process lives.
Invariants: a future of `commit` resolves only after the fence check; a read-only index writes nothing.
Raises from `open`: `Unavailable`, `Invalid` (store), `Unsafe` (probe, foreign space), `Unusable` (unreadable log).
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ulid import ULID

from lmcache_s3.errors import Bug, Invalid, LMCacheS3Error, Unavailable
from lmcache_s3.index.log import CHECKPOINT_EVERY, Log, LogLimits
from lmcache_s3.index.manifest import LiveExtent, Verdict, check_record, record_size
from lmcache_s3.index.probe import ProbeReport, probe
from lmcache_s3.index.space_file import ensure_space
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import ChunkRef, ExtentName, ExtentRecord

if TYPE_CHECKING:
    from lmcache_s3.identity import Space

__all__ = ["Index", "IndexSettings", "IndexStats", "LiveExtent", "Verdict"]

_log = logging.getLogger("lmcache_s3.index")
_MAX_GROUP_BYTES = 4 * 2**20
"""A version takes queued commits up to about this size (and always at least one)."""
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """poll_s: pause between looks at the log; an idle poll is one GET ($0.018 a day at 2 s on S3), and others' stores
    become visible that much later. read_only: never writes. single_writer: skips the probe; corrupts the index of a
    store without put-if-absent if two engines write. checkpoint_every: versions between checkpoints; more make a cold
    start slower, fewer cost PUTs. max_pending: queued commits, beyond which new ones are refused. read_ahead: parallel
    GETs while catching up on a long past."""

    poll_s: float = 2.0
    read_only: bool = False
    single_writer: bool = False
    checkpoint_every: int = CHECKPOINT_EVERY
    max_commit_attempts: int = 16
    max_pending: int = 4096
    read_ahead: int = 8

    def __post_init__(self) -> None:
        if self.poll_s <= 0:
            raise Invalid(f"poll_s is {self.poll_s}: a pause in seconds, above 0", kind="setting", key="poll_s")
        for name in ("checkpoint_every", "max_commit_attempts", "max_pending", "read_ahead"):
            if getattr(self, name) < 1:
                raise Invalid(f"{name} is {getattr(self, name)}: at least 1", kind="setting", key=name)


@dataclass(frozen=True, slots=True)
class IndexStats:
    """Now: version, floor, extents, chunks, pending (queued commits), hidden, pinned, lag_s (since the last successful
    look at the log). Since start: the rest. errors: failed background rounds by kind."""

    version: int
    floor: int
    extents: int
    chunks: int
    pending: int
    hidden: int
    pinned: int
    lag_s: float
    polls: int
    versions_read: int
    commits: int
    conflicts: int
    unknown: int
    fenced: int
    live: int
    void: int
    covered: int
    removed: int
    checkpoints: int
    errors: dict[str, int]
    last_error: str | None


@dataclass(slots=True)
class _Pending:
    """One call of `commit` or `remove`, waiting for its version."""

    add: tuple[ExtentRecord, ...]
    remove: tuple[ExtentName, ...]
    done: Callable[[list[Verdict]], None]
    failed: Callable[[BaseException], None]

    @property
    def size_bytes(self) -> int:
        return sum(map(record_size, self.add)) + 256 * len(self.remove)


class Index:
    """Thread-safe. Made by `open`; close it to drain what is queued."""

    def __init__(
        self,
        log: Log,
        settings: IndexSettings,
        *,
        probed: ProbeReport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.probed = probed
        self._log, self._settings, self._clock = log, settings, clock
        self._replica = log.replica
        self._turn = threading.RLock()
        """Held while the log moves: one role, one thread at a time."""
        self._wake = threading.Condition()
        """Guards the queue and what follows."""
        self._queue: deque[_Pending] = deque()
        self._closing = False
        self._stopped = threading.Event()
        self._verdicts: Counter[Verdict] = Counter()
        self._removed = 0
        self._errors: Counter[str] = Counter()
        self._last_error: str | None = None
        self._failures = 0
        self._seen_s = clock()
        self._thread: threading.Thread | None = None

    @classmethod
    def open(
        cls,
        store: ObjectStore,
        space: Space,
        *,
        settings: IndexSettings = IndexSettings(),
        background: bool = True,
        limits: LogLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> Index:
        """Check the space's file, probe the store, load the newest checkpoint and catch up; then follow the log.

        `background=False`: no thread; `commit` and `sync` work in the caller's. `limits` are for tests.
        """
        ensure_space(store, space, read_only=settings.read_only)
        probed = None if settings.read_only or settings.single_writer else probe(store, "")
        readers = ThreadPoolExecutor(settings.read_ahead, "lmcache-s3-read") if settings.read_ahead > 1 else None
        stopping = threading.Event()
        log = Log(
            store,
            space.id,
            writer=str(ULID()),
            sleep=stopping.wait,
            rng=rng or random.Random(secrets.randbits(64)),
            nonce=lambda: secrets.token_hex(16),
            limits=limits
            or LogLimits(
                checkpoint_every=settings.checkpoint_every,
                max_commit_attempts=settings.max_commit_attempts,
                read_ahead=settings.read_ahead,
            ),
            readers=readers,
        )
        index = cls(log, settings, probed=probed, clock=clock)
        index._stopped = stopping
        try:
            log.open()
        except LMCacheS3Error:
            if readers is not None:
                readers.shutdown()
            raise
        index._seen_s = clock()
        if background:
            index._thread = threading.Thread(target=index._run, name="lmcache-s3-index", daemon=True)
            index._thread.start()
        return index

    # ---- look-ups: no I/O -------------------------------------------------------------------------------------------

    @property
    def space_id(self) -> str:
        return self._log.space_id

    @property
    def version(self) -> int:
        """The replica's version: `born` of extents named now."""
        return self._replica.state.version

    @property
    def floor(self) -> int:
        return self._replica.state.floor

    def match(self, hashes: Sequence[bytes]) -> Sequence[ChunkRef]:
        """The longest known run of chunks from the first hash (16 bytes each) on, without hidden extents."""
        return self._replica.match(hashes)

    def find(self, prefix_hash: bytes) -> ChunkRef | None:
        return self._replica.find(prefix_hash)

    def extents(self) -> Iterator[LiveExtent]:
        """Live extents of one consistent version, in the order of their first add."""
        return self._replica.state.in_order()

    def hide(self, name: ExtentName) -> None:
        """This process stops matching the extent at once (it was found damaged)."""
        self._replica.hide(name)

    def show(self, name: ExtentName) -> None:
        """Take back `hide`: the extent proved right after all."""
        self._replica.show(name)

    def pin(self, names: Iterable[ExtentName]) -> AbstractContextManager[None]:
        """Counts the extents as in use here while the context lasts."""
        return self._replica.pin(names)

    # ---- changes ----------------------------------------------------------------------------------------------------

    def commit(self, records: Sequence[ExtentRecord]) -> Future[list[Verdict]]:
        """Add extents whose objects are durable; a verdict each, once a version is confirmed that judges them.

        Never blocks on I/O (except with `background=False`). The future fails with `Invalid` (read-only), `Unusable` (a
        record beyond the format's bounds), `Unavailable` (too many queued, or closed before it was done).
        """
        future: Future[list[Verdict]] = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled: the extents may be committed already

        def done(verdicts: list[Verdict]) -> None:
            self._verdicts.update(verdicts)
            future.set_result(verdicts)

        try:
            for record in records:
                check_record(record)
        except LMCacheS3Error as e:
            future.set_exception(e)
            return future
        self._submit(_Pending(tuple(records), (), done, future.set_exception))
        return future

    def remove(self, names: Sequence[ExtentName], *, why: str) -> Future[None]:
        """Take extents out of the index for everybody (damaged, or evicted); `why` is logged. Hides them at once."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()

        def done(_: list[Verdict]) -> None:
            self._removed += len(names)
            future.set_result(None)

        for name in names:
            self.hide(name)
            _log.warning("removing extent %s from the index: %s", name, why)
        self._submit(_Pending((), tuple(names), done, future.set_exception))
        return future

    def sync(self) -> int:
        """Catch up with the log now, in the caller's thread; returns the version. Raises what went wrong."""
        with self._turn:
            self._log.sync()
            self._seen_s = self._clock()
            return self.version

    def checkpoint(self) -> int:
        """Write a checkpoint of the replica now; returns its version."""
        self._check_writable()
        with self._turn:
            return self._log.checkpoint()

    def stats(self) -> IndexStats:
        state, counters = self._replica.state, self._log.counters
        return IndexStats(
            version=state.version,
            floor=state.floor,
            extents=len(state.extents),
            chunks=len(state.chunks),
            pending=len(self._queue),
            hidden=len(self._replica.hidden),
            pinned=len(self._replica.pinned()),
            lag_s=max(0.0, self._clock() - self._seen_s),
            polls=counters.polls,
            versions_read=counters.versions_read,
            commits=counters.commits,
            conflicts=counters.lost,
            unknown=counters.unknown,
            fenced=counters.fenced,
            live=self._verdicts[Verdict.LIVE],
            void=self._verdicts[Verdict.VOID],
            covered=self._verdicts[Verdict.COVERED],
            removed=self._removed,
            checkpoints=counters.checkpoints,
            errors=dict(self._errors),
            last_error=self._last_error,
        )

    def close(self, timeout_s: float = 5.0) -> None:
        """Commit what is queued, within the time; the rest then fails with `Unavailable(closed)`. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(0.5)
        self._fail_pending(Unavailable(f"index closed before the commit was done ({self._last_error})", kind="closed"))
        if self._log.readers is not None:
            self._log.readers.shutdown(wait=False)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- the background thread ---------------------------------------------------------------------------------------

    def _check_writable(self) -> None:
        if self._settings.read_only:
            raise Invalid("the index was opened read_only: nothing can be committed", kind="setting", key="read_only")

    def _submit(self, pending: _Pending) -> None:
        error: LMCacheS3Error | None = None
        with self._wake:
            if self._settings.read_only:
                error = Invalid("the index is read_only: nothing can be committed", kind="setting", key="read_only")
            elif self._closing:
                error = Unavailable("the index is closed", kind="closed")
            elif len(self._queue) >= self._settings.max_pending:
                error = Unavailable(f"{len(self._queue)} commits are waiting already", kind="full")
            else:
                self._queue.append(pending)
                self._wake.notify_all()
        if error is not None:
            pending.failed(error)
        elif self._thread is None:
            self._drain()

    def _drain(self) -> None:
        """Without a thread: commit in the caller's; what fails is reported through its future."""
        try:
            with self._turn:
                while self._commit_group():
                    pass
        except LMCacheS3Error as e:
            self._note(e)
            self._fail_pending(e)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._wait()
                try:
                    if not self._commit_group():
                        if self._closing:
                            break
                        self.sync()
                    self._failures = 0
                except LMCacheS3Error as e:
                    self._note(e)
                    if self._stopped.wait(self._pause_s()):
                        break
        finally:
            if not self._closing:
                self._last_error = "the index's thread ended unexpectedly; its traceback was printed"
                self._closing = True
                self._fail_pending(Bug(self._last_error))

    def _wait(self) -> None:
        """Until something is queued, the index closes, or a poll is due (each its own moment: instances spread out)."""
        with self._wake:
            due_s = self._settings.poll_s * self._log.rng.uniform(0.9, 1.1)
            self._wake.wait_for(lambda: bool(self._queue) or self._closing, timeout=due_s)

    def _pause_s(self) -> float:
        self._failures += 1
        base_s = 0.1 if self._queue else self._settings.poll_s
        longest_s = min(_LONGEST_PAUSE_S, base_s * 2.0 ** min(self._failures, 30))
        return self._log.rng.uniform(longest_s / 2, longest_s)

    def _commit_group(self) -> bool:
        """Commit what is queued, as one version; whether there was anything. On errors all of it stays queued."""
        group: list[_Pending] = []
        size_bytes = 0
        for pending in list(self._queue):
            size_bytes += pending.size_bytes
            if group and size_bytes > _MAX_GROUP_BYTES:
                break
            group.append(pending)
        if not group:
            return False
        with self._turn:
            add = [record for pending in group for record in pending.add]
            verdicts = self._log.commit(add, [name for pending in group for name in pending.remove])
            self._seen_s = self._clock()
        with self._wake:  # close may have failed them meanwhile
            waiting = set(map(id, self._queue))
            ours = set(map(id, group))
            self._queue = deque(pending for pending in self._queue if id(pending) not in ours)
        for pending in group:
            if id(pending) in waiting:
                pending.done(verdicts[: len(pending.add)])
            verdicts = verdicts[len(pending.add) :]
        with self._turn:
            try:
                self._log.checkpoint_if_due()
            except LMCacheS3Error as e:  # the commit stands; the next committer writes the checkpoint
                self._note(e)
        return True

    def _fail_pending(self, error: LMCacheS3Error) -> None:
        with self._wake:
            left = list(self._queue)
            self._queue.clear()
        for pending in left:
            pending.failed(error)

    def _note(self, error: LMCacheS3Error) -> None:
        first = error.kind not in self._errors
        self._errors[error.kind] += 1
        self._last_error = str(error)
        if first:
            _log.warning("index %s…: %s (kind %s; reported once, will retry)", self.space_id[:12], error, error.kind)
