"""Memory for what is fetched, used again instead of being given back to the system and faulted in anew each time.

A buffer comes back by itself when the last view of it is gone (a cell's bytes, an array over them), so whoever holds a
view may keep it as long as it likes. Fresh pages cost more than the bytes' way through the network: on a virtual
machine 2 ms a MiB was seen.
Invariant: free memory kept ≤ `keep_bytes`. Thread-safe. Raises nothing of its own.
"""

from __future__ import annotations

import queue
import threading
import weakref

import numpy as np

_ROUND_BYTES = 1 << 20


class BufferPool:
    """keep_bytes: most memory kept for the next use while nobody uses it."""

    def __init__(self, keep_bytes: int) -> None:
        self.keep_bytes = keep_bytes
        self.free_bytes = 0
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()
        self._returned: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()

    def take(self, n_bytes: int) -> memoryview:
        """A writeable buffer of `n_bytes` with undefined contents; it returns when no view of it is left."""
        whole = self._reused(n_bytes)
        if whole is None:
            whole = np.empty(-(-n_bytes // _ROUND_BYTES) * _ROUND_BYTES, np.uint8)
        lease = whole[:n_bytes]  # every view leads to this very object, which therefore dies last
        weakref.finalize(lease, self._give_back, whole).atexit = False
        return lease.data

    def _reused(self, n_bytes: int) -> np.ndarray | None:
        """The smallest that is large enough, and not much too large."""
        with self._lock:
            self._settle()
            fits = [i for i, whole in enumerate(self._free) if n_bytes <= whole.nbytes <= 2 * n_bytes + _ROUND_BYTES]
            if not fits:
                return None
            whole = self._free.pop(min(fits, key=lambda i: self._free[i].nbytes))
            self.free_bytes -= whole.nbytes
            return whole

    def _give_back(self, whole: np.ndarray) -> None:
        """Runs wherever the last view dies, be it in this thread with our lock held: so it never waits for that."""
        self._returned.put(whole)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Keep or let go of what came back. With the lock."""
        while True:
            try:
                whole = self._returned.get_nowait()
            except queue.Empty:
                return
            if self.free_bytes + whole.nbytes <= self.keep_bytes:
                self.free_bytes += whole.nbytes
                self._free.append(whole)

    def close(self) -> None:
        """Let go of what is free; what comes back later is let go as well."""
        with self._lock:
            self._settle()
            self.keep_bytes = self.free_bytes = 0
            self._free.clear()
