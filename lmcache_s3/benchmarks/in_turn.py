"""Fair comparison on a machine that is not ours alone: rivals take turns at each small part of the work, so that what
disturbs one disturbs all; ratios are medians over rounds. Raises nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


class Race:
    """rivals: each does part i of the work, 0 … parts − 1. before: called ahead of each, untimed. warm_up: a
    round before the others that does not count."""

    def __init__(
        self,
        rivals: Mapping[str, Callable[[int], object]],
        parts: int,
        rounds: int,
        before: Callable[[], None] | None = None,
        *,
        warm_up: bool = True,
    ) -> None:
        rounds += warm_up
        self.seconds: dict[str, list[float]] = {name: [0.0] * rounds for name in rivals}
        for i in range(rounds):
            for part in range(parts):
                for name, rival in rivals.items():
                    if before is not None:
                        before()
                    start = time.perf_counter()
                    rival(part)
                    self.seconds[name][i] += time.perf_counter() - start
        for taken in self.seconds.values():
            del taken[: int(warm_up)]

    def median_s(self, name: str) -> float:
        """Seconds for all parts."""
        return statistics.median(self.seconds[name])

    def speed(self, name: str, than: str) -> float:
        """How many times as fast one is as another."""
        both = zip(self.seconds[name], self.seconds[than], strict=True)
        return statistics.median([other / one for one, other in both])
