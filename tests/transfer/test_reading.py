"""Reads in parts, and the slots and memory that they wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from lmcache_s3.alarms import Alarms
from lmcache_s3.budget import ByteBudget
from lmcache_s3.errors import LMCacheS3Error, Unavailable
from lmcache_s3.handle import Work
from lmcache_s3.lane import Lane
from lmcache_s3.metrics import Metrics
from lmcache_s3.reading import Filled, Reader, Wanted
from lmcache_s3.tiers.buffers import BufferPool

MIB = 1 << 20


class ThrottlingOnce:
    """A bucket whose first request is refused."""

    def __init__(self) -> None:
        self.requests = 0

    def read_into(self, cell: object, start: int, into: memoryview) -> None:
        self.requests += 1
        if self.requests == 1:
            raise Unavailable("slow down", kind="throttled")


def step(submit: Callable[[], Future[None]], work: Work[Any] | None = None) -> bool:
    submit()
    return True


def test_reads_that_wait_for_memory_do_not_keep_who_has_it_from_its_slots() -> None:
    """All slots are those of reads that wait for memory; then it comes, and the store throttles who got it: there are
    fewer slots from then on, and the others have them all."""
    lane, budget, alarms = Lane("test", 4, start=4), ByteBudget(40 * MIB), Alarms()
    bucket: Any = ThrottlingOnce()
    reader = Reader(bucket, lane, budget, BufferPool(0), alarms, step, Metrics(), part_bytes=4 * MIB)
    ended, all_ended = [], threading.Event()

    def done(outcome: Filled | LMCacheS3Error | None) -> None:
        ended.append(type(outcome))
        del outcome
        if len(ended) == 4:
            all_ended.set()

    budget.take(30 * MIB)
    cell: Any = None
    for _ in range(4):
        reader.read(Wanted(cell, 0, 30 * MIB, 0, Work(), lambda: False, lambda: None, done))
    while len(budget._queue) < 4:
        threading.Event().wait(0.01)
    budget.give_back(30 * MIB)
    assert all_ended.wait(20)
    assert sorted(one.__name__ for one in ended) == ["Filled", "Filled", "Filled", "Unavailable"]
    lane.shutdown(wait=True)
    alarms.close()
