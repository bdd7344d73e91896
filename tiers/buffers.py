"""Memory for what is moved, used again instead of being given back to the system and faulted in anew each time.

A buffer comes back by itself when the last view of it is gone (a cell's bytes, an array over them), so whoever holds a
view may keep it as long as it likes. Fresh pages cost more than the bytes' way through the network: on a virtual
machine 2 ms a MiB was seen. Where the process uses CUDA, buffers are pinned: the device copies from them by itself.
Invariants: free memory kept ≤ `keep_bytes`; free memory and what is lent together ≤ `most_bytes` unless what is lent
alone is more. Thread-safe. Raises nothing of its own.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import weakref
from collections.abc import Callable

import numpy as np


def rounded(n_bytes: int) -> int:
    """What a buffer of `n_bytes` really takes: up to a sixteenth more, so that it serves similar needs later."""
    step = 1 << max(0, n_bytes.bit_length() - 5)
    return -(-n_bytes // step) * step


class BufferPool:
    """keep_bytes: most memory kept for the next use while nobody uses it. most_bytes: with what is lent; None: any."""

    def __init__(self, keep_bytes: int, most_bytes: int | None = None) -> None:
        self.keep_bytes = keep_bytes
        self.most_bytes = most_bytes
        self.free_bytes = 0
        self.lent_bytes = 0
        self.peak_bytes = 0
        """Most memory held at once, lent and free."""
        self._free: list[np.ndarray] = []  # oldest first
        self._lock = threading.Lock()
        self._returned: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()

    def take(self, n_bytes: int, when_back: Callable[[], None] | None = None) -> memoryview:
        """A writeable buffer of `n_bytes` with undefined contents; it returns when no view of it is left.

        when_back: called then, in whatever thread that happens; must be quick, and bear being called anywhere. Also
        where the system has no memory (`MemoryError`): there is nothing to come back.
        """
        size = rounded(n_bytes)
        with self._lock:
            self._settle()
            fits = [i for i, whole in enumerate(self._free) if whole.nbytes == size]
            whole = self._free.pop(fits[-1]) if fits else None
            if whole is not None:
                self.free_bytes -= size
            self.lent_bytes += size
            if self.most_bytes is not None:
                while self._free and self.lent_bytes + self.free_bytes > self.most_bytes:
                    self.free_bytes -= self._free.pop(0).nbytes
            self.peak_bytes = max(self.peak_bytes, self.lent_bytes + self.free_bytes)
        if whole is None:
            try:
                whole = _allocated(size)
            except BaseException:
                with self._lock:
                    self.lent_bytes -= size
                if when_back is not None:
                    when_back()
                raise
        lease = whole[:n_bytes]  # every view leads to this very object, which therefore dies last
        weakref.finalize(lease, self._give_back, whole, when_back).atexit = False
        return lease.data

    def _give_back(self, whole: np.ndarray, when_back: Callable[[], None] | None) -> None:
        """Runs wherever the last view dies, be it in this thread with our lock held: so it never waits for that."""
        self._returned.put(whole)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()
        if when_back is not None:
            when_back()

    def _settle(self) -> None:
        """Keep or let go of what came back. With the lock."""
        while True:
            try:
                whole = self._returned.get_nowait()
            except queue.Empty:
                return
            self.lent_bytes -= whole.nbytes
            if self.free_bytes + whole.nbytes <= self.keep_bytes:
                self.free_bytes += whole.nbytes
                self._free.append(whole)

    def close(self) -> None:
        """Let go of what is free; what comes back later is let go as well."""
        with self._lock:
            self._settle()
            self.keep_bytes = self.free_bytes = 0
            self._free.clear()


def _allocated(n_bytes: int) -> np.ndarray:
    # Whoever uses CUDA has imported torch and begun; we do neither.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # no more can be locked: slower, not wrong
            pinned: np.ndarray = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True).numpy()
            return pinned
    return np.empty(n_bytes, np.uint8)
