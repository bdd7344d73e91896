"""Handing over: many writers, one creator of versions (FORMAT.md §4.6).

While the log names a leader, writers put what they want into the inbox (one PUT, never a lost race) and the leader
merges all of it into a version a second. `HandOvers` is the writer's side, `Inbox` reads and merges, `Leader` says when
to lead and when to stop. The leader is a hint: any number of them, or of collectors that merge, is safe at any time,
since names are used once and a delta changes nothing the second time.
Invariants: an inbox object is deleted only after a *confirmed* state judged all of it (or when nobody can lose by it:
see `JUNK_AGE_S`); a hand-over is pending until the confirmed state judges it, and is committed directly when that takes
long.

Raises what `Log` and the store raise; malformed inbox objects raise nothing: they are counted and left alone.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lmcache_s3.errors import Missing, Unavailable, Unusable
from lmcache_s3.index.change import Change, Wanted, grouped, joined
from lmcache_s3.index.courtesy import breathe
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import (
    MAX_INTEGER,
    MAX_VERSION_BYTES,
    NOBODY,
    Delta,
    decode_delta,
    encode_delta,
    inbox_key,
    inbox_prefix,
)
from lmcache_s3.types import ExtentName, ObjectInfo

LEAD_ABOVE_PER_S = 2.5
"""Versions a second, over `Rate`'s window, above which an inbox is cheaper: readers' GETs decide."""
LEAD_FROM_SPAN_S = 0.8
"""… or the span (`Pace`) that this process's creates are spread over by lost races: four more lost than won. A store
that answers slowly never sees 2.5 versions a second, however many race for the next one."""
STEP_DOWN_BELOW_PER_S = 1.0
STEP_DOWN_AFTER_S = 30.0
PATIENCE_S = 5.0
"""A hand-over is waited for this long, and as much again at random."""
LIFE_S = 4.0
"""A leader whose version was seen so lately is busy, not dead: what waits for it waits on. Less than `PATIENCE_S`, so
that a leader which died before the hand-over has no credit left."""
LONGEST_PATIENCE_S = 30.0
"""No hand-over is left to a busy leader for longer."""
JUNK_AGE_S = 3600.0
"""An inbox object that cannot be read is deleted when it is older than this by the store's clock: the grace of the
floor, past which no extent it might have named can become live."""
MAX_ROUND_OBJECTS = 8192
MAX_ROUND_BYTES = 64 * 2**20
"""Read in one round; the rest waits for the next. Bounds memory, whatever lies in the inbox."""
STRAGGLER_S = 0.5
"""A round goes on without what the store has not given by then. Of hundreds of GETs a second one hangs now and then,
for as long as a client waits for an answer: everybody would wait with it, and take the leader for dead."""
_MAX_JUNK = 10_000

_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}", re.ASCII)

_Got = bytes | Unusable | Unavailable | None
"""An inbox object's bytes; why they are not to be had; None: deleted since it was listed, by another who merges."""

R = TypeVar("R")
W = TypeVar("W", bound=Wanted)


@dataclass(slots=True)
class InboxCounters:
    """Events since start. merged: inbox objects of which a version made here carried something. deleted: inbox objects
    deleted once judged. junk: objects found that are no delta. junk_deleted: of these deleted, being old. late: GETs
    that a round did not wait for. unread, undeleted: requests for single objects that failed, left for the next round.
    """

    rounds: int = 0
    merged: int = 0
    deleted: int = 0
    junk: int = 0
    junk_deleted: int = 0
    late: int = 0
    unread: int = 0
    undeleted: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class HandedOver:
    """An inbox object as it was read, or a part of it: one too long to share a version is committed in several."""

    key: str
    change: Change
    whole: Change


