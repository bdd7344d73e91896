"""Threads that make requests to one store, as many at once as pay (`concurrency`); what comes later waits its turn.

A call has a *slot* while it runs, and may give it up earlier (when somebody else has answered for it): slots are what
is limited, threads only follow. Thread-safe. Raises `RuntimeError` from `submit` after `shutdown`, as executors do.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from lmcache_s3.concurrency import Concurrency
from lmcache_s3.errors import LMCacheS3Error, Unavailable

_SPARE_THREADS = 8
"""For second requests while all others hang."""


class Slot:
    """One request's place. `free` more than once is once."""

    def __init__(self, lane: Lane | None) -> None:
        self._lane = lane

    def free(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            lane._freed()


class Lane:
    """name: of its threads. most: slots at most. start: slots at first."""

    def __init__(
        self, name: str, most: int, *, start: int = 4, on_thread_start: Callable[[], None] | None = None
    ) -> None:
        self.in_flight = 0
        """Requests under way (`measured`)."""
        self._concurrency = Concurrency(most, start)
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[None], Callable[[Slot], object]]] = deque()
        self._for_later: deque[tuple[Future[None], Callable[[Slot], object]]] = deque()
        self._slots = 0
        self._closed = False
        self._threads = ThreadPoolExecutor(most + _SPARE_THREADS, name, on_thread_start or _nothing)

    @property
    def limit(self) -> int:
        return self._concurrency.limit

    def submit(
        self, call: Callable[[Slot], object], *, next_up: bool = False, at_once: bool = False, later: bool = False
    ) -> Future[None]:
        """Run `call(slot)` when a slot is free. next_up: before all that wait. later: after all that wait, also those
        that come meanwhile. at_once: now, without a slot."""
        future: Future[None] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the lane is shut down")
            if at_once:
                self._threads.submit(_run, future, call, Slot(None))
                return future
            if next_up:
                self._waiting.appendleft((future, call))
            else:
                (self._for_later if later else self._waiting).append((future, call))
            self._fill()
        return future

    def measured(self, request: Callable[[], None], n_bytes: int) -> float:
        """Make a request in this thread; seconds it took. What it takes, and whether it is refused, is learnt from."""
        with self._lock:
            self.in_flight += 1
            in_flight = self.in_flight
        start_s = time.perf_counter()
        try:
            request()
        except LMCacheS3Error as e:
            with self._lock:
                self.in_flight -= 1
                if isinstance(e, Unavailable) and e.kind in ("throttled", "timeout"):
                    self._concurrency.refused()
            raise
        except BaseException:
            with self._lock:
                self.in_flight -= 1
            raise
        seconds = time.perf_counter() - start_s
        with self._lock:
            self.in_flight -= 1
            self._concurrency.done(n_bytes, seconds, in_flight)
        return seconds

    def shutdown(self, *, wait: bool) -> None:
        """Take nothing more; what waits for a slot is cancelled, what has one runs to its end."""
        with self._lock:
            self._closed = True
            waiting = [*self._waiting, *self._for_later]
            self._waiting.clear()
            self._for_later.clear()
        for future, _ in waiting:
            future.cancel()
        self._threads.shutdown(wait=wait)

    def _freed(self) -> None:
        with self._lock:
            self._slots -= 1
            if not self._closed:
                self._fill()

    def _fill(self) -> None:
        """With the lock."""
        while (waiting := self._waiting or self._for_later) and self._slots < self._concurrency.limit:
            future, call = waiting.popleft()
            self._slots += 1
            self._threads.submit(_run, future, call, Slot(self))


def _run(future: Future[None], call: Callable[[Slot], object], slot: Slot) -> None:
    try:
        if not future.set_running_or_notify_cancel():
            return
        try:
            call(slot)
        except BaseException as e:  # noqa: BLE001 - handed to whoever holds the future, as an executor does
            future.set_exception(e)
        else:
            future.set_result(None)
    finally:
        slot.free()


def _nothing() -> None:
    pass
