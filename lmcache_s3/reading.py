"""Reading ranges of shard objects into memory of ours: as many at once as pay, in parts, and twice where one hangs.

    room in the budget ─▶ buffer ─▶ GETs of its parts, side by side ─▶ done(buffer)
                                     └─ one that takes unusually long is asked for again, into a second buffer

The first answer to a part counts; whoever comes second wrote into memory that nobody looks at. What each request took
teaches the lane (how many at once), the link (how large) and the hedging (when to ask again).
Invariant: a buffer's bytes go back to the budget when its last view is gone, be that a request's which still writes
into it. Raises nothing; errors are handed over.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lmcache_s3.alarms import Alarms
from lmcache_s3.budget import ByteBudget
from lmcache_s3.errors import LMCacheS3Error
from lmcache_s3.handle import Work
from lmcache_s3.hedging import Hedging
from lmcache_s3.lane import Lane, Slot
from lmcache_s3.link import Link
from lmcache_s3.metrics import Metrics
from lmcache_s3.range_planning import parts
from lmcache_s3.tiers.buffers import BufferPool, rounded
from lmcache_s3.tiers.object import ObjectTier
from lmcache_s3.tracebacks import without_frames
from lmcache_s3.types import CellRef

Step: TypeAlias = Callable[[Callable[[], "Future[None]"], "Work[Any] | None"], bool]
"""Submit a call that is counted until it is done and whose unforeseen errors end the work; False if we are closed."""

_LEAST_PART_BYTES = 4 << 20
"""A buffer is not read in smaller parts than this."""


@dataclass(frozen=True, slots=True)
class Filled:
    """A buffer that was read. extra_bytes: more of the budget, which whoever gets this gives back in the end."""

    buffer: memoryview
    extra_bytes: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to read: bytes [start, start + n_bytes) of the object that holds `cell`, and extra_bytes of the budget.

    given_up: nobody wants it any more. asked: told of each request. done: gets the outcome, once; None: given up.
    later: nobody waits for it (a prefetch), so all others go first. superseded: asked once, when its turn has come;
    True: others read all of it, so it is given up.
    """

    cell: CellRef
    start: int
    n_bytes: int
    extra_bytes: int
    work: Work[Any]
    given_up: Callable[[], bool]
    asked: Callable[[], None]
    done: Callable[[Filled | LMCacheS3Error | None], None]
    later: bool = False
    superseded: Callable[[], bool] = lambda: False


class Reader:
    """All reads of one transfer. Thread-safe; `read` returns at once."""

    def __init__(
        self,
        bucket: ObjectTier,
        lane: Lane,
        budget: ByteBudget,
        buffers: BufferPool,
        alarms: Alarms,
        step: Step,
        metrics: Metrics,
        *,
        part_bytes: int,
    ) -> None:
        self.bucket, self.lane, self.budget, self.buffers = bucket, lane, budget, buffers
        self.alarms, self.step, self.metrics = alarms, step, metrics
        self.part_bytes = max(part_bytes, _LEAST_PART_BYTES)
        self._link, self._hedging = Link(), Hedging()
        self._lock = threading.Lock()

    def read(self, wanted: Wanted) -> None:
        """Begin when it is this read's turn; `wanted.done` is called by another thread."""
        read = _Read(self, wanted)
        self.step(lambda: self.lane.submit(read.begin, later=wanted.later), wanted.work)

    def buffer(self, n_bytes: int) -> memoryview:
        """Memory for which `rounded(n_bytes)` were taken from the budget; they go back with it."""
        size = rounded(n_bytes)
        return self.buffers.take(n_bytes, lambda: self.budget.give_back(size))

    def piece_bytes(self, load_bytes: int, most: int) -> int:
        with self._lock:
            return self._link.piece_bytes(load_bytes, most)

    @property
    def gap_bytes(self) -> int:
        with self._lock:
            return self._link.gap_bytes

    def answered(self, n_bytes: int, seconds: float) -> None:
        with self._lock:
            self._hedging.answered(n_bytes, seconds)
            self._link.seen(n_bytes, seconds)

    def patience_s(self, n_bytes: int) -> float | None:
        """A first request begins: when to ask again."""
        with self._lock:
            self._hedging.asked()
            return self._hedging.after_s(n_bytes)

    def may_ask_again(self) -> bool:
        with self._lock:
            return self._hedging.may_ask_again()


class _Part:
    """One range of a read: who is asking for it, and what came of that."""

    def __init__(self, read: _Read, where: range) -> None:
        self.where = where
        self.slot = Slot(None)
        self.begun = False
        self.asking = 0
        self.filled: int | None = None
        """Number of the buffer that holds it."""
        self.error: LMCacheS3Error | None = None
        self.over = False
        self._read = read

    def ring(self) -> None:
        """It takes unusually long."""
        self._read.ask_again(self)


