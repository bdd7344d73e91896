"""When to ask a second time: most requests of a size take about as long; one that takes much longer is asked for again.

Learnt for each size class (a power of two) from the last answers: the time that `QUANTILE` of them needed, times
`PATIENCE`. Second requests are at most `SHARE` of all, so a store that is slow for everybody is not asked twice.

Pure: no clock, no threads. Not thread-safe: its owner holds a lock. Raises nothing.
"""

from __future__ import annotations

from collections import defaultdict, deque

QUANTILE = 0.95
PATIENCE = 1.5
SHARE = 0.05
LEAST_S = 0.02
"""Nothing is asked again before that: where a request takes a millisecond, two take no less."""
_LEAST = 16
"""Answers of a size class before anything is known."""
_LAST = 128
_SAVED = 4.0
"""Second requests that may be saved up for bad moments; also what there is at the start."""


class Hedging:
    """Times of one store's requests, and how many second ones are allowed now."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_LAST))
        self._allowed = _SAVED

    def after_s(self, n_bytes: int) -> float | None:
        """How long to wait for an answer of this size before asking again; None while nothing is known."""
        times = self._times.get(n_bytes.bit_length())
        if times is None or len(times) < _LEAST:
            return None
        ordered = sorted(times)
        return max(LEAST_S, ordered[min(len(ordered) - 1, int(QUANTILE * len(ordered)))] * PATIENCE)

    def asked(self) -> None:
        """A first request was made."""
        self._allowed = min(_SAVED, self._allowed + SHARE)

    def may_ask_again(self) -> bool:
        """Take one second request out of what is allowed; False if none is."""
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True

    def answered(self, n_bytes: int, seconds: float) -> None:
        """The first answer to a request, whichever of two gave it, and how long that one took."""
        self._times[n_bytes.bit_length()].append(seconds)
