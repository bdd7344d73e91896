"""What a request to a store costs: latency, and bytes a second once they flow; measured on what is read anyway.

A straight line through (bytes, seconds) of past requests, newer ones counting more: seconds = latency + bytes ÷ rate.
From it: how many bytes are cheaper read through than asked around (`gap_bytes`), and how large a request must be not
to be mostly latency (`piece_bytes`).

Pure: no clock, no threads. Not thread-safe: its owner holds a lock. Raises nothing.
"""

from __future__ import annotations

_FADE = 0.97
"""What a request counts after the next one: about the last thirty make the line."""
_FIRST_LATENCY_S = 0.01
_FIRST_BYTES_PER_S = 200e6
_MOST_LATENCY_S = 1.0
_PIECES = 8
"""A load is cut into about so many: one is decoded while others are fetched, and little is left at the end."""

_LEAST_BYTES = 2 << 20
"""Less is no piece: a request costs money, and threads are woken for it."""
_LATENCY_PART = 4
"""Requests overlap, so one may be mostly latency, but no more than this to one."""


class Link:
    """The cost of one store's reads, as last seen."""

    def __init__(self) -> None:
        self.latency_s = _FIRST_LATENCY_S
        self.bytes_per_s = _FIRST_BYTES_PER_S
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def seen(self, n_bytes: int, seconds: float) -> None:
        """A request was answered. What sizes too much alike cannot tell apart stays as it was known."""
        x, y = float(n_bytes), seconds
        sums = (self._n, self._x, self._y, self._xx, self._xy)
        self._n, self._x, self._y, self._xx, self._xy = (
            _FADE * old + new for old, new in zip(sums, (1.0, x, y, x * x, x * y), strict=True)
        )
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x * mean_x
        slope = (self._xy / self._n - mean_x * mean_y) / spread if spread > (0.1 * mean_x) ** 2 else 0.0
        if slope > 0:
            self.bytes_per_s = 1 / slope
            self.latency_s = min(max(mean_y - slope * mean_x, 0.0), _MOST_LATENCY_S)
        elif mean_y > self.latency_s:
            self.bytes_per_s = max(mean_x / (mean_y - self.latency_s), 1.0)

    @property
    def gap_bytes(self) -> int:
        """As many unwanted bytes take as long as another request would."""
        return int(self.latency_s * self.bytes_per_s)

    def piece_bytes(self, load_bytes: int, most: int) -> int:
        """How many bytes to ask for at once in a load of `load_bytes`: a share of it, not mostly latency, ≤ `most`."""
        return max(1, min(most, max(load_bytes // _PIECES, self.gap_bytes // _LATENCY_PART, _LEAST_BYTES)))
