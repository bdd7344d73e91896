"""Which resting chunks go up together, and when: the plan of write-behind. Pure: no I/O, the caller's clock.

Chunks of a prompt that grows (a chat's turns, what is decoded) come a few at a time. Each upload costs the same
requests however small it is, so they rest (`resting.py`) and go up as one extent: when an extent's worth has come
together, when the oldest of them has rested for `age_s`, or when more rests than `max_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PRESSURE = 0.75
"""`max_bytes` as a part of the memory for what rests: what comes while uploads make room has room itself."""
_MOST_CHUNKS = 65_535
"""Of an extent: positions are u16 in the index."""
_NEARLY = 0.75
"""When one run is old enough, those of so much of that age go with it: they share a version of the index."""


@dataclass(slots=True)
class Run:
    """Consecutive chunks of one prompt that rest. parent: prefix hash of the chunk before the first. n_bytes: of all of
    them. since_s: when the first one came."""

    parent: bytes
    hashes: list[bytes]
    n_bytes: int
    since_s: float


class WriteBehind:
    """What rests, as runs; oldest first. Not thread-safe.

    extent_bytes: of an extent at most (one chunk at least), as stored. age_s: how long a chunk rests at most.
    max_bytes: that rest at most.
    """

    def __init__(self, *, extent_bytes: int, age_s: float, max_bytes: int) -> None:
        self._extent_bytes, self._age_s, self._max_bytes = extent_bytes, age_s, max_bytes
        self._runs: dict[bytes, Run] = {}
        """By the prefix hash of the first chunk, in the order in which they began."""
        self._ends: dict[bytes, Run] = {}
        """By that of the last."""
        self.n_bytes = 0

    def add(self, parent: bytes, hashes: Sequence[bytes], n_bytes: int, now_s: float) -> None:
        """Chunks rest now that did not before, `n_bytes` in all; they follow the chunk `parent`."""
        if not hashes:
            return
        self.n_bytes += n_bytes
        left, left_bytes = list(hashes), n_bytes
        grown = self._ends.get(parent)
        while left:
            if grown is None or self._is_full(grown):
                grown = self._runs[left[0]] = Run(parent, [], 0, now_s)
            else:
                del self._ends[parent]
            fit = (self._extent_bytes - grown.n_bytes) * len(left) // max(left_bytes, 1)
            some = left[: min(max(fit, 1), _MOST_CHUNKS - len(grown.hashes))]
            some_bytes = left_bytes * len(some) // len(left)
            grown.hashes += some
            grown.n_bytes += some_bytes
            parent = some[-1]
            self._ends[parent] = grown
            left, left_bytes = left[len(some) :], left_bytes - some_bytes

    def _is_full(self, run: Run) -> bool:
        """Whether another chunk like those in it is too much."""
        n = len(run.hashes)
        return n >= _MOST_CHUNKS or run.n_bytes * (n + 1) > self._extent_bytes * n

    @property
    def next_due_s(self) -> float | None:
        """When the oldest will have rested long enough; None if nothing rests."""
        return next((run.since_s + self._age_s for run in self._runs.values()), None)

    def due(self, now_s: float) -> list[Run]:
        """Take what is to go up now, oldest first."""
        due: list[Run] = []
        next_due_s = self.next_due_s
        anyway = next_due_s is not None and now_s >= next_due_s
        age_s = _NEARLY * self._age_s if anyway else self._age_s
        for first, run in list(self._runs.items()):
            old = now_s >= run.since_s + age_s
            if old or self._is_full(run) or self.n_bytes > self._max_bytes:
                due.append(self._runs.pop(first))
                del self._ends[run.hashes[-1]]
                self.n_bytes -= run.n_bytes
        return due

    def flush(self) -> list[Run]:
        """Take everything, oldest first."""
        due = list(self._runs.values())
        self._runs.clear()
        self._ends.clear()
        self.n_bytes = 0
        return due
