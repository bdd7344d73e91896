"""A fixed budget of bytes in flight, shared by all loads and stores of a process.

Invariant: bytes held never exceed the budget. Loads wait their turn (first come, first served, so a large piece is not
starved by small ones); stores never wait: what does not fit now is refused, and dropped first.
Raises `Unavailable(full)` from `take`, `Bug` when more is given back than was held.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from lmcache_s3.errors import Bug, Invalid, Unavailable


class ByteBudget:
    """`total_bytes` to hand out. Thread-safe."""

    def __init__(self, total_bytes: int) -> None:
        if total_bytes <= 0:
            raise Invalid(f"a budget must be positive, not {total_bytes} bytes", kind="setting")
        self.total_bytes = total_bytes
        self.held_bytes = 0
        self.peak_bytes = 0
        # Re-entrant: a buffer may die, and give its bytes back, wherever the collector runs.
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[object] = deque()

    def wait(self, n_bytes: int, gave_up: Callable[[], bool], poll_s: float = 0.05) -> bool:
        """Take `n_bytes` when it is our turn and they are free; False once `gave_up()`, or if they can never fit."""
        if n_bytes > self.total_bytes:
            return False
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or self.held_bytes + n_bytes > self.total_bytes:
                    if gave_up():
                        return False
                    self._changed.wait(poll_s)
                self._hold(n_bytes)
                return True
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def try_take(self, n_bytes: int, share: float = 1.0) -> bool:
        """Take `n_bytes` now, or not at all; never more than `share` of the budget in all, never before who waits."""
        with self._changed:
            if self._queue or self.held_bytes + n_bytes > self.total_bytes * share:
                return False
            self._hold(n_bytes)
            return True

    def take(self, n_bytes: int, share: float = 1.0) -> None:
        """`try_take` or raise `Unavailable(full)`."""
        if not self.try_take(n_bytes, share):
            raise Unavailable(
                f"{n_bytes} bytes more do not fit into staging_bytes={self.total_bytes} ({self.held_bytes} in flight)",
                kind="full",
                key="staging_bytes",
            )

    def too_small(self, n_bytes: int) -> Unavailable:
        """The error for a piece that can never fit."""
        text = f"a piece of {n_bytes} bytes does not fit into staging_bytes={self.total_bytes}"
        return Unavailable(text, kind="full", key="staging_bytes")

    def give_back(self, n_bytes: int) -> None:
        with self._changed:
            if n_bytes > self.held_bytes:
                raise Bug(f"{n_bytes} bytes given back, {self.held_bytes} held")
            self.held_bytes -= n_bytes
            self._changed.notify_all()

    def _hold(self, n_bytes: int) -> None:
        self.held_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
