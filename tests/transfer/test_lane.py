"""Lanes and alarms: calls wait for slots in order, slots can be given up early, alarms ring and keep nothing alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest

from lmcache_s3.alarms import Alarms
from lmcache_s3.errors import Unavailable
from lmcache_s3.lane import Lane, Slot


def test_no_more_run_than_there_are_slots_and_what_is_next_up_goes_first() -> None:
    lane = Lane("test", 8, start=1)
    go, order = threading.Event(), list[str]()

    def call(name: str) -> Callable[[Slot], object]:
        return lambda slot: order.append(name)

    def waits(slot: Slot) -> None:
        go.wait(5)
        order.append("first")

    first = lane.submit(waits)
    later = [lane.submit(call("last"), later=True), *(lane.submit(call(name)) for name in ("a", "b"))]
    later.append(lane.submit(call("next"), next_up=True))
    lane.submit(call("at once"), at_once=True).result(5)
    assert order == ["at once"]
    go.set()
    for future in (first, *later):
        future.result(5)
    assert order == ["at once", "first", "next", "a", "b", "last"]
    lane.shutdown(wait=True)


def test_a_slot_that_was_given_up_serves_the_next() -> None:
    lane = Lane("test", 1, start=1)
    hanging = threading.Event()

    def hangs(slot: Slot) -> None:
        slot.free()
        slot.free()
        hanging.wait(5)

    stuck = lane.submit(hangs)
    lane.submit(lambda slot: None).result(5)
    assert not stuck.done()
    hanging.set()
    stuck.result(5)
    lane.shutdown(wait=True)


def test_what_is_raised_is_in_the_future_and_throttling_is_heeded() -> None:
    lane = Lane("test", 8, start=8)

    def request() -> None:
        raise Unavailable("slow down", kind="throttled")

    with pytest.raises(Unavailable):
        lane.submit(lambda slot: lane.measured(request, 1)).result(5)
    assert (lane.limit, lane.in_flight) == (4, 0)
    lane.shutdown(wait=True)


def test_shut_down_cancels_what_waits() -> None:
    lane = Lane("test", 1, start=1)
    go = threading.Event()
    running = lane.submit(lambda slot: go.wait(5))
    waiting = lane.submit(lambda slot: None)
    lane.shutdown(wait=False)
    with pytest.raises(CancelledError):
        waiting.result(5)
    with pytest.raises(RuntimeError):
        lane.submit(lambda slot: None)
    go.set()
    running.result(5)


class Bell:
    def __init__(self, rung: list[int], n: int) -> None:
        self.rung, self.n = rung, n

    def ring(self) -> None:
        self.rung.append(self.n)


def test_alarms_ring_in_order_unless_nobody_is_there() -> None:
    alarms, rung = Alarms(), list[int]()
    late, early, gone = Bell(rung, 2), Bell(rung, 1), Bell(rung, 0)
    alarms.after(0.06, late.ring)
    alarms.after(0.02, early.ring)
    alarms.after(0.001, gone.ring)
    del gone
    end_s = time.monotonic() + 5
    while len(rung) < 2 and time.monotonic() < end_s:
        time.sleep(0.005)
    alarms.after(60, late.ring)
    alarms.close()
    assert rung == [1, 2]
