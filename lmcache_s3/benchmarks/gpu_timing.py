"""How long things take on a device: by its own events, or by the clock until all is done. Medians of several runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_RUNS = 7


def device_s(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds that what `run` queues takes on the device; on a CPU, as `wall_s`."""
    import torch

    if device.type != "cuda":
        return wall_s(device, run)
    event: Any = torch.cuda.Event  # untyped
    run()
    taken: list[float] = []
    for _ in range(_RUNS):
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def wall_s(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds until `run` and what it queued are done; the first run, which compiles, does not count on a GPU."""
    import torch

    taken = []
    for _ in range(_RUNS + 1 if device.type == "cuda" else 1):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:] or taken)