class Inbox:
    """Reads the inbox and merges it into the log. For the leader, and for whoever collects.

    executor: GETs and DELETEs go through it in parallel (1,000 writers make 500 objects a second); None: one by one.
    deletes_behind: `merge` returns while its deletions still go on in the executor, beside the next round.
    """

    def __init__(self, log: Log, executor: Executor | None = None, *, deletes_behind: bool = False) -> None:
        self.log = log
        self.counters = InboxCounters()
        self._executor = executor
        self._behind = executor if deletes_behind else None
        self._deleting: dict[str, Future[bool]] = {}
        self._reading: dict[str, Future[_Got]] = {}
        """GETs begun in an earlier round that were not waited for."""
        self._junk: dict[str, None] = {}
        """Keys that were read and are no delta: not read again."""
        self._known: set[str] = set()
        """Keys of what the last round read."""
        self._prefix = inbox_prefix(log.space_id)

    def merge(
        self,
        own: Sequence[W] = (),
        confirmed: Callable[[Sequence[W]], None] = lambda _: None,
        *,
        newest_s: float = 0.0,
    ) -> int:
        """LIST and GET the inbox; commit what the state does not judge, together with `own`; delete what it judges
        then. Sync before. Returns how many objects were there that were not at the last call.

        confirmed: called with those of `own` that a version judges, once it is confirmed, also if a later one fails.
        newest_s: a Last-Modified the caller saw lately (Unix seconds, the store's): by it old junk is told.
        Whatever is raised, nothing is lost: call again.
        """
        self.counters.rounds += 1
        self._collect()
        listed, old_junk = self._list(newest_s)
        found = self._read(listed)
        arrived = sum(handed.key not in self._known for handed in found)
        self._known = {handed.key for handed in found}
        self.counters.junk_deleted += self._delete(old_junk)

        if any(one.change.remove for one in found):
            self.log.sync()  # a state from before the hand-over may not have the extent yet: as good as removed
        judged, waiting = self._sorted(found)
        self._forget(judged)
        parts = (HandedOver(one.key, part, one.whole) for one in waiting for part in one.change.parts())
        items: list[HandedOver | W] = [*parts, *own]
        for group in grouped(items):
            self._commit(group)
            handed = [one for one in group if isinstance(one, HandedOver)]
            confirmed([one for one in group if not isinstance(one, HandedOver)])
            self.counters.merged += len(handed)
            self._forget([one for one in handed if one.whole.is_judged(self.log.state)])
        return arrived

    # ---- in small steps ----------------------------------------------------------------------------------------------

    def _list(self, newest_s: float) -> tuple[list[ObjectInfo], list[str]]:
        """(what to read, keys of junk old enough to go)."""
        wanted: list[ObjectInfo] = []
        junk: list[ObjectInfo] = []
        size_bytes = 0
        for info in self.log.store.list(self._prefix):
            if info.key in self._deleting:
                continue
            newest_s = max(newest_s, info.modified_s)
            if info.size_bytes > MAX_VERSION_BYTES or not _ULID.fullmatch(info.key.removeprefix(self._prefix)):
                self._note_junk(info.key)
            if info.key in self._junk:
                junk.append(info)
                continue
            size_bytes += info.size_bytes
            if wanted and (size_bytes > MAX_ROUND_BYTES or len(wanted) == MAX_ROUND_OBJECTS):
                break
            wanted.append(info)
        return wanted, [info.key for info in junk if newest_s - info.modified_s > JUNK_AGE_S]

    def _read(self, listed: Sequence[ObjectInfo]) -> list[HandedOver]:
        """What could be read. A GET that fails must not stop the others, nor the leader's own commits: it may be one
        object that its store will never give again. Nor must one that hangs."""
        found: list[HandedOver] = []
        for info, data in zip(listed, self._gets([info.key for info in listed]), strict=True):
            if isinstance(data, Unavailable):
                self.counters.unread += 1
            elif isinstance(data, TimeoutError):
                self.counters.late += 1
            elif data is not None:
                change = _decoded(data)
                if change is None:
                    self._note_junk(info.key)
                else:
                    found.append(HandedOver(info.key, change, change))
            breathe()
        return found

    def _gets(self, keys: Sequence[str]) -> Iterator[_Got | TimeoutError]:
        """One for each key. What hangs goes on meanwhile: a later round takes what came of it."""
        begun, self._reading = self._reading, {}
        if self._executor is None:
            yield from map(self._get, keys)
            return
        gets = {key: begun.get(key) or self._executor.submit(self._get, key) for key in keys}
        until_s = self.log.clock() + STRAGGLER_S
        for key, get in gets.items():
            try:
                yield get.result(max(0.0, until_s - self.log.clock()))
            except TimeoutError as e:
                self._reading[key] = get
                yield e

    def _get(self, key: str) -> _Got:
        try:
            return self.log.store.get(key, limit_bytes=MAX_VERSION_BYTES)
        except Missing:
            return None
        except (Unusable, Unavailable) as e:
            return e

    def _sorted(self, found: Iterable[HandedOver]) -> tuple[list[HandedOver], list[HandedOver]]:
        """(judged already, to be committed). An access that was not recorded yet is taken along."""
        state = self.log.state
        judged: list[HandedOver] = []
        waiting: list[HandedOver] = []
        for one in found:
            done = one.change.is_judged(state) and not any(name in state.extents for name in one.change.access)
            (judged if done else waiting).append(one)
            breathe()
        return judged, waiting

    def _commit(self, group: Sequence[Wanted]) -> None:
        """One version, confirmed."""
        one = joined(wanted.change for wanted in group)
        self.log.commit(one.add, one.remove, access=one.access)

    def _forget(self, judged: Sequence[HandedOver]) -> None:
        """Delete what a confirmed state judged."""
        keys = list({one.key: None for one in judged})
        if self._behind is None:
            self.counters.deleted += self._delete(keys)
            return
        for key in keys:
            self._deleting[key] = self._behind.submit(self._is_deleted, key)

    def _collect(self) -> None:
        """What became of deletions begun earlier. Those that failed are found judged, and begun again."""
        slow = len(self._deleting) > MAX_ROUND_OBJECTS
        for key, deleted in list(self._deleting.items()):
            if slow or deleted.done():
                del self._deleting[key]
                self.counters.deleted += (gone := deleted.result())
                self.counters.undeleted += not gone

    def _delete(self, keys: Sequence[str]) -> int:
        """How many are gone. The others are found judged, and deleted, next time."""
        gone = sum(self._map(self._is_deleted, keys))
        self.counters.undeleted += len(keys) - gone
        return gone

    def _is_deleted(self, key: str) -> bool:
        try:
            self.log.store.delete(key)
        except Unavailable:
            return False
        return True

    def _note_junk(self, key: str) -> None:
        if key not in self._junk:
            self.counters.junk += 1
            if len(self._junk) >= _MAX_JUNK:
                self._junk.pop(next(iter(self._junk)))
            self._junk[key] = None

    def _map(self, call: Callable[[str], R], keys: Sequence[str]) -> Iterable[R]:
        if self._executor is None or len(keys) < 2:
            return map(call, keys)
        return self._executor.map(call, keys)


