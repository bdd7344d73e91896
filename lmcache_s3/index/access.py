"""Which extents were hit lately, and when that is worth telling: what eviction by last access goes by.

Hits are gathered in memory (no I/O, microseconds) and published about once an interval, for extents whose recorded last
access is older than the interval: a busy extent costs one name in a delta per interval and process, however often it is
hit. Times in the manifest are version numbers, so a small map of when which version was seen here says what is old.
A hint throughout: what is lost only makes an extent look less used than it is, by an interval.
Raises nothing.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable

from lmcache_s3.index.manifest import State
from lmcache_s3.types import ExtentName

MAX_NAMES = 2**16
"""Names gathered at most; later ones are dropped (counted). About 20 MiB."""
NAMES_PER_DELTA = 4096
_SAMPLES = 64
"""Moments remembered per interval."""


class Access:
    """`touch` from any thread; the rest from the one that moves the log.

    interval_s: seconds between two publications, and how old a recorded access must be. clock, rng: injected. The first
    publication comes after a random part of the interval: processes started together do not publish together.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        rng: random.Random,
        interval_s: float,
        *,
        max_names: int = MAX_NAMES,
        names_per_delta: int = NAMES_PER_DELTA,
    ) -> None:
        self._clock, self._rng, self._interval_s = clock, rng, interval_s
        self._max_names, self._names_per_delta = max_names, names_per_delta
        self._lock = threading.Lock()
        self._touched: set[ExtentName] = set()
        self._since_s = clock()
        """When the first of them was."""
        self._seen: deque[tuple[float, int]] = deque()
        self._next_s = clock() + rng.uniform(0.0, interval_s)
        self.dropped = 0
        """Names dropped since start, because too many were gathered."""

    def touch(self, names: Iterable[ExtentName]) -> None:
        """These were loaded just now."""
        with self._lock:
            if not self._touched:
                self._since_s = self._clock()
            for name in names:
                if len(self._touched) < self._max_names:
                    self._touched.add(name)
                elif name not in self._touched:
                    self.dropped += 1

    def seen(self, version: int) -> None:
        """The log was read up to `version` just now."""
        seen, now = self._seen, self._clock()
        if seen and now - seen[-1][0] < self._interval_s / _SAMPLES:
            return
        seen.append((now, version))
        while len(seen) >= 2 and now - seen[1][0] >= self._interval_s:
            seen.popleft()

    @property
    def gathered(self) -> int:
        return len(self._touched)

    @property
    def due_s(self) -> float | None:
        """When there is something to publish, by the clock; None: nothing was hit."""
        return max(self._next_s, self._since_s) if self._touched else None

    def take(self, state: State) -> tuple[ExtentName, ...]:
        """What is worth a delta by now, at most `names_per_delta` of it (then the rest stays due); forgets what it
        gives and what is recorded well enough, or no longer live."""
        with self._lock:
            touched, self._touched = self._touched, set()
        old = self._old_version()
        worth: list[ExtentName] = []
        rest: set[ExtentName] = set()
        for name in touched:
            if len(worth) == self._names_per_delta:
                rest.add(name)
                continue
            live = state.extents.get(name)
            if live is not None and live.last_access <= old:
                worth.append(name)
        if rest:
            self.touch(rest)
        else:
            self._next_s = self._clock() + self._interval_s * self._rng.uniform(0.9, 1.1)
        return tuple(worth)

    def _old_version(self) -> int:
        """The newest version known to be as old as the interval. Watching for less than that, the first version seen:
        how old that was nobody told us, and telling once too often costs little."""
        return self._seen[0][1] if self._seen else 0
