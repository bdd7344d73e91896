"""How fast this process commits, and how fast the log grows: contention seen here, versions per second seen by all.

Pure arithmetic over an injected generator and clock; no I/O, no waiting (callers sleep). Nothing here is needed for
safety: a wrong pace costs money or time, never an entry.
Raises nothing.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Pace:
    """The span over which creates are spread, as of the races seen lately. One a process.

    A lost race doubles it, a won one halves it: with many writers it settles where about as many creates win as lose,
    and goes back to nothing when they are gone. Full jitter: a wait is uniform from 0 to the span, since writers that
    wait alike collide again. base_s: the first span, about a create's time; cap_s: the longest (both seconds).
    """

    rng: random.Random
    base_s: float = 0.1
    cap_s: float = 5.0
    group_cap_s: float = 1.0
    """The longest a first commit of a group waits for others."""
    span_s: float = 0.0

    def lost(self) -> None:
        self.span_s = min(self.cap_s, max(self.base_s, 2.0 * self.span_s))

    def won(self) -> None:
        self.span_s = self.span_s / 2 if self.span_s > self.base_s else 0.0

    def backoff_s(self) -> float:
        """Seconds to wait after a lost race."""
        return self.rng.uniform(0.0, self.span_s)

    def group_wait_s(self) -> float:
        """Seconds that what was queued first waits, so that more rides in its version; 0 without contention."""
        return self.rng.uniform(0.0, min(self.group_cap_s, self.span_s)) if self.span_s > 0 else 0.0


@dataclass(slots=True)
class Rate:
    """Versions per second over the last `window_s` seconds at least, from the versions that looks at the log found.

    Never too many: what came during a long pause counts over all of it, and what was there before the first look does
    not count. A burst shows as soon as it would be the average of a whole window.
    """

    clock: Callable[[], float]
    window_s: float = 10.0
    _seen: deque[tuple[float, int]] | None = None

    def seen(self, version: int) -> None:
        """The log was read up to `version` just now."""
        seen, now = self._seen, self.clock()
        if seen is None:
            seen = self._seen = deque()
        if len(seen) >= 2 and now - seen[-2][0] < self.window_s / 32:  # bounded, however often it is looked
            seen.pop()
        seen.append((now, version))
        while len(seen) >= 2 and now - seen[1][0] >= self.window_s:
            seen.popleft()

    def per_s(self) -> float:
        if not self._seen:
            return 0.0
        (then, old), (now, new) = self._seen[0], self._seen[-1]
        return (new - old) / max(self.window_s, now - then)