def _decoded(data: bytes | Unusable) -> Change | None:
    """None: no delta."""
    if isinstance(data, Unusable):
        return None
    try:
        return Change.of(decode_delta(data, MAX_INTEGER))
    except Unusable:
        return None


@dataclass(slots=True, eq=False)
class HandOver(Generic[W]):
    """Something put into the inbox. items: what of it is not judged yet."""

    key: str
    items: list[W]
    leader: str
    """Whom the log named."""
    put_s: float
    give_up_s: float
    may_wait_on: bool = True


class HandOvers(Generic[W]):
    """What this process handed over and nobody judged yet.

    clock, rng, ulid (a new ULID each call): injected.
    """

    def __init__(self, log: Log, *, clock: Callable[[], float], rng: random.Random, ulid: Callable[[], str]) -> None:
        self._log, self._clock, self._rng, self._ulid = log, clock, rng, ulid
        self._pending: list[HandOver[W]] = []
        self.handed_over = 0
        """Inbox objects put since start."""
        self.taken_back = 0
        """Hand-overs given up since start."""

    def put(self, items: Sequence[W]) -> None:
        """One PUT. The extents' objects must be durable. Pending from then on; on errors it is not (it may still be
        merged some day, which is harmless)."""
        one = joined(item.change for item in items)
        body = encode_delta(Delta(self._log.writer, one.add, one.remove, access=one.access))
        key, leader = inbox_key(self._log.space_id, self._ulid()), self._log.state.lead or NOBODY
        self._log.store.put(key, body)
        self.handed_over += 1
        self._pending.append(HandOver(key, list(items), leader, self._clock(), self._patience_s()))

    def take_judged(self) -> list[W]:
        """Items that the confirmed state judges by now."""
        judged: list[W] = []
        state = self._log.state
        for pending in self._pending:
            waiting: list[W] = []
            for item in pending.items:
                (judged if item.change.is_judged(state) else waiting).append(item)
            pending.items = waiting
        self._pending = [pending for pending in self._pending if pending.items]
        return judged

    def take_given_up(self) -> tuple[list[W], bool]:
        """(items to be committed directly, whether a leader that the log still names left them). Sync before, and
        `take_judged`.

        Given up: not judged in time, or nobody leads any more. A leader that still creates versions is busy, and has
        more time: what is taken back from it then would slow it down further. If the log names another leader than
        then, it has its own time, once: of many who wait for a dead leader only one needs to take over.
        """
        now, leader = self._clock(), self._log.state.lead
        given_up: list[W] = []
        left, unmerged = [], False
        for pending in self._pending:
            if leader is not None and now < pending.give_up_s:
                left.append(pending)
            elif leader == pending.leader and self._is_busy(pending, now):
                pending.give_up_s = now + self._rng.uniform(1.0, 3.0)
                left.append(pending)
            elif leader not in (None, self._log.writer, pending.leader) and pending.may_wait_on:
                pending.leader, pending.may_wait_on = leader or NOBODY, False
                pending.give_up_s = self._patience_s()
                left.append(pending)
            else:
                given_up += pending.items
                unmerged |= leader == pending.leader
                self.taken_back += 1
        self._pending = left
        return given_up, unmerged

    def take_all(self) -> list[W]:
        """Everything pending, to be committed directly."""
        pending, self._pending = self._pending, []
        return [item for one in pending for item in one.items]

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[W]:
        return (item for pending in self._pending for item in pending.items)

    @property
    def due_s(self) -> float | None:
        """When the first of them has waited long enough; at once if nobody leads; None: nothing is pending."""
        if not self._pending:
            return None
        if self._log.state.lead is None:
            return self._clock()
        return min(pending.give_up_s for pending in self._pending)

    def adding(self) -> set[ExtentName]:
        """Extents that hand-overs pending add."""
        return {record.name for item in self for record in item.change.add}

    def _is_busy(self, pending: HandOver[W], now: float) -> bool:
        """Whether the leader shows signs of life, and may be left more time."""
        return now - self._log.leader_seen_s < LIFE_S and now - pending.put_s < LONGEST_PATIENCE_S

    def _patience_s(self) -> float:
        return self._clock() + PATIENCE_S + self._rng.uniform(0.0, PATIENCE_S)


