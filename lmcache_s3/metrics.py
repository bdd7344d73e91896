"""Counters and timings of one process, by name. Thread-safe; no exporter, no clock.

Names are short words with their unit at the end (`load_bytes`, `load_s`, `loads`); they are only ever added to.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """A series of observations, in the unit its name ends in."""

    count: int
    total: float
    worst: float


class Metrics:
    """Plain counters (`add`) and series (`observe`)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._series: dict[str, Timing] = {}

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] += amount

    def observe(self, name: str, value: float) -> None:
        with self._lock:
            old = self._series.get(name, Timing(0, 0.0, 0.0))
            self._series[name] = Timing(old.count + 1, old.total + value, max(old.worst, value))

    def count(self, name: str) -> int:
        with self._lock:
            return self._counts[name]

    def snapshot(self) -> dict[str, int | float]:
        """Every counter by name; a series as `<name>_count`, `<name>_total` and `<name>_worst`."""
        with self._lock:
            out: dict[str, int | float] = dict(self._counts)
            for name, one in self._series.items():
                out |= {f"{name}_count": one.count, f"{name}_total": one.total, f"{name}_worst": one.worst}
        return out
