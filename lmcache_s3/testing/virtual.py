"""Virtual time: many processes as greenlets under one clock, deterministic by seed. A day of a fleet runs in minutes.

A `Process` runs ordinary blocking code. Whoever sleeps or waits hands over to whoever is due next; nothing runs in
parallel, so two runs with one seed are the same run. `Executor` gives code that wants a thread pool one of greenlets.

Each process has its own time, `clock()`, which may be *ahead* of what has run so far: a process that does nothing which
others could see until its next pause need not hand over (`ahead`), which is what makes an idle poll cheap. Whatever
touches what others see calls `catch_up` first; then everything due earlier has run.

Raises `Deadlock` when everybody waits for somebody else; what a process raises comes out of `run`.
"""

from __future__ import annotations

import concurrent.futures
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from heapq import heappop, heappush, heappushpop
from types import TracebackType
from typing import Any, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from lmcache_s3.errors import Bug

T = TypeVar("T")

_NOT_DUE = -1
"""Token of a process that no entry of the agenda may wake."""


class Deadlock(AssertionError):
    """No process is due, ever again, and the one that asked waits."""


class Process(greenlet):
    """One flow of control. owner: who crashes and stalls as one (a process and whatever it started)."""

    at_s: float
    """Its own time."""
    token: int = _NOT_DUE
    """Number of the agenda's entry that may wake it: an older entry is void."""
    owner: object = None
    crashed: bool = False
    body: Callable[[], object]


class Simulation:
    """The clock and the agenda. The thread that made it is a process too: its calls of `sleep` let others run.

    rng: for what has no generator of its own; each process should take one by `generator`, so that one more call in one
    of them does not change all others.
    """

    def __init__(self, seed: int = 0, *, start_s: float = 0.0) -> None:
        self.seed = seed
        self._agenda: list[tuple[float, int, Process]] = []
        self._entries = 0
        self._processes: set[Process] = set()
        self._idle: list[Process] = []
        """Processes that came to their end, to be used again."""
        self._main: Any = getcurrent()
        self._main.at_s, self._main.token, self._main.owner, self._main.crashed = start_s, _NOT_DUE, None, False
        self._now_s = start_s
        self._closed = False

    # ---- time -----------------------------------------------------------------------------------------------------

    def clock(self) -> float:
        """Seconds, of the process that asks."""
        at_s: float = getcurrent().at_s
        return at_s

    def generator(self, name: str) -> random.Random:
        """A random generator of its own, a function of seed and name."""
        return random.Random(f"{self.seed} {name}")

    def sleep(self, seconds: float) -> None:
        """Others run until this process is due again."""
        if self._closed:
            raise GreenletExit
        me = getcurrent()
        due_s = me.at_s + seconds if seconds > 0 else me.at_s
        agenda = self._agenda
        self._entries = entry = self._entries + 1
        me.token = entry
        due_s, entry, other = heappushpop(agenda, (due_s, entry, me))
        while other.token != entry:
            due_s, entry, other = heappop(agenda)
        other.at_s = due_s
        if other is not me:
            other.switch()

    def ahead(self, seconds: float) -> None:
        """This process's time goes on without anybody else running: nothing it does until its next `catch_up`, sleep
        or wait is seen by others."""
        getcurrent().at_s += seconds

    def catch_up(self) -> None:
        """Everything that is due before this process's time has run when it returns."""
        agenda = self._agenda
        if agenda and agenda[0][0] <= getcurrent().at_s:
            self.sleep(0.0)

    # ---- processes ------------------------------------------------------------------------------------------------

    def start(self, body: Callable[[], object], *, after_s: float = 0.0, owner: object = None) -> Process:
        """Run `body` as a process from `after_s` seconds from now on. owner: None for that of the process that asks."""
        me = getcurrent()
        process = self._idle.pop() if self._idle else self._begin()
        process.body = body
        process.at_s = me.at_s + after_s
        process.owner = me.owner if owner is None else owner
        self._processes.add(process)
        self._enter(process, process.at_s)
        return process

    def _begin(self) -> Process:
        """A new greenlet, begun at once: begun by the agenda, it might stand on somebody's deep stack."""
        me = getcurrent()

        def run(_: int) -> None:
            me.switch()
            while True:  # used again and again: so that who starts whom makes no stack deeper and deeper
                process.body()
                self._processes.discard(process)
                process.token = _NOT_DUE
                self._idle.append(process)
                other = self._next()
                if other is not process:
                    other.switch()

        process = Process(partial(_on_a_deep_stack, run), self._main)
        process.switch()
        return process

    def crash(self, owner: object) -> None:
        """Its processes never run again: no cleaning up, no answer read. Not to be called by one of them."""
        for process in [p for p in self._processes if p.owner == owner]:
            if process is getcurrent():
                raise Bug("a process cannot crash itself: let another do it")
            process.crashed, process.token = True, _NOT_DUE

    def stall(self, owner: object, seconds: float) -> None:
        """Its processes stand still where they are: nothing of them runs before `seconds` from now."""
        until_s = self.clock() + seconds
        for due_s, entry, process in list(self._agenda):
            if process.owner == owner and process.token == entry and due_s < until_s:
                self._enter(process, until_s)

    def _enter(self, process: Process, due_s: float) -> None:
        self._entries = entry = self._entries + 1
        process.token = entry
        heappush(self._agenda, (due_s, entry, process))

    def _next(self) -> Process:
        """Take the process that is due next off the agenda, and make its time its own."""
        agenda = self._agenda
        while agenda:
            due_s, entry, process = heappop(agenda)
            if process.token == entry:
                process.at_s = due_s
                return process
        raise Deadlock("everybody waits for somebody else")

    def park(self) -> None:
        """Wait until somebody calls `wake`."""
        if self._closed:
            raise GreenletExit
        me = getcurrent()
        me.token = _NOT_DUE
        other = self._next()
        if other is not me:
            other.switch()

    def wake(self, process: Process) -> None:
        """A parked process goes on, at the later of its and this process's time."""
        if not process.crashed:
            self._enter(process, max(process.at_s, self.clock()))

    def run_until(self, at_s: float, *, every_s: float = math.inf, tick: Callable[[], object] = lambda: None) -> None:
        """Let everything run that is due before `at_s`; `tick` is called each `every_s` seconds."""
        while (left_s := at_s - self.clock()) > 0:
            self.sleep(min(left_s, every_s))
            tick()

    def close(self) -> None:
        """End all processes where they stand. Only from the thread that made the simulation."""
        self._closed = True
        for process in [*self._processes, *self._idle]:
            if not process.dead:
                process.throw(GreenletExit)
        self._agenda.clear()
        self._processes.clear()
        self._idle.clear()

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Signal:
    """What `threading.Condition` with one flag is to threads: wait for it, with a time-out, or set it off."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._waiting: list[Process] = []

    def wait(self, timeout_s: float) -> bool:
        """Whether it was set off before `timeout_s` seconds had passed."""
        me = getcurrent()
        self._waiting.append(me)
        self._simulation.sleep(timeout_s)
        if me in self._waiting:
            self._waiting.remove(me)
            return False
        return True

    def set(self) -> None:
        """Everybody who waits goes on."""
        waiting, self._waiting = self._waiting, []
        for process in waiting:
            self._simulation.wake(process)


class VirtualFuture(concurrent.futures.Future[T]):
    """A future that a process can wait for: `result` and `exception` let others run meanwhile."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def result(self, timeout: float | None = None) -> T:
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._wait(timeout)
        return super().exception(0)

    def _wait(self, timeout_s: float | None) -> None:
        if self.done():
            return
        me, waits = getcurrent(), True

        def wake(_: object) -> None:
            if waits:
                self._simulation.wake(me)

        self.add_done_callback(wake)
        if timeout_s is None:
            self._simulation.park()
        else:
            self._simulation.sleep(timeout_s)
        waits = False


