"""When what a load fetched is kept in faster tiers: after it has ended, in the background. Raises nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lmcache_s3.budget import ByteBudget


class Promotions:
    """The promotions of one load: held back until it has ended, so that they do not compete with it. Thread-safe.

    start: runs a call in the background, False if there is none any more. room: for what waits, of all loads.
    """

    def __init__(self, start: Callable[[Callable[[], None]], bool], room: ByteBudget) -> None:
        self._start, self._room = start, room
        self._lock = threading.Lock()
        self._waiting: list[tuple[Callable[[], None], int]] | None = []

    def add(self, keep: Callable[[], None], n_bytes: int) -> bool:
        """Run `keep` in the background, later if there is room to wait; False if it will not be run any more."""
        with self._lock:
            if self._waiting is not None and self._room.try_take(n_bytes):
                self._waiting.append((keep, n_bytes))
                return True
        return self._start(keep)

    def begin(self) -> None:
        """The load has ended."""
        with self._lock:
            waiting, self._waiting = self._waiting or [], None
        for keep, n_bytes in waiting:
            self._room.give_back(n_bytes)
            self._start(keep)
