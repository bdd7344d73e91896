"""Fair comparison on a machine that is not ours alone: actions run in turn, medians of their times. Raises nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def in_turn(
    actions: dict[str, Callable[[], None]], rounds: int, before: Callable[[], None] | None = None
) -> dict[str, float]:
    """Median seconds of each, run in turn so that what disturbs the machine disturbs all."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(rounds + 1):
        for name, action in actions.items():
            if before is not None:
                before()
            start = time.perf_counter()
            action()
            if i:  # the first is for warming up
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
