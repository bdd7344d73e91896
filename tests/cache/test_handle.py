"""Handles: they end once, and nothing is delivered after the end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmcache_s3.budget import ByteBudget
from lmcache_s3.errors import Bug, Invalid, LMCacheS3Error, Unavailable
from lmcache_s3.handle import Deadlines, Handle, Work


def test_ends_once() -> None:
    work: Work[int] = Work()
    handle = work.handle
    assert not handle.done()
    assert handle.error() is None
    assert work.finish(7)
    assert not work.finish(8)
    assert not work.fail(Bug("late"))
    assert not work.abort(Unavailable("late"))
    assert not handle.cancel()
    assert (handle.result(), handle.done(), handle.error()) == (7, True, None)


def test_errors_are_raised_and_told() -> None:
    work: Work[int] = Work()
    work.fail(Unavailable("gone", kind="network"))
    with pytest.raises(Unavailable, match="gone"):
        work.handle.result()
    assert isinstance(work.handle.error(), Unavailable)


def test_waiting_has_a_limit_and_the_work_goes_on() -> None:
    work: Work[int] = Work()
    with pytest.raises(Unavailable) as e:
        work.handle.result(timeout_s=0.01)
    assert e.value.kind == "timeout"
    work.finish(1)
    assert work.handle.result(0) == 1


def test_a_cancelled_handle_says_so() -> None:
    work: Work[int] = Work()
    assert work.handle.cancel()
    assert not work.deliver(lambda: None)
    with pytest.raises(Unavailable) as e:
        work.handle.result()
    assert e.value.kind == "cancelled"


def test_progress() -> None:
    work: Work[int] = Work(total_bytes=10)
    work.deliver(lambda: None, 4)
    work.advance(5)
    assert (work.handle.done_bytes, work.handle.total_bytes) == (9, 10)


def test_the_deadline_asks_for_what_there_is() -> None:
    deadlines = Deadlines()
    partial: Work[str] = Work(on_abort=lambda error: f"partial: {error.kind}")
    nothing: Work[str] = Work()
    deadlines.watch(nothing, 0.02)
    deadlines.watch(partial, 0.01)
    assert partial.handle.result(5) == "partial: timeout"
    with pytest.raises(Unavailable, match=r"not done within 0\.02 s"):
        nothing.handle.result(5)
    deadlines.close()


def test_deadlines_fire_in_order_and_finished_work_is_left_alone() -> None:
    deadlines = Deadlines()
    late, early, done = Work[int](), Work[int](), Work[int]()
    deadlines.watch(late, 60)
    deadlines.watch(done, 0.01)
    done.finish(1)
    deadlines.watch(early, 0.02)
    with pytest.raises(Unavailable):
        early.handle.result(5)
    assert done.handle.result() == 1
    assert not late.handle.done()
    deadlines.close()


def test_nothing_is_delivered_after_the_end_nor_runs_still() -> None:
    """Many threads deliver while another ends the work: when `done()` says so, the buffer is the caller's again."""
    with ThreadPoolExecutor(4) as pool:
        for round_ in range(150):
            work: Work[int] = Work(on_abort=lambda _: 0)
            running = [0]
            lock = threading.Lock()
            delivered = [0]

            def call(running: list[int] = running, lock: threading.Lock = lock, count: list[int] = delivered) -> None:
                with lock:
                    running[0] += 1
                time.sleep(0)
                with lock:
                    running[0] -= 1
                    count[0] += 1

            def hammer(work: Work[int] = work, call: object = call) -> None:
                assert callable(call)
                while work.deliver(call):
                    pass

            futures = [pool.submit(hammer) for _ in range(3)]
            while not delivered[0]:
                time.sleep(0)
            ended = work.finish(0) if round_ % 3 == 0 else (work.abort, work.fail)[round_ % 2](Unavailable("now"))
            assert ended
            assert work.handle.done()
            assert running[0] == 0
            at_the_end = delivered[0]
            for future in futures:
                future.result()
            assert delivered[0] == at_the_end


def test_the_end_waits_for_a_delivery_under_way() -> None:
    work: Work[int] = Work(on_abort=lambda _: 0)
    inside, leave = threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        leave.wait(5)

    with ThreadPoolExecutor(2) as pool:
        pool.submit(work.deliver, slow)
        inside.wait(5)
        ending = pool.submit(work.abort, Unavailable("late"))
        time.sleep(0.05)
        assert not work.handle.done()
        leave.set()
        assert ending.result(5)
        assert work.handle.done()


