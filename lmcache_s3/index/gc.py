"""Collection: what should go leaves the index first; what can never be live again leaves the bucket (FORMAT.md §4.5).

Anyone may collect, any time, in any number, and may stop at any step. One round of a `Collector`:
1. Sync; merge what was handed over.
2. Commit `{remove: victims, floor: H}`. H is the newest version older than the grace: whoever named an extent before it
   and has not committed it since finds it void.
3. Once that is confirmed, delete objects of extents that are *not live and born below the floor*, which stays true for
   ever: victims of earlier rounds, late and abandoned uploads. This round's victims wait for the next one, so that
   readers a little behind find them.
4. Checkpoints and their segments but the newest (and those that the kept history needs), then versions that no replica
   and no kept history needs.

Safety rests on the confirmed state and on versions alone. Time only says *when*, and it is the store's own:
Last-Modified of versions against Last-Modified of an object just written. Objects whose keys are not ours are counted
and left alone. `dry_run` plans the same round; it writes that one small object and nothing else.

Raises the store's `Unavailable` and `Invalid`, `Unusable` (the log cannot be read), `Conflict` (lost too many creates).
A round that raised is simply run again.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass, field
from typing import TypeVar

from lmcache_s3.errors import Conflict, Invalid, LMCacheS3Error, Missing, Unavailable, Unusable
from lmcache_s3.identity import root_hash
from lmcache_s3.index.columns import columns_of
from lmcache_s3.index.delta import MAX_INTEGER, Delta, encode_delta
from lmcache_s3.index.history import Versions, list_versions
from lmcache_s3.index.inbox import Inbox
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import (
    State,
    checkpoint_key,
    checkpoints_prefix,
    fence,
    log_key,
    parse_checkpoint_key,
    segments_prefix,
)
from lmcache_s3.index.policy import Limits, Why, choose
from lmcache_s3.index.segments import MAX_INDEX_BYTES, decode_index
from lmcache_s3.types import HASH_BYTES, ExtentName, ObjectInfo, Outcome, space_prefix

GRACE_S = 3600.0
HISTORY_S = 7 * 86_400.0
MAX_REMOVALS = 2**16
"""Extents removed by one version; more take several."""
_HISTORY_CHECKPOINTS = 8
"""Checkpoints kept about evenly over the kept history, so that none of it is far from one."""
_RELISTS = 3
"""The newest checkpoint may be superseded and collected by others while we look at it."""
_SEGMENT = re.compile(r"([0-9]{20})\.([0-9a-f]{32})/[^/]+", re.ASCII)
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class GcSettings:
    """What to keep. Bytes: encoded bytes of live extents; None: no such limit.

    grace_s: how long an upload may take until its commit; shorter makes the stores of slow writers void. history_s: how
    long versions, and the checkpoints to read them with, are kept for `log` and `ls --as-of`. ttl_s: since last use.
    tenant_bytes: budgets by cache_salt; default_tenant_bytes: of every other tenant.
    """

    grace_s: float = GRACE_S
    history_s: float = HISTORY_S
    max_bytes: int | None = None
    ttl_s: float | None = None
    tenant_bytes: Mapping[str, int] = field(default_factory=dict)
    default_tenant_bytes: int | None = None
    max_attempts: int = 16

    def __post_init__(self) -> None:
        budgets = (self.max_bytes, self.default_tenant_bytes, *self.tenant_bytes.values())
        if any(b is not None and b < 0 for b in budgets) or self.max_attempts < 1:
            raise Invalid("gc: budgets are 0 or more bytes, max_attempts at least 1", kind="argument")
        for name, value in (("grace_s", self.grace_s), ("history_s", self.history_s), ("ttl_s", self.ttl_s)):
            if value is not None and not 0 <= value < 1e12:
                raise Invalid(f"gc: {name} is {value}; a number of seconds, 0 or more", kind="argument", key=name)


@dataclass(frozen=True, slots=True)
class Removal:
    """An extent taken out of the index in this round (dry run: that would be)."""

    name: ExtentName
    why: Why
    encoded_bytes: int


@dataclass(frozen=True, slots=True)
class Deletion:
    """An object deleted. kind: extent, checkpoint, segment or version."""

    kind: str
    key: str
    size_bytes: int


@dataclass(slots=True)
class GcReport:
    """What a round did, or, if `dry_run`, would do. version, floor: confirmed at the end (dry run: as they would be).

    now_s: the store's time. removed: in the order of removal; the next round deletes their objects. objects, bytes:
    deleted, by kind. deletions: each of them, only in a dry run. foreign: objects left alone because their keys are not
    ours. problem: why checkpoints and versions were left alone, if they were.
    """

    dry_run: bool
    version: int = 0
    floor: int = 0
    now_s: float = 0.0
    removed: list[Removal] = field(default_factory=list)
    objects: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    deletions: list[Deletion] = field(default_factory=list)
    foreign: int = 0
    problem: str | None = None

    @property
    def removed_bytes(self) -> int:
        return sum(removal.encoded_bytes for removal in self.removed)

    @property
    def deleted_bytes(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's index as listed. modified_s: the store's."""

    version: int
    nonce: str
    modified_s: float
    size_bytes: int


