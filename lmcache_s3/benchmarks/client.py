"""`lmcache-s3 bench client`: our S3 client beside obstore and boto3, on the same server, in turn.

Each in a process of its own; ratios are medians over rounds in which all take their turn, so that a busy machine
weighs on all alike. Raises `Invalid` where no server is installed, `Unavailable` where a client fails.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import get_args

from lmcache_s3.benchmarks.figures import Figure, report
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.benchmarks.transfer_raw import Client, Range, RawClient, Spent
from lmcache_s3.testing.servers import CephRGW, S3Server, SeaweedFS

AT_ONCE = 8
_CLIENTS: tuple[Client, ...] = get_args(Client)
_BYTES = 256 << 20
"""Read and written in one turn."""
_SIZES_MIB = (8, 32)
_SMALL_BYTES, _SMALL = 1024, 200

Turns = dict[Client, list[Spent]]


def main(json_path: Path | None = None, *, total_bytes: int = _BYTES, small: int = _SMALL, rounds: int = 5) -> bool:
    """Run it, print the table, write the JSON; whether every goal was met. One to three minutes, 4 GiB of memory."""
    steps = Steps()
    figures: list[Figure] = []
    with ExitStack() as stack:
        server: S3Server = stack.enter_context(SeaweedFS() if CephRGW.missing() else CephRGW(capacity_bytes=6 << 30))
        url = server.make_bucket("lmcache-bench") + "/client"
        raw = {client: stack.enter_context(RawClient(url, server.env(), client)) for client in _CLIENTS}
        busy = {client: stack.enter_context(RawClient(url, server.env(), client, busy=True)) for client in _CLIENTS}
        for mib in _SIZES_MIB:
            keys = [f"{mib}/{i}" for i in range(max(total_bytes // (mib << 20), 1))]
            ranges = [Range(key, 0, mib << 20) for key in keys]
            with steps(f"PUT of {mib} MiB, {AT_ONCE} at once, on {type(server).__name__} (loopback)"):
                puts = _turns(raw, partial(_put, dict.fromkeys(keys, mib << 20)), 3)
            with steps(f"GET of {mib} MiB"):
                gets = _turns(raw, partial(_get, ranges), rounds)
            with steps(f"GET of {mib} MiB beside a busy thread of Python"):
                pressed = _turns(busy, partial(_get, ranges), rounds)
            figures += _large(f"put_{mib}mib", puts) + _large(f"get_{mib}mib", gets)
            figures.append(over(f"get_{mib}mib_busy", pressed, "obstore", None))
        with steps(f"GET of {_SMALL_BYTES} bytes, one at a time"):
            raw["ours"].put({"small": _SMALL_BYTES}, 1)
            wanted = [Range("small", 0, _SMALL_BYTES)] * small
            figures += _small(_turns(raw, lambda one: one.get(wanted, 1), 3), small)
    return report(figures, json_path)


def _put(sizes: dict[str, int], client: RawClient) -> Spent:
    return client.put(sizes, AT_ONCE)


def _get(ranges: list[Range], client: RawClient) -> Spent:
    return client.get(ranges, AT_ONCE)


def _turns(clients: dict[Client, RawClient], order: Callable[[RawClient], Spent], rounds: int) -> Turns:
    """After a turn that warms up."""
    turns: Turns = {client: [] for client in clients}
    for n in range(rounds + 1):
        for client, raw in clients.items():
            spent = order(raw)
            if n:
                turns[client].append(spent)
    return turns


def _large(name: str, turns: Turns) -> list[Figure]:
    goals = {"ours": 0.4}
    return [
        over(name, turns, "obstore", 0.9),
        over(name, turns, "boto3", None),
        *(
            _median(f"client.{name}_{one}_mb_per_s", [s.mb_per_s for s in turns[one]], "MB/s", "higher")
            for one in turns
        ),
        *(
            _median(f"client.{name}_{one}_cpu_s_per_gb", [s.cpu_s_per_gb for s in turns[one]], "s/GB", "lower", goal)
            for one, goal in ((one, goals.get(one)) for one in turns)
        ),
    ]


def _small(turns: Turns, n: int) -> list[Figure]:
    return [
        *(
            _median(f"client.get_1kib_{one}_ms", [1e3 * s.seconds / n for s in turns[one]], "ms", "lower")
            for one in turns
        ),
        *(
            _median(f"client.get_1kib_{one}_cpu_ms", [1e3 * s.cpu_s / n for s in turns[one]], "ms", "lower")
            for one in turns
        ),
    ]


def over(name: str, turns: Turns, other: Client, goal: float | None) -> Figure:
    """How many times as fast as `other` we are, the median over rounds."""
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(turns["ours"], turns[other], strict=True)]
    return _median(f"client.{name}_over_{other}", ratios, "×", "higher", goal)


def _median(name: str, values: Sequence[float], unit: str, better: str, goal: float | None = None) -> Figure:
    return Figure(name, statistics.median(values), unit, goal, "lower" if better == "lower" else "higher")
