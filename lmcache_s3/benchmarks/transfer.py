"""`lmcache-s3 bench transfer`: the data path against the raw client, and what it asks of store and memory.

Parts: `transfer_wire` (a real server), `transfer_shape` (counted), `transfer_time` (a made-up link).
"""

from __future__ import annotations

from pathlib import Path

from lmcache_s3.benchmarks.figures import report
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.benchmarks.transfer_shape import shape
from lmcache_s3.benchmarks.transfer_time import overlap, slow_tail
from lmcache_s3.benchmarks.transfer_wire import wire

EXTENTS = 8
"""Of 256 MiB: 2 GiB in all."""


def main(json_path: Path | None = None, *, extents: int = EXTENTS, rounds: int = 5, loads: int = 400) -> bool:
    """Run it, print the table, write the JSON; whether every goal was met. Some minutes and 10 GiB of memory."""
    steps = Steps()
    with steps("counting requests, bytes and memory"):
        figures = shape()
    with steps("overlapping on a link of 200 MB/s"):
        figures += overlap(extents=max(1, extents // 2), rounds=rounds)
    with steps(f"{2 * loads} loads, half of them with 1 % of requests that hang"):
        figures += slow_tail(loads=loads)
    figures += wire(steps, extents=extents, rounds=rounds)
    return report(figures, json_path)