class VirtualExecutor(concurrent.futures.Executor):
    """A thread pool of greenlets: at most `workers` calls at a time, first come first served, each a process of the
    caller's owner."""

    def __init__(self, simulation: Simulation, workers: int) -> None:
        self._simulation, self._workers = simulation, workers
        self._running = 0
        self._queue: deque[Callable[[], None]] = deque()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        future: VirtualFuture[T] = VirtualFuture(self._simulation)

        def call() -> None:
            try:
                result = fn(*args, **kwargs)
            except Exception as e:  # noqa: BLE001 — whoever waits for the future gets it
                future.set_exception(e)
            else:
                future.set_result(result)

        self._add(call)
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
    ) -> Iterator[T]:
        """All of them have ended when this returns. Without futures, which cost more than a simulated request."""
        calls = list(zip(*iterables, strict=False))
        answers: list[Any] = [None] * len(calls)
        failed: list[Exception] = []
        me, left = getcurrent(), len(calls)

        def call(i: int) -> None:
            nonlocal left
            try:
                answers[i] = fn(*calls[i])
            except Exception as e:  # noqa: BLE001 — raised where the answers are asked for
                failed.append(e)
            left -= 1
            if not left:
                self._simulation.wake(me)

        for i in range(len(calls)):
            self._add(partial(call, i))
        if calls:
            self._simulation.park()
        if failed:
            raise failed[0]
        return iter(answers)

    def _add(self, call: Callable[[], None]) -> None:
        self._queue.append(call)
        if self._running < self._workers:
            self._running += 1
            self._simulation.start(self._work)

    def _work(self) -> None:
        while self._queue:
            self._queue.popleft()()
            self._simulation.catch_up()  # who is ahead takes no work that another would have begun before
        self._running -= 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if cancel_futures:
            self._queue.clear()


def _on_a_deep_stack(run: Callable[[int], None], layers: int = 5) -> None:
    """Below a greenlet's first C frame the stack belongs to others, and whoever walks down to there crashes. NumPy
    walks down ten frames to see who asks for a product of large arrays. Each layer of `map` is some C frames."""
    call = run if layers == 0 else lambda _: _on_a_deep_stack(run, layers - 1)
    next(map(call, (0,)))
