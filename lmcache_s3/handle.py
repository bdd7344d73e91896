"""What a caller holds of work that goes on in other threads: `Handle`; what the workers hold of it: `Work`.

Invariants: a piece of work ends once, with a result or an error; nothing delivered through `Work.deliver` runs after
the end, nor is still running when `Handle.done()` first says True. That is what lets the owner of a buffer reuse it
the moment the handle is done, however it ended (a deadline, a cancel, a failure). No thread is ever stopped by force:
a worker notices at its next delivery that the work is over.
Raises `Unavailable` (timeout: the deadline; cancelled; closed) and whatever the work itself ended with.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic, TypeVar

from lmcache_s3.alarms import Alarms
from lmcache_s3.errors import LMCacheS3Error, Unavailable

T = TypeVar("T")
U = TypeVar("U")


class Work(Generic[T]):
    """The workers' side. Thread-safe.

    on_abort: asked for the outcome when the work is cut short by `error`; it may return a partial result or raise.
    Called once, after the last delivery has ended, with no lock held.
    """

    def __init__(self, total_bytes: int = 0, on_abort: Callable[[LMCacheS3Error], T] | None = None) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self.deadline_s = 0.0
        self._on_abort = on_abort
        self._gate = threading.Condition()
        self._delivering = 0
        self._over = False
        self._future: Future[T] = Future()
        self._future.set_running_or_notify_cancel()  # only we end it
        self.handle: Handle[T] = Handle(self, self._future)

    @property
    def over(self) -> bool:
        """The work has ended or is ending: stop as soon as convenient."""
        return self._over

    def deliver(self, call: Callable[[], None], n_bytes: int = 0) -> bool:
        """Run `call` unless the work is over; returns whether it ran. Deliveries of several threads run at once."""
        with self._gate:
            if self._over:
                return False
            self._delivering += 1
        try:
            call()
        finally:
            with self._gate:
                self._delivering -= 1
                self.done_bytes += n_bytes
                self._gate.notify_all()
        return True

    def advance(self, n_bytes: int) -> None:
        """Progress without a delivery."""
        with self._gate:
            self.done_bytes += n_bytes

    def finish(self, result: T) -> bool:
        """End with a result; False if it had ended already."""
        if not self._close():
            return False
        self._on_abort = None  # it may hold the caller's buffers
        self._future.set_result(result)
        return True

    def fail(self, error: BaseException) -> bool:
        """End with an error; False if it had ended already."""
        if not self._close():
            return False
        self._on_abort = None
        self._future.set_exception(error)
        return True

    def abort(self, error: LMCacheS3Error) -> bool:
        """End early: with what `on_abort` makes of it, else with the error; False if it had ended already."""
        if not self._close():
            return False
        on_abort, self._on_abort = self._on_abort, None
        if on_abort is None:
            self._future.set_exception(error)
            return True
        try:
            result = on_abort(error)
        except LMCacheS3Error as e:
            self._future.set_exception(e)
        else:
            self._future.set_result(result)
        return True

    def time_out(self) -> None:
        """Its deadline has come."""
        self.abort(Unavailable(f"not done within {self.deadline_s:g} s", kind="timeout"))

    def _close(self) -> bool:
        """Shut the gate and wait for deliveries under way (memory copies: short)."""
        with self._gate:
            if self._over:
                return False
            self._over = True
            while self._delivering:
                self._gate.wait()
            return True


class Handle(Generic[T]):
    """A result to come. Await it, or ask for `result()`; `cancel()` when it is no longer wanted. Thread-safe."""

    def __init__(self, work: Work[T], future: Future[T]) -> None:
        self._work = work
        self._future = future
        self._source: Handle | None = None

    @property
    def total_bytes(self) -> int:
        """Stored bytes the work has to move; 0 while unknown."""
        return self._work.total_bytes if self._source is None else self._source.total_bytes

    @property
    def done_bytes(self) -> int:
        return self._work.done_bytes if self._source is None else self._source.done_bytes

    def done(self) -> bool:
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for the outcome. Raises `Unavailable(timeout)` if it is not there in time; the work then goes on."""
        try:
            return self._future.result(timeout_s)
        except FutureTimeout:
            if self._future.done():
                raise
            raise Unavailable(f"no result after {timeout_s} s", kind="timeout") from None

    def error(self) -> BaseException | None:
        """What it ended with instead of a result; None if it has one, or is not done."""
        return self._future.exception() if self._future.done() else None

    def cancel(self) -> bool:
        """End the work now: `result` raises `Unavailable(cancelled)`. False if it was done already.

        Waits for a delivery under way, so not to be called from within one (a sink).
        """
        if self._source is not None:
            return self._source.cancel()
        return self._work.fail(Unavailable("cancelled by its caller", kind="cancelled"))

    def add_done_callback(self, call: Callable[[Handle[T]], None]) -> None:
        """Call `call(handle)` when done, from the thread that ended it; at once if it is done. Must not raise."""
        self._future.add_done_callback(lambda _: call(self))

    def then(self, call: Callable[[T], U]) -> Handle[U]:
        """A handle for `call(result)`: same progress, same errors; cancelling it cancels this one.

        `call` runs in the thread that ends this one, must be quick, and may raise `LMCacheS3Error`.
        """
        work: Work[U] = Work()

        def pass_on(_: Handle[T]) -> None:
            error = self.error()
            if error is not None:
                work.fail(error)
                return
            try:
                work.finish(call(self.result()))
            except LMCacheS3Error as e:
                work.fail(e)

        work.handle._source = self
        self.add_done_callback(pass_on)
        return work.handle

    def __await__(self) -> Generator[object, None, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            self.cancel()
            raise

    @classmethod
    def completed(cls, result: T) -> Handle[T]:
        """A handle that is done."""
        work: Work[T] = Work()
        work.finish(result)
        return work.handle


class Deadlines(Alarms):
    """Aborts work whose time is up."""

    def watch(self, work: Work, deadline_s: float) -> None:
        """Abort `work` with `Unavailable(timeout)` in `deadline_s` seconds unless it is over by then."""
        work.deadline_s = deadline_s
        self.after(deadline_s, work.time_out)