class Collector:
    """See the module. Uses the log's store, sleep, randomness and nonces; one thread at a time may use the log.

    merge: merges what writers handed over, as a leader would; None: an `Inbox` of its own. executor: makes requests in
    parallel; None: one after another.
    """

    parts: Sequence[str] = tuple(f"{shard:02x}/" for shard in range(256))
    """Key prefixes below `extents/` that are listed one by one, side by side."""

    def __init__(
        self,
        log: Log,
        settings: GcSettings = GcSettings(),
        *,
        merge: Callable[[Log], object] | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.log, self.settings, self.merge, self.executor = log, settings, merge, executor
        self.store, self.space_id = log.store, log.space_id
        self._lock = threading.Lock()
        """Guards the report while requests run in parallel."""

    def run(self, *, dry_run: bool = False) -> GcReport:
        """One round."""
        report = GcReport(dry_run)
        report.now_s = self._now_s()
        self.log.sync()
        if not dry_run:
            self._merge(report.now_s)
        versions = list_versions(self.store, self.space_id, upto=self.log.state.version)
        floor, waiting = self._remove(versions, report)
        state = self.log.state
        report.version, report.floor = state.version, max(floor, state.floor) if dry_run else state.floor
        self._sweep_extents(state.extents, report, waiting)
        self._sweep_manifest(versions, report)
        if not dry_run:
            self.log.checkpoint_if_due()
        return report

    # ---- steps 1 and 2: out of the index ---------------------------------------------------------------------------

    def _merge(self, now_s: float) -> None:
        """What writers handed over comes into the index, as a leader would see to it, before it can become void."""
        if self.merge is not None:
            self.merge(self.log)
        else:
            Inbox(self.log, self.executor).merge(newest_s=now_s)

    def _now_s(self) -> float:
        """The store's time: Last-Modified of an object written just now."""
        key = f"probe/{self.log.nonce()}"
        try:
            self.store.put(key, b"gc")
            written = next(iter(self.store.list(key, limit=1)), None)
        finally:
            self.store.delete(key)
        if written is None:
            raise Unusable(f"{self.store.url}: a listing does not show what was just written", kind="missing", key=key)
        return written.modified_s

    def _remove(self, versions: Versions, report: GcReport) -> tuple[int, set[ExtentName]]:
        """Commit the removals and the floor. Returns the floor in force (dry run: that would be) and all victims.

        Each attempt chooses anew from the state it follows: what was used meanwhile is no victim any more.
        """
        lost, longest_s = 0, self.log.limits.backoff_s
        waiting: set[ExtentName] = set()
        while True:
            state = self.log.state
            floor = self._floor(state, versions, report.now_s)
            removals = self._choose(state, versions, report.now_s)
            part = removals if report.dry_run else removals[:MAX_REMOVALS]
            waiting |= {removal.name for removal in part}
            if report.dry_run:
                report.removed += part
                return floor, waiting
            if not part and floor <= state.floor:
                return state.floor, waiting
            delta = Delta(self.log.writer, remove=tuple(removal.name for removal in part), floor=floor)
            if self._commit(delta):
                report.removed += part
                if len(part) == len(removals):
                    return self.log.state.floor, waiting
                continue
            lost += 1
            if lost >= self.settings.max_attempts:
                raise Conflict(
                    f"no version could be created in {lost} attempts; run the collection again",
                    key=log_key(self.space_id, self.log.state.version + 1),
                )
            self.log.sleep(self.log.rng.uniform(0, longest_s))
            longest_s = min(self.log.limits.backoff_cap_s, 2 * longest_s)

    def _commit(self, delta: Delta) -> bool:
        """Create the next version, then Sync; whether the confirmed state says what the delta says. One attempt: a
        repeated create would name victims chosen before what it follows."""
        try:
            outcome = self.store.create(log_key(self.space_id, self.log.state.version + 1), encode_delta(delta))
        except Unavailable:  # it may have taken effect: the state will say
            outcome = Outcome.UNKNOWN
        state = self.log.sync()
        if outcome is Outcome.LOST:
            return False
        return state.floor >= delta.floor and not any(name in state.extents for name in delta.remove)

    def _floor(self, state: State, versions: Versions, now_s: float) -> int:
        """H: the newest version older than the grace."""
        return min(versions.newest_at(now_s - self.settings.grace_s), state.version)

    def _choose(self, state: State, versions: Versions, now_s: float) -> list[Removal]:
        """What should leave the index, in the order of removal."""
        settings = self.settings
        limits = Limits(
            max_bytes=settings.max_bytes,
            tenant_bytes={
                root_hash(self.space_id, salt)[:HASH_BYTES]: budget for salt, budget in settings.tenant_bytes.items()
            },
            default_tenant_bytes=settings.default_tenant_bytes,
            unused_since=0 if settings.ttl_s is None else versions.newest_at(now_s - settings.ttl_s),
            unreachable_since=versions.newest_at(now_s - settings.grace_s),
        )
        columns = columns_of(state)
        victims = choose(columns, limits)
        return [
            Removal(columns.name(row), Why(why), int(columns.encoded_bytes[row]))
            for row, why in zip(victims.rows.tolist(), victims.why.tolist(), strict=True)
        ]

    # ---- step 3: objects of extents ----------------------------------------------------------------------------------

    def _deletable(self, live: Container[ExtentName], floor: int, name: ExtentName) -> bool:
        """Once true, true for ever: an add of an extent born below the floor is void."""
        return name not in live and name.born < floor

    def _sweep_extents(self, live: Container[ExtentName], report: GcReport, waiting: Container[ExtentName]) -> None:
        """Delete what can never be live again. live: of the confirmed state. waiting: left to the next round."""
        folder = space_prefix(self.space_id) + "extents/"

        def sweep(part: str) -> None:
            last: tuple[str, str, bool] | None = None
            for info in self.store.list(folder + part):
                shard, _, rest = info.key.removeprefix(folder).partition("/")
                text = rest.partition("/")[0]
                if last is None or last[:2] != (shard, text):
                    name = _extent_name(text, shard)
                    if name is None:
                        self._foreign(report)
                        continue
                    last = (shard, text, name not in waiting and self._deletable(live, report.floor, name))
                if last[2]:
                    self._delete(report, "extent", info)

        self._each(sweep, self.parts)

    # ---- step 4: checkpoints, segments, versions ---------------------------------------------------------------------

    def _sweep_manifest(self, versions: Versions, report: GcReport) -> None:
        report.foreign += versions.foreign
        listed = self._checkpoints()
        if not listed:
            return
        for _ in range(_RELISTS):
            try:
                self._check_whole(listed[0])
                break
            except Unusable as e:
                before, listed = listed[0], self._checkpoints()
                if not listed or listed[0] == before:
                    report.problem = f"the newest checkpoint is not whole ({e}); see rebuild"
                    return
        else:
            report.problem = "checkpoints came and went too fast to be looked at"
            return
        horizon = versions.newest_at(report.now_s - self.settings.history_s)
        kept = self._kept_checkpoints(listed, horizon)
        self._sweep_checkpoints(listed, kept, report)
        self._sweep_segments(listed[0], kept, report)
        self._sweep_versions(versions, kept[0].version if kept[0].version <= horizon else 0, report)

    def _checkpoints(self) -> list[Checkpoint]:
        """As listed: the newest first."""
        found = []
        for info in self.store.list(checkpoints_prefix(self.space_id)):
            try:
                version, nonce = parse_checkpoint_key(info.key)
            except Unusable:
                continue
            found.append(Checkpoint(version, nonce, info.modified_s, info.size_bytes))
        return found

    def _check_whole(self, newest: Checkpoint) -> None:
        """What is deleted on its authority cannot be had again. Raises `Unusable`."""
        key = checkpoint_key(self.space_id, newest.version, newest.nonce)
        index = decode_index(self.store.get(key, limit_bytes=MAX_INDEX_BYTES), newest.version, newest.nonce)
        prefix = segments_prefix(self.space_id, newest.version, newest.nonce)
        sizes = {info.key.removeprefix(prefix): info.size_bytes for info in self.store.list(prefix)}
        for segment in index.segments:
            if sizes.get(segment.file) != segment.size_bytes:
                raise Missing(f"{prefix}{segment.file} is missing or of another size", key=prefix + segment.file)

    def _kept_checkpoints(self, listed: Sequence[Checkpoint], horizon: int) -> list[Checkpoint]:
        """The newest; and for the kept history the newest before it begins, and some in between, spread evenly."""
        newest = listed[0]
        kept: list[Checkpoint] = []
        apart_s = self.settings.history_s / _HISTORY_CHECKPOINTS
        for checkpoint in reversed(listed[1:]):
            if checkpoint.version <= horizon:
                kept = [checkpoint]
            elif not kept or checkpoint.modified_s >= kept[-1].modified_s + apart_s:
                kept.append(checkpoint)
        return [newest] if newest.version <= horizon else [*kept, newest]

    def _checkpoint_deletable(self, checkpoint: Checkpoint, newest: Checkpoint) -> bool:
        """Of two of one version the one that sorts behind stays until both are old."""
        return checkpoint.version < newest.version

    def _sweep_checkpoints(self, listed: Sequence[Checkpoint], kept: Sequence[Checkpoint], report: GcReport) -> None:
        doomed = [c for c in listed[1:] if c not in kept and self._checkpoint_deletable(c, listed[0])]

        def delete(c: Checkpoint) -> None:
            key = checkpoint_key(self.space_id, c.version, c.nonce)
            self._delete(report, "checkpoint", ObjectInfo(key, c.size_bytes, c.modified_s))

        self._each(delete, doomed)

    def _segment_deletable(self, version: int, newest: Checkpoint) -> bool:
        """Of those without an index: not older ones may be of a checkpoint that is being written."""
        return version < newest.version

    def _sweep_segments(self, newest: Checkpoint, kept: Sequence[Checkpoint], report: GcReport) -> None:
        """Segments that belong to no kept checkpoint. Their indexes, where they had one, are gone already."""
        prefix = space_prefix(self.space_id) + "segments/"
        wanted = {(c.version, c.nonce) for c in kept}
        doomed = []
        for info in self.store.list(prefix):
            m = _SEGMENT.fullmatch(info.key.removeprefix(prefix))
            if m is None or int(m[1]) > MAX_INTEGER:
                self._foreign(report)
            elif (int(m[1]), m[2]) not in wanted and self._segment_deletable(int(m[1]), newest):
                doomed.append(info)
        self._each(lambda info: self._delete(report, "segment", info), doomed)

    def _version_deletable(self, version: int, checkpoint: int, confirmed: int) -> bool:
        """checkpoint: from which the kept history is read; never newer than the newest. confirmed: the replica's."""
        milestone = self.log.limits.milestone
        return version <= checkpoint and fence(version, milestone) <= confirmed and version % milestone != 0

    def _sweep_versions(self, versions: Versions, checkpoint: int, report: GcReport) -> None:
        confirmed = self.log.state.version
        doomed = [
            ObjectInfo(log_key(self.space_id, version), int(versions.sizes[i]), float(versions.times_s[i]))
            for i, version in enumerate(versions.numbers.tolist())
            if self._version_deletable(version, checkpoint, confirmed)
        ]
        self._each(lambda info: self._delete(report, "version", info), doomed)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _delete(self, report: GcReport, kind: str, info: ObjectInfo) -> None:
        if not report.dry_run:
            self.store.delete(info.key)
        with self._lock:
            report.objects[kind] += 1
            report.bytes[kind] += info.size_bytes
            if report.dry_run:
                report.deletions.append(Deletion(kind, info.key, info.size_bytes))

    def _foreign(self, report: GcReport) -> None:
        with self._lock:
            report.foreign += 1

    def _each(self, function: Callable[[_T], _R], items: Iterable[_T]) -> None:
        """`function` of each; all of them have ended when this returns or raises."""
        if self.executor is None:
            for item in items:
                function(item)
            return
        futures = [self.executor.submit(function, item) for item in items]
        wait(futures)
        for future in futures:
            future.result()


def _extent_name(text: str, shard: str) -> ExtentName | None:
    """The name below `extents/<shard>/`; None for what no writer of ours would put there."""
    try:
        name = ExtentName.parse(text)
    except LMCacheS3Error:
        return None
    return name if text[:2] == shard and name.born <= MAX_INTEGER else None
