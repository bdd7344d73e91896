"""`Index`: one process's view of a space's manifest, kept up to date and changed in the background.

Look-ups read the published replica: no I/O, no locks. One background thread drives a `Follower`: it looks at the log
every `poll_s` seconds, and what is queued goes the cheapest way as soon as that allows, everything waiting in one
version or hand-over. Whatever goes wrong there is counted, kept as `stats().last_error`, logged once per kind of error,
and tried again after a growing pause; what was queued stays queued, so nothing is lost while the process lives.
Invariants: a future of `commit` resolves only when a confirmed state judges it; a read-only index writes nothing.
Raises from `open`: `Unavailable`, `Invalid` (store), `Unsafe` (probe, foreign space), `Unusable` (unreadable log).
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ulid import ULID

from lmcache_s3.errors import Bug, Invalid, LMCacheS3Error, Unavailable, Unusable
from lmcache_s3.index.change import Change
from lmcache_s3.index.courtesy import be_courteous
from lmcache_s3.index.follower import Follower, Pacing
from lmcache_s3.index.log import CHECKPOINT_EVERY, Log, LogLimits
from lmcache_s3.index.manifest import MAX_VERSION_BYTES, LiveExtent, State, Verdict, check_record
from lmcache_s3.index.probe import ProbeReport, probe
from lmcache_s3.index.space_file import ensure_space
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import ChunkRef, ExtentName, ExtentRecord

if TYPE_CHECKING:
    from lmcache_s3.identity import Space

__all__ = ["Index", "IndexSettings", "IndexStats", "LiveExtent", "Verdict"]

_log = logging.getLogger("lmcache_s3.index")
_LONGEST_PAUSE_S = 5.0
"""While closing."""


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """poll_s: pause between looks at the log; an idle poll is one GET ($0.018 a day at 2 s on S3), and others' stores
    become visible that much later. hand_over_s: pause between hand-overs while the log names a leader; each is one PUT,
    and less than a poll makes others see it hardly sooner. merge_s: pause between a leader's rounds, each a LIST, a PUT
    and 3 GETs. access_s: how often hits are told to all, for eviction; a name in a delta each time.
    read_only: never writes. single_writer: skips the probe; corrupts the index of a store without put-if-absent if two
    engines write. checkpoint_every: versions between checkpoints; more make a cold start slower, fewer cost PUTs.
    max_pending: queued commits, beyond which new ones are refused. read_ahead: parallel GETs while catching up on a
    long past. merge_parallel: parallel GETs and DELETEs of a leader, whose threads start only when it leads."""

    poll_s: float = 2.0
    hand_over_s: float = 2.0
    merge_s: float = 1.0
    access_s: float = 3600.0
    read_only: bool = False
    single_writer: bool = False
    checkpoint_every: int = CHECKPOINT_EVERY
    max_commit_attempts: int = 16
    max_pending: int = 4096
    read_ahead: int = 8
    merge_parallel: int = 32

    def __post_init__(self) -> None:
        self.pacing()
        for name in ("checkpoint_every", "max_commit_attempts", "max_pending", "read_ahead", "merge_parallel"):
            if getattr(self, name) < 1:
                raise Invalid(f"{name} is {getattr(self, name)}: at least 1", kind="setting", key=name)

    def pacing(self) -> Pacing:
        return Pacing(self.poll_s, self.hand_over_s, self.merge_s, self.access_s, writes=not self.read_only)


@dataclass(frozen=True, slots=True)
class IndexStats:
    """Now: version, floor, extents, chunks, pending (changes that nobody judged yet), hand_overs (of these in the
    inbox, in so many objects), hidden, pinned, lag_s (since the last successful look at the log), leader (ULID that the
    log names), leads (it is this process), versions_per_s (of all writers, over the last 10 s).
    Since start: the rest. contention: which part of this process's creates was lost to others, 0…1. handed_over: inbox
    objects put; taken_back: of these committed directly later on. merged: inbox objects merged by this process. junk:
    inbox objects it found unreadable. accesses: hits waiting to be told. errors: failed background rounds by kind."""

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
    hand_overs: int
    leader: str | None
    leads: bool
    versions_per_s: float
    contention: float
    handed_over: int
    taken_back: int
    merged: int
    junk: int
    accesses: int
    errors: dict[str, int]
    last_error: str | None


class Index:
    """Thread-safe. Made by `open`; close it to drain what is queued."""

    def __init__(
        self,
        follower: Follower,
        settings: IndexSettings,
        *,
        stopped: threading.Event,
        pools: Sequence[ThreadPoolExecutor] = (),
        probed: ProbeReport | None = None,
    ) -> None:
        """stopped: the event whose `wait` is the log's sleep. pools: to be shut down with the index."""
        self.probed = probed
        self._follower, self._settings, self._pools = follower, settings, pools
        self._log, self._clock = follower.log, follower.log.clock
        self._replica = self._log.replica
        self._turn = threading.RLock()
        """Held while the log moves: one role, one thread at a time."""
        self._wake = threading.Condition()
        """Guards the next two; never held while anything waits for the store."""
        self._submitted = False
        """Something new since the thread last asked what is due."""
        self._closing = False
        self._stopped = stopped
        self._verdicts: Counter[Verdict] = Counter()
        self._removed = 0
        self._errors: Counter[str] = Counter()
        self._last_error: str | None = None
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
        merging = ThreadPoolExecutor(settings.merge_parallel, "lmcache-s3-merge")
        pools = [pool for pool in (readers, merging) if pool is not None]
        stopping = threading.Event()
        rng = rng or random.Random(secrets.randbits(64))
        log = Log(
            store,
            space.id,
            writer=str(ULID()),
            sleep=stopping.wait,
            rng=rng,
            nonce=lambda: secrets.token_hex(16),
            limits=limits
            or LogLimits(
                checkpoint_every=settings.checkpoint_every,
                max_commit_attempts=settings.max_commit_attempts,
                read_ahead=settings.read_ahead,
            ),
            readers=readers,
            clock=clock,
        )
        try:
            log.open()
        except LMCacheS3Error:
            for pool in pools:
                pool.shutdown()
            raise
        follower = Follower(log, settings.pacing(), rng=rng, ulid=lambda: str(ULID()), executor=merging)
        index = cls(follower, settings, stopped=stopping, pools=pools, probed=probed)
        if background:
            index._thread = threading.Thread(target=index._run, name="lmcache-s3-index", daemon=True)
            index._thread.start()
        return index

    # ---- look-ups: no I/O -------------------------------------------------------------------------------------------

    @property
    def space_id(self) -> str:
        return self._log.space_id

    @property
    def state(self) -> State:
        """The newest published state: one version, a snapshot for as long as it is held."""
        return self._replica.state

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
            with suppress(InvalidStateError):  # failed by close
                future.set_result(verdicts)
                self._verdicts.update(verdicts)

        try:
            for record in records:
                check_record(record)
            self._submit(Change(add=tuple(records)), done, future)
        except LMCacheS3Error as e:
            future.set_exception(e)
        return future

    def remove(self, names: Sequence[ExtentName], *, why: str) -> Future[None]:
        """Take extents out of the index for everybody (damaged, or evicted); `why` is logged. Hides them at once."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()

        def done(_: list[Verdict]) -> None:
            with suppress(InvalidStateError):
                future.set_result(None)
                self._removed += len(names)

        for name in names:
            self.hide(name)
            _log.warning("removing extent %s from the index: %s", name, why)
        try:
            self._submit(Change(remove=tuple(names)), done, future)
        except LMCacheS3Error as e:
            future.set_exception(e)
        return future

    def touch(self, names: Iterable[ExtentName]) -> None:
        """These extents were loaded just now: told to all about once an `access_s`, for eviction by last access. No
        I/O; microseconds."""
        self._follower.touch(names)

    def sync(self) -> int:
        """Catch up with the log now, in the caller's thread; returns the version. Raises what went wrong."""
        with self._turn:
            self._follower.poll()
            return self.version

    def checkpoint(self) -> int:
        """Write a checkpoint of the replica now; returns its version."""
        self._check_writable()
        with self._turn:
            return self._log.checkpoint()

    def stats(self) -> IndexStats:
        state, counters, follower = self._replica.state, self._log.counters, self._follower
        return IndexStats(
            version=state.version,
            floor=state.floor,
            extents=len(state.extents),
            chunks=state.n_chunks,
            pending=follower.pending,
            hidden=len(self._replica.hidden),
            pinned=len(self._replica.pinned()),
            lag_s=max(0.0, self._clock() - follower.seen_s),
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
            hand_overs=len(follower.hand_overs),
            leader=state.lead,
            leads=follower.leader.leads,
            versions_per_s=self._log.rate.per_s(),
            contention=counters.contention,
            handed_over=follower.hand_overs.handed_over,
            taken_back=follower.hand_overs.taken_back,
            merged=follower.inbox.counters.merged,
            junk=follower.inbox.counters.junk,
            accesses=follower.access.gathered,
            errors=dict(self._errors),
            last_error=self._last_error,
        )

    def close(self, timeout_s: float = 5.0) -> None:
        """Commit what is queued or handed over directly, within the time, and step down if this process leads; the rest
        then fails with `Unavailable(closed)`. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(0.5)
        self._follower.fail_all(
            Unavailable(f"index closed before the commit was done ({self._last_error})", kind="closed")
        )
        for pool in self._pools:
            pool.shutdown(wait=False)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- the background thread ---------------------------------------------------------------------------------------

    def _check_writable(self) -> None:
        if self._settings.read_only:
            raise Invalid("the index was opened read_only: nothing can be committed", kind="setting", key="read_only")

    def _submit(self, change: Change, done: Callable[[list[Verdict]], None], future: Future[Any]) -> None:
        self._check_writable()
        if change.size_bytes > MAX_VERSION_BYTES:
            raise Unusable(f"{change.size_bytes} bytes of extents in one call: divide them", kind="oversized")

        def failed(error: BaseException) -> None:
            with suppress(InvalidStateError):
                future.set_exception(error)

        with self._wake:
            if self._closing:
                raise Unavailable("the index is closed", kind="closed")
            if self._follower.pending >= self._settings.max_pending:
                raise Unavailable(f"{self._follower.pending} commits are waiting already", kind="full")
            self._follower.submit(change, done, failed)
            self._submitted = True
            self._wake.notify_all()
        if self._thread is None:
            self._drain()

    def _drain(self) -> None:
        """Without a thread: commit in the caller's; what fails is reported through its future."""
        with self._turn:
            try:
                while not self._follower.drain(closing=False):
                    pass
            except LMCacheS3Error as e:
                self._note(e)
                self._follower.fail_all(e)

    def _run(self) -> None:
        be_courteous()
        try:
            while self._wait():
                try:
                    with self._turn:
                        self._follower.step()
                except LMCacheS3Error as e:
                    self._note(e)
            self._finish()
        finally:
            if not self._closing:
                self._last_error = "the index's thread ended unexpectedly; its traceback was printed"
                self._closing = True
                self._follower.fail_all(Bug(self._last_error))

    def _wait(self) -> bool:
        """Until something is due; False: closing."""
        while True:
            with self._turn:
                left_s = self._follower.due_s() - self._clock()
            with self._wake:
                if self._closing:
                    return False
                if left_s <= 0:
                    return True
                if not self._submitted:
                    self._wake.wait(left_s)
                self._submitted = False

    def _finish(self) -> None:
        """Closing: nothing more is waited for or handed over."""
        failures = 0
        while not self._stopped.is_set():
            try:
                with self._turn:
                    if self._follower.drain():
                        return
                failures = 0
            except LMCacheS3Error as e:
                self._note(e)
                failures += 1
                self._stopped.wait(self._log.rng.uniform(0.05, min(_LONGEST_PAUSE_S, 0.1 * 2.0 ** min(failures, 10))))

    def _note(self, error: LMCacheS3Error) -> None:
        first = error.kind not in self._errors
        self._errors[error.kind] += 1
        self._last_error = str(error)
        if first:
            _log.warning("index %s…: %s (kind %s; reported once, will retry)", self.space_id[:12], error, error.kind)
