"""One thread that calls back when a time has come: for deadlines, and for second requests.

Raises nothing; what is called must be quick and must not raise.
"""

from __future__ import annotations

import heapq
import threading
import time
import weakref
from collections.abc import Callable


class Alarms:
    """`clock`: monotonic seconds. Thread-safe. name: of the thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, name: str = "lmcache-s3-alarms") -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, weakref.WeakMethod[Callable[[], object]]]] = []
        self._count = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def after(self, seconds: float, method: Callable[[], object]) -> None:
        """Call a bound method in so many seconds, if its object still lives: alarms keep nothing alive."""
        with self._changed:
            heapq.heappush(self._heap, (self._clock() + seconds, self._count, weakref.WeakMethod(method)))
            self._count += 1
            if self._heap[0][1] == self._count - 1:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            due: list[weakref.WeakMethod[Callable[[], object]]] = []
            with self._changed:
                while self._heap and self._heap[0][0] <= self._clock():
                    due.append(heapq.heappop(self._heap)[2])
                if not due:
                    if self._closed:
                        return
                    self._changed.wait(max(0.0, self._heap[0][0] - self._clock()) if self._heap else None)
            for ref in due:
                method = ref()
                if method is not None:
                    method()
                del method

    def close(self) -> None:
        """No alarm rings any more."""
        with self._changed:
            self._closed = True
            self._heap.clear()
            self._changed.notify()
        self._thread.join(timeout=5.0)
