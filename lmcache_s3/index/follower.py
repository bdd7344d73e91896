"""`Follower`: one process's part in the manifest, as a state machine without threads (FORMAT.md §4).

It follows the log, and takes what is to be changed the way that is cheapest now: directly, by hand-over while the log
names a leader, or as the leader itself. Whoever drives it (a thread of `Index`, a process of the simulation) loops:

    follower.log.open()
    while running:
        sleep until follower.due_s(), or until submit() was called
        try: follower.step()
        except LMCacheS3Error: count it        # nothing is lost; due_s() then holds a growing pause
    while not follower.drain(): pass           # closing: directly, at once; raises like step()

`submit` and `touch` may be called from any thread, do no I/O and never block. Everything else is one role: one thread
at a time. All waiting is either the driver's or the log's injected `sleep` (back-off after a lost race).
Invariant: what was submitted is answered once, when a confirmed state judges it, or by `fail_all`.

Raises what `Log` raises.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from lmcache_s3.errors import Conflict, Invalid, LMCacheS3Error
from lmcache_s3.index.access import Access
from lmcache_s3.index.change import Change, grouped, joined
from lmcache_s3.index.inbox import HandOvers, Inbox, Leader
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import NOBODY, Verdict, judged
from lmcache_s3.types import ExtentName, ExtentRecord

_LONGEST_PAUSE_S = 60.0
_RIDE = 1 / 60
"""Accesses that are due wait this part of their interval for something to ride along with."""


@dataclass(frozen=True, slots=True)
class Pacing:
    """poll_s: between looks at the log. hand_over_s: between hand-overs, at least. merge_s: between a leader's rounds.
    access_s: between publications of what was hit. writes: whether this process may write at all."""

    poll_s: float = 2.0
    hand_over_s: float = 2.0
    merge_s: float = 1.0
    access_s: float = 3600.0
    writes: bool = True

    def __post_init__(self) -> None:
        for name in ("poll_s", "hand_over_s", "merge_s", "access_s"):
            if not getattr(self, name) > 0:
                raise Invalid(f"{name} is {getattr(self, name)}: a pause in seconds, above 0", kind="setting", key=name)


@dataclass(slots=True, eq=False)
class Request:
    """One change, waiting to be judged. done: gets a verdict for each extent it adds. failed: gets why it never will.
    One of them is called once."""

    change: Change
    done: Callable[[list[Verdict]], None]
    failed: Callable[[BaseException], None]


class Follower:
    """log: opened by the driver. clock (seconds, the log's), rng, ulid (a new ULID each call): injected. executor: for
    the leader's parallel GETs and DELETEs; None: one by one."""

    def __init__(
        self,
        log: Log,
        pacing: Pacing = Pacing(),
        *,
        rng: random.Random,
        ulid: Callable[[], str],
        executor: Executor | None = None,
    ) -> None:
        self.log, self.pacing = log, pacing
        self._clock, self._rng = log.clock, rng
        self.inbox = Inbox(log, executor, deletes_behind=True)
        self.leader = Leader(log, self.inbox, self._clock)
        self.hand_overs: HandOvers[Request] = HandOvers(log, clock=self._clock, rng=rng, ulid=ulid)
        self.access = Access(self._clock, rng, pacing.access_s)
        self._ride_s = _RIDE * pacing.access_s
        self.seen_s = self._clock()
        """When the log was last looked at successfully."""
        self._incoming: deque[Request] = deque()
        """From other threads; appended and popped atomically."""
        self._queue: dict[Request, None] = {}
        """In order of arrival."""
        self._back: dict[Request, None] = {}
        """Given up hand-overs: to be committed directly."""
        self._claims = False
        """A leader that the log names left a hand-over of ours unmerged."""
        self._poll_s = self._hand_over_s = self._merge_s = self.seen_s
        self._poll_s += pacing.poll_s * rng.random()  # instances started together spread out
        self._group_s: float | None = None
        """When what is queued may go; None: nothing is."""
        self._not_before_s = self.seen_s
        self._failures = 0

    # ---- from anywhere -----------------------------------------------------------------------------------------------

    def submit(
        self,
        change: Change,
        done: Callable[[list[Verdict]], None] = lambda _: None,
        failed: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        """Queue a change; its extents' objects must be durable. Ask `due_s` again afterwards."""
        self._incoming.append(Request(change, done, failed))

    def touch(self, names: Iterable[ExtentName]) -> None:
        """These extents were loaded just now."""
        if self.pacing.writes:
            self.access.touch(names)

    @property
    def pending(self) -> int:
        """Changes not judged yet, handed over or not."""
        return len(self._incoming) + len(self._queue) + len(self._back) + sum(1 for _ in self.hand_overs)

    # ---- the driver's ------------------------------------------------------------------------------------------------

    def due_s(self) -> float:
        """When `step` has something to do, by the clock; not later than now if it has already."""
        self._take_incoming()
        return max(self._not_before_s, min(self._due()))

    def _due(self) -> list[float]:
        access_s = self.access.due_s
        if self.leader.leads:
            return [self._merge_s]
        due = [self._poll_s]
        if self._back:
            return [self._clock()]
        if self._group_s is not None:
            due.append(self._hand_over_s if self._is_led() else self._group_s)
        if self.hand_overs.due_s is not None:
            due.append(self.hand_overs.due_s)
        if access_s is not None:
            due.append(access_s + self._ride_s)
        return due

    def step(self) -> None:
        """Do what is due. Raises what went wrong, after which `due_s` waits: longer each time in a row."""
        try:
            self._step()
        except LMCacheS3Error:
            self._failures += 1
            base_s = 0.1 if self.pending else self.pacing.poll_s
            longest_s = min(_LONGEST_PAUSE_S, base_s * 2.0 ** min(self._failures, 30))
            self._not_before_s = self._clock() + self._rng.uniform(longest_s / 2, longest_s)
            raise
        self._failures = 0

    def _step(self) -> None:
        self._take_incoming()
        now = self._clock()
        self._take_access(now)
        if self.leader.leads:
            if now >= self._merge_s:
                self._merge()
            return
        self.leader.rest()
        if self.hand_overs.due_s is not None and now >= self.hand_overs.due_s:
            self._take_back()
        if self._back or (self._group_s is not None and not self._is_led() and now >= self._group_s):
            self._commit()
        elif self._group_s is not None and self._is_led() and now >= self._hand_over_s:
            self._hand_over()
        if self._clock() >= self._poll_s:
            self.poll()

    def poll(self) -> None:
        """Look at the log now."""
        self.log.sync()
        self._looked()

    def drain(self, *, closing: bool = True) -> bool:
        """Commit directly one version of what is queued or handed over, whoever leads; step down if this leads and is
        closing. Whether nothing is left. Raises like `step`, and may be called again."""
        self._take_incoming()
        self._back |= dict.fromkeys(self.hand_overs.take_all())
        lead = NOBODY if closing and self.leader.leads else None
        if self._back or self._queue:
            self._commit_group(next(grouped([*self._back, *self._queue])), lead=lead, give_way=False)
            if not closing:
                self.log.checkpoint_if_due()
        elif lead is not None:
            self.leader.step_down()
        return not (self._incoming or self._back or self._queue)

    def fail_all(self, error: LMCacheS3Error) -> None:
        """Answer everything that waits with `error`."""
        self._take_incoming()
        left = [*self._back, *self._queue, *self.hand_overs.take_all()]
        self._back, self._queue, self._group_s = {}, {}, None
        for request in left:
            request.failed(error)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _is_led(self) -> bool:
        """By another process."""
        return self.log.state.lead not in (None, self.log.writer)

    def _take_incoming(self) -> None:
        while self._incoming:
            self._queue[self._incoming.popleft()] = None
        if self._group_s is None and self._ready():
            self._group_s = self._clock() + self.log.pace.group_wait_s()

    def _ready(self) -> list[Request]:
        """What is queued and may go. What takes back an extent that is still pending waits for that one's verdict, lest
        the later of the two be merged first."""
        adding = self.hand_overs.adding() if self._queue else set()
        if not adding:
            return list(self._queue)
        return [request for request in self._queue if adding.isdisjoint(request.change.remove)]

    def _take_access(self, now: float) -> None:
        """Publish what was hit, along with something else if anything comes soon."""
        due_s = self.access.due_s
        if due_s is None or now < due_s or not (self._queue or self._back or now >= due_s + self._ride_s):
            return
        names = self.access.take(self.log.state)
        if names:
            self.submit(Change(access=names))
            self._take_incoming()

    def _commit(self) -> None:
        try:
            self._commit_group(next(grouped([*self._back, *self._ready()])), claim=self._should_claim, give_way=True)
        except Conflict as e:
            if e.kind != "leader":
                raise
            self._queue, self._back = self._back | self._queue, {}  # to be handed over to who leads now
            self._claims = False
            self._looked()
            return
        self._claims = False
        if self.leader.leads:
            self._merge_s = self._clock()
        self.log.checkpoint_if_due()

    def _should_claim(self) -> bool:
        return self._claims or self.leader.should_claim()

    def _commit_group(
        self,
        group: Sequence[Request],
        *,
        give_way: bool,
        lead: str | None = None,
        claim: Callable[[], bool] = lambda: False,
    ) -> None:
        one = joined(request.change for request in group)
        self.log.commit(one.add, one.remove, access=one.access, lead=lead, claim=claim, give_way=give_way)
        self._answer(group)
        self._looked()

    def _hand_over(self) -> None:
        """One PUT for what is queued; the rest (beyond a group's size) waits for the next."""
        group = next(grouped(self._ready()))
        self.hand_overs.put(group)
        self._hand_over_s = self._clock() + self.pacing.hand_over_s
        self._drop(group)
        self._answer(self.hand_overs.take_judged())  # accesses alone: nobody waits for them

    def _take_back(self) -> None:
        """Some hand-over has waited long enough: look once more, then it is committed directly."""
        self.poll()
        given_up, unmerged = self.hand_overs.take_given_up()
        self._back |= dict.fromkeys(given_up)
        self._claims |= unmerged

    def _merge(self) -> None:
        """The leader's round."""
        now = self._clock()
        if self.hand_overs.due_s is not None and now >= self.hand_overs.due_s:
            self._back |= dict.fromkeys(self.hand_overs.take_given_up()[0])
        if self.leader.round([*self._back, *self._ready()], self._answer):
            self._merge_s = max(self._clock(), now + self.pacing.merge_s)
        self._looked()
        self.log.checkpoint_if_due()

    def _looked(self) -> None:
        """The replica is as new as the log was just now."""
        now = self.seen_s = self._clock()
        self._poll_s = now + self.pacing.poll_s * self._rng.uniform(0.9, 1.1)
        self.access.seen(self.log.state.version)
        self._answer(self.hand_overs.take_judged())

    def _answer(self, requests: Sequence[Request]) -> None:
        """The confirmed state judges them."""
        if not requests:
            return
        self._drop(requests)
        for request in requests:
            request.done([self._verdict(record) for record in request.change.add])

    def _verdict(self, record: ExtentRecord) -> Verdict:
        """Only what its own request removes is judged by nothing: that store is lost."""
        return judged(self.log.state, record) or Verdict.VOID

    def _drop(self, requests: Iterable[Request]) -> None:
        """From the queues."""
        for request in requests:
            self._queue.pop(request, None)
            self._back.pop(request, None)
        self._group_s = None
        self._take_incoming()
