"""The manifest protocol over an `ObjectStore`: Open, Sync, Commit, Checkpoint (FORMAT.md §4, §5).

One `Log` is one role: a replica at some version and the steps that move it. Not thread-safe: one thread at a time.
Sleep and randomness are injected; safety uses no clock.
Invariants: the published state is a prefix of the history; a version is applied, and a won create believed, only after
the fence of the batch's *first* version was asked *after* the batch was read or created; success is reported only for
what the confirmed state says; a checkpoint's segments are durable before its index.

A version that cannot be read is never skipped, since a wrong state is worse than an old one: the replica goes on to a
newer checkpoint if there is one, else stays where it is (what it has keeps being served; only misses follow) and Sync
raises `Unusable` naming the object and the mend until somebody mended it.

Raises `Unavailable` (store), `Invalid` (credentials, permission), `Unusable` (a version or checkpoint cannot be read),
`Conflict` (a commit lost too often: keep it pending).
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

import numpy as np

from lmcache_s3.errors import Bug, Conflict, Missing, Unavailable, Unusable
from lmcache_s3.index.checkpoint_loading import load_checkpoint
from lmcache_s3.index.manifest import (
    MAX_VERSION_BYTES,
    MILESTONE,
    Delta,
    State,
    Verdict,
    apply,
    checkpoint_key,
    checkpoints_prefix,
    decode_delta,
    encode_delta,
    fence,
    judged,
    log_key,
    parse_checkpoint_key,
    segments_prefix,
    unjudged,
)
from lmcache_s3.index.pace import Pace, Rate
from lmcache_s3.index.replica import Replica
from lmcache_s3.index.segments import (
    MAX_INDEX_BYTES,
    CheckpointIndex,
    Segment,
    decode_index,
    encode_checkpoint,
)
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import ExtentName, ExtentRecord, Outcome

CHECKPOINT_EVERY = 256
CHECKPOINT_MIN_BYTES = 4 * 2**20
"""Below this many bytes of versions since the last checkpoint, only their number asks for a new one."""
IDLE_POLLS_PER_FENCE = 32
MAX_BATCH = 512
"""Versions read before they are confirmed and applied; a longer past takes several batches."""
_SERIAL_READS = 4
_RELOADS = 5


@dataclass(slots=True)
class LogCounters:
    """Events since start."""

    polls: int = 0
    versions_read: int = 0
    commits: int = 0
    creates: int = 0
    """Tried; of these some were won, lost, or got no clear answer."""
    lost: int = 0
    """Creates lost to another writer."""
    unknown: int = 0
    """Creates without a clear answer."""
    fenced: int = 0
    """Restarts from a checkpoint, because the past may have been deleted meanwhile."""
    void: int = 0
    checkpoints: int = 0

    @property
    def contention(self) -> float:
        """Which part of the creates was lost to others, 0…1."""
        return self.lost / self.creates if self.creates else 0.0


@dataclass(frozen=True, slots=True)
class _Read:
    delta: Delta
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Wish:
    """What one call of `commit` wants, and what the log said when it was called."""

    add: tuple[ExtentRecord, ...]
    remove: tuple[ExtentName, ...]
    floor: int
    lead: str | None
    access: tuple[ExtentName, ...]
    since: int
    """Replica version then: an access recorded later is as good as ours."""
    led_by: str | None
    """The leader then."""


@dataclass(slots=True)
class _Past:
    """The newest checkpoint known here, and the bytes of versions applied since."""

    version: int = 0
    size_bytes: int = 0
    since_bytes: int = 0
    asked_at: int = 0
    """Replica version when we last looked for a newer one."""


@dataclass(frozen=True, slots=True)
class LogLimits:
    """Constants of the protocol (milestone: of the format) and of patience."""

    milestone: int = MILESTONE
    checkpoint_every: int = CHECKPOINT_EVERY
    max_commit_attempts: int = 64
    backoff_s: float = 0.1
    backoff_cap_s: float = 5.0
    read_ahead: int = 8


@dataclass(slots=True)
class Log:
    """`writer`: ULID of this process. `sleep(seconds)`, `rng`, `nonce()` (32 hex digits), `clock()` (seconds, of any
    beginning; only to measure rates) and `readers` (an executor for reading ahead while catching up; None: one GET
    after another) are injected."""

    store: ObjectStore
    space_id: str
    writer: str
    sleep: Callable[[float], object]
    rng: random.Random
    nonce: Callable[[], str]
    limits: LogLimits = LogLimits()
    replica: Replica = field(default_factory=Replica)
    readers: Executor | None = None
    counters: LogCounters = field(default_factory=LogCounters)
    clock: Callable[[], float] = time.monotonic
    pace: Pace = field(init=False)
    """Contention seen by this process."""
    rate: Rate = field(init=False)
    """Versions per second, of all writers."""
    leader_seen_s: float = -math.inf
    """When a version that the leader of its time created was last seen, by the clock."""
    _empty_polls: int = 0
    _created: int = 0
    """The newest version that was created here and confirmed."""
    _past: _Past = field(default_factory=_Past)

    def __post_init__(self) -> None:
        self.pace = Pace(self.rng, self.limits.backoff_s, self.limits.backoff_cap_s)
        self.rate = Rate(self.clock)

    @property
    def state(self) -> State:
        return self.replica.state

    # ---- Open, Sync ------------------------------------------------------------------------------------------------

    def open(self) -> State:
        """Load the newest checkpoint, if any, then Sync (with the fence, however little there is to read)."""
        self._restart()
        self._empty_polls = IDLE_POLLS_PER_FENCE - 1
        return self.sync()

    def sync(self) -> State:
        """Catch up with the log; returns the confirmed state. On errors the state is what it was, or further on."""
        self.counters.polls += 1
        state = self._settle([])
        self.rate.seen(state.version)
        return state

    def _settle(self, batch: list[_Read]) -> State:
        """Sync. `batch`: a version just created here, which counts as just read: begins with step 2."""
        while True:
            first, blocked, more = self.state.version + 1, None, False
            if not batch:
                batch, blocked, more = self._read_batch(first)
            if not batch and blocked is None:
                self._empty_polls += 1
                if self._empty_polls % IDLE_POLLS_PER_FENCE:
                    return self.state
            fenced = self._exists(fence(first, self.limits.milestone))
            if (fenced or blocked is not None) and self._restart():
                batch = []
                continue
            self._apply(batch)
            if blocked is not None:
                raise blocked
            if not more:
                return self.state
            batch = []

    def _apply(self, batch: Sequence[_Read]) -> None:
        if not batch:
            return
        state, by_leader = self.state, False
        for read in batch:
            state = apply(state, read.delta)
            by_leader |= read.delta.writer == state.lead
            self._past.since_bytes += read.size_bytes
        if by_leader:
            self.leader_seen_s = self.clock()
        self._empty_polls = 0
        self.replica.publish(state)

    def _read_batch(self, first: int) -> tuple[list[_Read], Unusable | None, bool]:
        """Versions `first`, `first`+1, … until one is absent; (batch, why it ended early, whether more may follow)."""
        batch: list[_Read] = []
        while len(batch) < MAX_BATCH:
            start = first + len(batch)
            width = self.limits.read_ahead if self.readers is not None and len(batch) >= _SERIAL_READS else 1
            for version, data in enumerate(self._get_versions(range(start, start + width)), start):
                if data is None:
                    return batch, None, False
                try:
                    if isinstance(data, Unusable):
                        raise data
                    batch.append(_Read(decode_delta(data, version), len(data)))
                except Unusable as e:
                    return batch, self._unreadable(version, e), False
                self.counters.versions_read += 1
        return batch, None, True

    def _get_versions(self, versions: range) -> list[bytes | Unusable | None]:
        if self.readers is None or len(versions) == 1:
            return [self._get_version(version) for version in versions]
        return list(self.readers.map(self._get_version, versions))

    def _get_version(self, version: int) -> bytes | Unusable | None:
        """The object; None if absent, the error if its bytes cannot be had."""
        try:
            return self.store.get(log_key(self.space_id, version), limit_bytes=MAX_VERSION_BYTES)
        except Missing:
            return None
        except Unusable as e:
            return e

    def _exists(self, version: int) -> bool:
        try:
            self.store.get(log_key(self.space_id, version), 0, 1)
        except Missing:
            return False
        except Unusable:  # shorter than a byte, but there
            return True
        return True

    def _unreadable(self, version: int, why: Unusable) -> Unusable:
        key = log_key(self.space_id, version)
        return Unusable(
            f"manifest version {version} cannot be read ({why}); the index stays at version {version - 1} until "
            f"{key} is restored or this program upgraded",
            kind=why.kind,
            key=key,
        )

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def _restart(self) -> bool:
        """Load the newest checkpoint if it is newer than the replica; whether it was."""
        failed: Missing | None = None
        for _ in range(_RELOADS):
            found = self._newest_checkpoint()
            if found is None or found[0] <= self.state.version:
                return False
            version, nonce = found
            key = checkpoint_key(self.space_id, version, nonce)
            try:
                index = decode_index(self.store.get(key, limit_bytes=MAX_INDEX_BYTES), version, nonce)
                state = self._load(index)
            except Missing as e:  # collected since it was listed: a newer one exists
                failed = e
                continue
            except Unusable as e:
                raise self._unusable_checkpoint(key, e) from e
            self.counters.fenced += 1
            self._past = _Past(version, index.size_bytes, 0, version)
            self.replica.publish(state)
            return True
        raise self._unusable_checkpoint(failed.key or "" if failed else "", failed)

    def _unusable_checkpoint(self, key: str, why: Exception | None) -> Unusable:
        return Unusable(
            f"checkpoint {key} cannot be read ({why}); restore the object, or upgrade this program if it is too old",
            kind=why.kind if isinstance(why, Unusable) else "missing",
            key=key,
        )

    def _newest_checkpoint(self) -> tuple[int, str] | None:
        """(version, nonce) of the checkpoint that sorts first; other objects there are passed over."""
        prefix, after = checkpoints_prefix(self.space_id), ""
        while True:
            listed = next(iter(self.store.list(prefix, start_after=after, limit=1)), None)
            if listed is None:
                return None
            try:
                return parse_checkpoint_key(listed.key)
            except Unusable:
                after = listed.key

    def _load(self, index: CheckpointIndex) -> State:
        prefix = segments_prefix(self.space_id, index.version, index.nonce)

        buffers = threading.local()

        def get(segment: Segment) -> memoryview:
            # Into one buffer a thread: fresh memory for each segment would cost more than reading it.
            if len(getattr(buffers, "data", ())) < segment.size_bytes:
                buffers.data = np.empty(segment.size_bytes, np.uint8)
            view = memoryview(buffers.data)[: segment.size_bytes]
            self.store.get_into(prefix + segment.file, 0, view)
            return view

        return load_checkpoint(index, get, self.readers)

    def checkpoint(self) -> int:
        """Put a checkpoint of the confirmed state: segments, then index; returns its version."""
        state, nonce = self.state, self.nonce()
        files, index = encode_checkpoint(state, nonce, self.writer)
        prefix = segments_prefix(self.space_id, state.version, nonce)
        self._put_checkpoint(prefix, files, checkpoint_key(self.space_id, state.version, nonce), index)
        self.counters.checkpoints += 1
        self._past = _Past(state.version, sum(map(len, files.values())), 0, state.version)
        return state.version

    def _put_checkpoint(self, prefix: str, files: dict[str, bytes], key: str, index: bytes) -> None:
        for file, data in files.items():
            self.store.put(prefix + file, data)
        self.store.put(key, index)

    def checkpoint_if_due(self) -> int | None:
        """After a confirmed commit: the creator of each 256th version writes one. If it died, or the versions since the
        last are long (⅛ of the checkpoint), the next committer looks for itself and writes one if nobody did."""
        version, every, past = self.state.version, self.limits.checkpoint_every, self._past
        if version == self._created and version % every == 0 and past.version < version:
            return self.checkpoint()
        grace = max(1, every // 8)
        overdue = version - past.version > every + grace and version - past.asked_at >= grace
        if not overdue and past.since_bytes <= max(CHECKPOINT_MIN_BYTES, past.size_bytes // 8):
            return None
        past.asked_at = version
        newest = self._newest_checkpoint()
        if newest is not None and newest[0] > past.version:  # somebody did; what came since is young
            key = checkpoint_key(self.space_id, *newest)
            try:
                size_bytes = decode_index(self.store.get(key, limit_bytes=MAX_INDEX_BYTES), *newest).size_bytes
            except Missing:
                size_bytes = past.size_bytes
            self._past = _Past(newest[0], size_bytes, 0, version)
            return None
        return self.checkpoint()

    # ---- Commit ----------------------------------------------------------------------------------------------------

    def commit(
        self,
        add: Sequence[ExtentRecord],
        remove: Sequence[ExtentName] = (),
        *,
        floor: int = 0,
        lead: str | None = None,
        access: Sequence[ExtentName] = (),
        give_way: bool = False,
        claim: Callable[[], bool] = lambda: False,
    ) -> list[Verdict]:
        """Add and remove extents, raise the floor, name the leader and record accesses in one version; a verdict for
        each of `add`, after the fence. What the state says already needs no version.

        The extents' objects must be durable already. Repeating a commit is harmless (names are used once), so after any
        error the caller keeps it and tries again. A name in both `add` and `remove` is removed.
        lead: a ULID or `NOBODY`; dropped once the log names another leader than when this was called, so that of many
        who want to lead one does. claim: asked before each create, since losing many is a reason; True: as `lead` of
        this process. access: dropped where a later access than the replica's at this call is recorded.
        Raises `Conflict` when too many creates were lost, or, with `give_way`, as soon as such another leader is seen
        (kind `leader`): handing over is cheaper then.
        """
        gone = set(remove)
        kept = tuple(record for record in add if record.name not in gone)
        before = self.state
        if lead is None and claim():
            lead = self.writer
        wish = _Wish(kept, tuple(remove), floor, lead, tuple(access), before.version, before.lead)
        self.sync()
        for _ in range(self.limits.max_commit_attempts):
            delta = self._wanted(wish)
            if delta is None:
                return self._verdicts(add, gone)
            if give_way and self._is_led_anew(wish):
                raise Conflict(f"{self.state.lead} leads now: to be handed over", kind="leader")
            if self._tried(delta):
                continue
            self.sleep(self.pace.backoff_s())
            self.sync()
            if wish.lead is None and claim():
                wish = replace(wish, lead=self.writer)
        raise Conflict(
            f"no version could be created in {self.limits.max_commit_attempts} attempts; kept for the next round",
            key=log_key(self.space_id, self.state.version + 1),
        )

    def _tried(self, delta: Delta) -> bool:
        """Create the next version; whether that was won (whatever the fence says of it then)."""
        body, version = encode_delta(delta), self.state.version + 1
        self.counters.creates += 1
        outcome = self._create(version, body)
        if outcome is Outcome.WON:
            self.pace.won()
            if self._settle([_Read(delta, len(body))]).version == version:
                self._created = version
                self.counters.commits += 1
            return True
        self.pace.lost()
        if outcome is Outcome.LOST:
            self.counters.lost += 1
        else:
            self.counters.unknown += 1
        return False

    def _create(self, version: int, body: bytes) -> Outcome:
        try:
            return self.store.create(log_key(self.space_id, version), body)
        except Unavailable:  # like a lost answer: it may have taken effect
            return Outcome.UNKNOWN

    def _wanted(self, wish: _Wish) -> Delta | None:
        """What of it the state does not say yet; of records that cover each other only the first."""
        state = self.state
        fresh = tuple(unjudged(state, wish.add, wish.remove))
        gone = tuple(name for name in wish.remove if name in state.extents)
        access = tuple(name for name in wish.access if self._is_news(name, wish.since))
        lead = wish.lead
        if lead is not None and ((lead or None) == state.lead or self._is_led_anew(wish)):
            lead = None
        if not fresh and not gone and not access and lead is None and wish.floor <= state.floor:
            return None
        return Delta(self.writer, fresh, gone, wish.floor, lead, access)

    def _is_news(self, name: ExtentName, since: int) -> bool:
        live = self.state.extents.get(name)
        return live is not None and live.last_access <= since

    def _is_led_anew(self, wish: _Wish) -> bool:
        """Whether the log names a leader now that is neither this process nor the one it named when `commit` was
        called."""
        return self.state.lead not in (None, self.writer, wish.led_by)

    def _verdicts(self, add: Sequence[ExtentRecord], gone: Container[ExtentName]) -> list[Verdict]:
        out = []
        for record in add:
            verdict = judged(self.state, record)
            if verdict is None:
                if record.name not in gone:
                    raise Bug(f"extent {record.name} is committed, but the state does not judge it")
                verdict = Verdict.VOID
            self.counters.void += verdict is Verdict.VOID
            out.append(verdict)
        return out