@dataclass(slots=True)
class Leader:
    """Whether this process should lead, and a round of it. Leads exactly while the confirmed log names it."""

    log: Log
    inbox: Inbox
    clock: Callable[[], float]
    _since_s: float | None = None
    _arrived: deque[tuple[float, int]] = field(default_factory=deque)
    """(when, hand-overs found) of the last rounds."""

    @property
    def leads(self) -> bool:
        return self.log.state.lead == self.log.writer

    def should_claim(self) -> bool:
        """Nobody leads, and the log grows fast, or writers are so many that they keep it from growing fast."""
        crowded = self.log.rate.per_s() > LEAD_ABOVE_PER_S or self.log.pace.span_s >= LEAD_FROM_SPAN_S
        return self.log.state.lead is None and crowded

    def round(self, own: Sequence[W] = (), confirmed: Callable[[Sequence[W]], None] = lambda _: None) -> bool:
        """Sync; another leads → False, and `own` is left alone. Else merge inbox and `own` (see `Inbox.merge`), and
        step down if little was handed over for a while."""
        self.log.sync()
        if not self.leads:
            self.rest()
            return False
        if self._since_s is None:
            self._since_s = self.clock()
        arrived = self.inbox.merge(own, confirmed)
        if self._is_quiet(arrived):
            self.step_down()
        return True

    def step_down(self) -> None:
        """Writers commit directly from then on."""
        self.log.commit((), lead=NOBODY)
        self.rest()

    def rest(self) -> None:
        """Does not lead (any more): what was counted while leading is forgotten."""
        self._since_s = None
        self._arrived.clear()

    def _is_quiet(self, arrived: int) -> bool:
        now, since_s = self.clock(), self._since_s
        self._arrived.append((now, arrived))
        while now - self._arrived[0][0] >= STEP_DOWN_AFTER_S:
            self._arrived.popleft()
        handed_over = sum(n for _, n in self._arrived)
        return (
            since_s is not None
            and now - since_s >= STEP_DOWN_AFTER_S
            and handed_over < STEP_DOWN_BELOW_PER_S * STEP_DOWN_AFTER_S
        )
