"""How many requests at once a store is worth: learnt from what it carried with fewer and with more.

Levels form a ladder (1, 2, 3, 4, 6, 8, 12 …). On each, the rate of a request times how many were under way (median of
a window: stragglers do not count) is what the store carries there. A step up is kept while it brings at least `WORTH`
of what its added requests promise; so a store that answers each client slowly gets many requests, a full link or a busy
processor no more than fill it. What was learnt grows old and is tried again. A store that throttles halves the level at
once.

Pure: no clock, no threads. Not thread-safe: its owner holds a lock. Raises `Invalid` for a limit below 1.
"""

from __future__ import annotations

import statistics

from lmcache_s3.errors import Invalid

WORTH = 0.15
"""Of the throughput that added requests promise (if each were as fast as those before), what they must bring."""

_LEAST = 2
"""Fewer only where the store throttles: one request leaves the link idle between its answer and the next."""
_WINDOW = 8
"""Requests measured on a level, at least, before the next step."""
_OLD_WINDOWS = 24
"""After so many windows what is known of another level is tried again."""
_BUSY = 0.75
"""Requests count that began while at least this part of the level was under way: others say nothing about it."""


def ladder(most: int) -> list[int]:
    """The levels up to `most`, which is the last."""
    levels, step = [1, 2, 3], 4
    while step < most:
        levels += [step, step + step // 2]
        step *= 2
    return [*(level for level in levels if level < most), most]


class Concurrency:
    """most: never more at once. start: the first level, rounded down to the ladder's."""

    def __init__(self, most: int, start: int = 4) -> None:
        if most < 1:
            raise Invalid(f"at most {most} requests at once make no sense: 1 is the least", kind="setting")
        self._levels = ladder(most)
        self._at = max((i for i, level in enumerate(self._levels) if level <= start), default=0)
        self._rates: list[float] = []
        self._windows = 0
        self._known: dict[int, tuple[float, int]] = {}

    @property
    def limit(self) -> int:
        """Requests at once from now on."""
        return self._levels[self._at]

    def done(self, n_bytes: int, seconds: float, in_flight: int) -> None:
        """A request that was answered. in_flight: how many were under way when it began, itself included."""
        if in_flight < _BUSY * self.limit or n_bytes <= 0 or seconds <= 0:
            return
        self._rates.append(n_bytes / seconds * in_flight)
        if len(self._rates) >= max(_WINDOW, self.limit):
            self._known[self._at] = (statistics.median(self._rates), self._windows)
            self._rates.clear()
            self._windows += 1
            self._at = self._next()

    def refused(self) -> None:
        """The store throttles, or does not answer: half as many."""
        half = self.limit / 2
        self._at = max((i for i, level in enumerate(self._levels) if level <= half), default=0)
        self._rates.clear()
        self._known.clear()

    def _carried(self, at: int) -> float | None:
        """Bytes a second on a level; None if there is none, or nobody knows any more."""
        known = self._known.get(at)
        return known[0] if known is not None and self._windows - known[1] <= _OLD_WINDOWS else None

    def _worth(self, at: int) -> bool:
        """Does the step up to this level pay? Both sides are known."""
        more, fewer = self._carried(at), self._carried(at - 1)
        assert more is not None
        assert fewer is not None
        promised = self._levels[at] / self._levels[at - 1] - 1
        return more >= fewer * (1 + WORTH * promised)

    def _next(self) -> int:
        at, last = self._at, len(self._levels) - 1
        above = self._carried(at + 1) if at < last else None
        below = self._carried(at - 1) if at else None
        pays = below is None or self._worth(at)
        if at < last and (self._worth(at + 1) if above is not None else pays):
            return at + 1
        if at and (below is None or not pays) and self._levels[at - 1] >= _LEAST:
            return at - 1
        return at