def test_buffers_are_let_go_at_the_end_not_at_the_deadline() -> None:
    class Buffer:
        pass

    deadlines = Deadlines()
    buffer = Buffer()
    gone = weakref.ref(buffer)
    work: Work[int] = Work(on_abort=lambda _, buffer=buffer: id(buffer))  # type: ignore[misc]
    deadlines.watch(work, 3600)
    handle = work.handle
    work.finish(1)
    del buffer, work
    gc.collect()
    assert gone() is None
    assert handle.result() == 1
    deadlines.close()


# --- then


def test_then_maps_the_result_and_cancels_the_source() -> None:
    work: Work[int] = Work(total_bytes=3)
    text = work.handle.then(str)
    work.advance(2)
    assert (text.total_bytes, text.done_bytes) == (3, 2)
    work.finish(7)
    assert text.result() == "7"
    other: Work[int] = Work()
    mapped = other.handle.then(str)
    assert mapped.cancel()
    assert other.over
    for error in (mapped.error(), other.handle.error()):
        assert isinstance(error, Unavailable)


def test_then_passes_errors_on() -> None:
    work: Work[int] = Work()
    broken = work.handle.then(lambda _: _raise(Bug("inner")))
    work.finish(1)
    with pytest.raises(Bug):
        broken.result(0)
    failed: Work[int] = Work()
    mapped = failed.handle.then(str)
    failed.fail(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        mapped.result(0)


def _raise(error: LMCacheS3Error) -> None:
    raise error


# --- asyncio


async def test_a_handle_can_be_awaited() -> None:
    work: Work[int] = Work()
    threading.Timer(0.02, work.finish, [5]).start()
    assert await work.handle == 5
    assert await Handle.completed("x") == "x"


async def test_cancelling_the_task_cancels_the_work() -> None:
    work: Work[int] = Work()

    async def wait() -> int:
        return await work.handle

    task = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.over


# --- the budget


def test_a_budget_is_never_exceeded() -> None:
    budget = ByteBudget(100)
    held, worst, lock = [0], [0], threading.Lock()

    def work(n_bytes: int) -> None:
        for i in range(50):
            if i % 3 == 0:
                if not budget.try_take(n_bytes, 0.5):
                    continue
            elif not budget.wait(n_bytes, lambda: False):
                raise AssertionError("gave up")
            with lock:
                held[0] += n_bytes
                worst[0] = max(worst[0], held[0])
            time.sleep(0)
            with lock:
                held[0] -= n_bytes
            budget.give_back(n_bytes)

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(work, n) for n in (100, 60, 30, 10, 1, 45)]:
            future.result(30)
    assert budget.held_bytes == 0
    assert 0 < worst[0] <= 100
    assert budget.peak_bytes <= 100


def test_waiting_is_first_come_first_served_and_stores_do_not_overtake() -> None:
    budget = ByteBudget(100)
    budget.take(60)
    order: list[int] = []

    def wait(n_bytes: int) -> None:
        assert budget.wait(n_bytes, lambda: False)
        order.append(n_bytes)

    threads = [threading.Thread(target=wait, args=(n,)) for n in (90, 20)]
    for thread in threads:
        thread.start()
        time.sleep(0.03)
    assert not budget.try_take(1), "somebody waits"
    budget.give_back(60)
    time.sleep(0.1)
    assert order == [90]
    budget.give_back(90)
    for thread in threads:
        thread.join(5)
    assert order == [90, 20]


def test_who_gives_up_takes_nothing_and_frees_the_queue() -> None:
    budget = ByteBudget(10)
    budget.take(10)
    assert not budget.wait(5, lambda: True)
    assert not budget.wait(11, lambda: False), "would never fit"
    with pytest.raises(Unavailable) as e:
        budget.take(1)
    assert (e.value.kind, e.value.key) == ("full", "staging_bytes")
    budget.give_back(10)
    assert budget.try_take(10)
    with pytest.raises(Bug):
        budget.give_back(11)
    with pytest.raises(Invalid):
        ByteBudget(0)