class _Read:
    """One read under way: one buffer, or two where a part was asked for twice."""

    def __init__(self, reader: Reader, wanted: Wanted) -> None:
        self._reader, self._wanted = reader, wanted
        self._parts = [_Part(self, where) for where in parts(wanted.n_bytes, reader.part_bytes)]
        self._buffers: list[memoryview] = []
        self._left = len(self._parts)
        self._lock = threading.Lock()

    def begin(self, slot: Slot) -> None:
        """Take memory and ask for all parts; those that nobody else has begun in this thread. Blocks until there is
        room."""
        wanted, reader = self._wanted, self._reader
        size = rounded(wanted.n_bytes) + wanted.extra_bytes
        if wanted.superseded():
            wanted.done(None)
            return
        if wanted.given_up() or not reader.budget.wait(size, wanted.given_up):
            wanted.done(None if wanted.given_up() else reader.budget.too_small(size))
            return
        try:
            self._buffers.append(reader.buffer(wanted.n_bytes))
        except BaseException:
            reader.budget.give_back(wanted.extra_bytes)
            raise
        for part in self._parts:
            part.asking = 1
        for part in reversed(self._parts[1:]):
            self._submit(part, 0, next_up=True)
        # Not the first alone: others may have all slots, and wait for the memory that is held here.
        for part in self._parts:
            self._fetch(part, 0, slot)

    def _submit(self, part: _Part, which: int, **how: bool) -> None:
        call, lane = functools.partial(self._fetch, part, which), self._reader.lane
        self._reader.step(lambda: lane.submit(call, **how), self._wanted.work)

    def _fetch(self, part: _Part, which: int, slot: Slot) -> None:
        """One GET. which: the buffer to read into; a part is read into the first one once."""
        with self._lock:
            if not which and part.begun:
                return
            part.begun = True
        wanted, reader = self._wanted, self._reader
        n_bytes = len(part.where)
        error: LMCacheS3Error | None = None
        try:
            if not which:
                part.slot = slot
                patience_s = reader.patience_s(n_bytes)
                if patience_s is not None:
                    reader.alarms.after(patience_s, part.ring)
            with self._lock:
                needed = not part.over and not wanted.given_up()
                into = self._buffers[which][part.where.start : part.where.stop] if needed else memoryview(b"")
            if needed:
                wanted.asked()
                get = functools.partial(reader.bucket.read_into, wanted.cell, wanted.start + part.where.start, into)
                seconds = reader.lane.measured(get, n_bytes)
                if not part.over:
                    reader.answered(n_bytes, seconds)
        except LMCacheS3Error as e:
            error = without_frames(e)
        except BaseException as e:
            wanted.work.fail(e)  # before it is answered, so that nobody looks at the memory, which is given back
            self._answer(part, which, None)
            raise
        self._answer(part, which, error)

    def ask_again(self, part: _Part) -> None:
        """Ask for a part a second time: if that is allowed, there is memory for it now, and it is the first of this
        read. Does not block."""
        reader, wanted = self._reader, self._wanted
        with self._lock:
            # One part of a read: else a second request that comes late could write into what is looked at.
            if part.over or len(self._buffers) > 1 or wanted.given_up() or not reader.may_ask_again():
                return
            if not reader.budget.try_take(rounded(wanted.n_bytes)):
                return
            try:
                self._buffers.append(reader.buffer(wanted.n_bytes))
            except MemoryError:
                return
            part.asking += 1
        reader.metrics.add("hedged_requests")
        self._submit(part, 1, at_once=True)

    def _answer(self, part: _Part, which: int, error: LMCacheS3Error | None) -> None:
        """An answer, or an error, to a request for a part. An error counts only where nobody else is asking."""
        with self._lock:
            part.asking -= 1
            if part.over or (error is not None and part.asking):
                return
            part.over = True
            part.filled, part.error = which, error
            self._left -= 1
            last = not self._left
        if last:
            self._end()
        if which:
            self._reader.metrics.add("hedged_requests_won")
            part.slot.free()  # the first request hangs: others may go on

    def _end(self) -> None:
        wanted = self._wanted
        error = next((part.error for part in self._parts if part.error is not None), None)
        # A buffer may be looked at only if no request writes into it any more.
        which = max((part.filled or 0) for part in self._parts)
        if which:
            for part in self._parts:
                if not part.filled:
                    first, stop = part.where.start, part.where.stop
                    np.copyto(
                        np.frombuffer(self._buffers[1], np.uint8)[first:stop],
                        np.frombuffer(self._buffers[0], np.uint8)[first:stop],
                    )
        filled = Filled(self._buffers[which], wanted.extra_bytes)
        with self._lock:
            self._buffers.clear()
        if error is None and not wanted.given_up():
            wanted.done(filled)
            return
        del filled
        self._reader.budget.give_back(wanted.extra_bytes)
        wanted.done(error)
