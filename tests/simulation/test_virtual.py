"""Virtual time: order, own times, waiting, crashes and stalls, the pool of greenlets; the same seed is the same run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmcache_s3.errors import Bug
from lmcache_s3.testing.virtual import Deadlock, Signal, Simulation, VirtualExecutor


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation(1) as simulation:
        yield simulation


def test_processes_run_in_the_order_of_their_times_and_ties_in_the_order_they_came(sim: Simulation) -> None:
    seen: list[tuple[float, str]] = []

    def body(name: str, pause_s: float) -> None:
        for _ in range(3):
            sim.sleep(pause_s)
            seen.append((sim.clock(), name))

    sim.start(lambda: body("a", 2.0))
    sim.start(lambda: body("b", 3.0))
    sim.run_until(20.0)
    assert seen == [(2.0, "a"), (3.0, "b"), (4.0, "a"), (6.0, "b"), (6.0, "a"), (9.0, "b")]
    assert sim.clock() == 20.0


def test_who_is_ahead_is_seen_by_nobody_until_it_catches_up(sim: Simulation) -> None:
    seen: list[str] = []

    def ahead() -> None:
        sim.ahead(5.0)
        assert sim.clock() == 5.0
        assert seen == []
        sim.catch_up()
        seen.append("ahead")

    def other() -> None:
        sim.sleep(4.0)
        seen.append("other")

    sim.start(ahead)
    sim.start(other)
    sim.run_until(10.0)
    assert seen == ["other", "ahead"]


def test_a_signal_wakes_who_waits_and_a_time_out_is_told_apart(sim: Simulation) -> None:
    signal, seen = Signal(sim), []

    def waiter(timeout_s: float) -> None:
        seen.append((signal.wait(timeout_s), sim.clock()))

    sim.start(lambda: waiter(1.0))
    sim.start(lambda: waiter(9.0))
    sim.run_until(3.0)
    signal.set()
    sim.run_until(20.0)
    assert seen == [(False, 1.0), (True, 3.0)]


def test_a_waiter_that_is_ahead_is_not_woken_in_its_past(sim: Simulation) -> None:
    signal, seen = Signal(sim), []

    def waiter() -> None:
        sim.ahead(2.0)
        signal.wait(60.0)
        seen.append(sim.clock())

    sim.start(waiter)
    sim.run_until(1.0)
    signal.set()
    sim.run_until(5.0)
    assert seen == [2.0]


def test_a_pool_runs_so_many_calls_at_a_time_and_keeps_the_order_of_answers(sim: Simulation) -> None:
    pool = VirtualExecutor(sim, 2)

    def call(seconds: float) -> float:
        sim.sleep(seconds)
        return seconds

    assert list(pool.map(call, [3.0, 1.0, 1.0, 2.0])) == [3.0, 1.0, 1.0, 2.0]
    assert sim.clock() == 4.0  # 3 beside 1 + 1, then 2 from second 2 on


def test_calls_that_run_ahead_share_the_pool_too(sim: Simulation) -> None:
    list(VirtualExecutor(sim, 4).map(sim.ahead, [1.0] * 8))
    assert sim.clock() == 2.0


def test_what_a_call_in_the_pool_raises_comes_out_where_its_result_is_asked_for(sim: Simulation) -> None:
    def call() -> None:
        sim.sleep(1.0)
        raise KeyError("here")

    future = VirtualExecutor(sim, 1).submit(call)
    assert isinstance(future.exception(), KeyError)
    with pytest.raises(KeyError, match="here"):
        future.result()


def test_a_result_can_be_waited_for_a_while(sim: Simulation) -> None:
    future = VirtualExecutor(sim, 1).submit(sim.sleep, 3.0)
    with pytest.raises(TimeoutError):
        future.result(1.0)
    assert sim.clock() == 1.0
    sim.sleep(0.5)
    assert future.result(5.0) is None
    assert sim.clock() == 3.0
    sim.sleep(10.0)  # no wake-up is left over
    assert sim.clock() == 13.0


def test_what_a_process_raises_comes_out_of_the_run(sim: Simulation) -> None:
    def body() -> None:
        sim.sleep(1.0)
        raise KeyError("here")

    sim.start(body)
    with pytest.raises(KeyError, match="here"):
        sim.run_until(2.0)


def test_a_crash_takes_the_owner_and_what_it_started_without_cleaning_up(sim: Simulation) -> None:
    seen: list[str] = []

    def body(name: str) -> None:
        try:
            list(VirtualExecutor(sim, 2).map(sim.sleep, [5.0, 6.0]))
            seen.append(name)
        finally:
            seen.append(f"{name} cleans up")

    sim.start(lambda: body("a"), owner="a")
    sim.start(lambda: body("b"), owner="b")
    sim.run_until(1.0)
    sim.crash("a")
    sim.run_until(20.0)
    assert seen == ["b", "b cleans up"]
    sim.start(lambda: sim.crash("c"), owner="c")
    with pytest.raises(Bug, match="cannot crash itself"):
        sim.run_until(30.0)


def test_a_stalled_owner_stands_still_and_goes_on_later(sim: Simulation) -> None:
    seen: list[float] = []

    def body() -> None:
        while True:
            sim.sleep(1.0)
            seen.append(sim.clock())

    sim.start(body, owner="a")
    sim.run_until(2.5)
    sim.stall("a", 10.0)
    sim.run_until(14.0)
    assert seen == [1.0, 2.0, 12.5, 13.5]


def test_everybody_waiting_for_somebody_else_is_reported(sim: Simulation) -> None:
    with pytest.raises(Deadlock):
        sim.park()


def test_many_short_processes_started_by_each_other_need_no_deep_stack(sim: Simulation) -> None:
    ran = 0

    def body() -> None:
        nonlocal ran
        ran += 1
        sim.sleep(0.1)
        if ran < 3000:
            sim.start(body)

    for _ in range(5):
        sim.start(body)
    sim.run_until(1000.0)
    assert ran >= 3000


def test_generators_depend_on_seed_and_name_alone() -> None:
    with Simulation(1) as one, Simulation(1) as same, Simulation(2) as other:
        a, b, c, d = (s.generator(n).random() for s, n in ((one, "x"), (same, "x"), (other, "x"), (one, "y")))
        assert a == b
        assert len({a, c, d}) == 3
