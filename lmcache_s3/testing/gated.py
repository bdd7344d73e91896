"""A store whose reads wait until a test lets them go, so that it decides who is waiting for whom.

Raises what the store inside raises.
"""

from __future__ import annotations

import threading

from lmcache_s3.errors import LMCacheS3Error, Unavailable
from lmcache_s3.testing.faults import FaultyStore
from lmcache_s3.tiers.stores.base import ObjectStore

_PATIENCE_S = 20.0


class GatedStore(FaultyStore):
    """`get_into` waits for `answer` or `open`. asked: (start, bytes) of each read, in order. Thread-safe."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.asked: list[tuple[int, int]] = []
        self._changed = threading.Condition()
        self._answers: list[LMCacheS3Error | None] = []
        self._waiting = 0
        self._is_open = False

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        with self._changed:
            self.asked.append((start, into.nbytes))
            self._waiting += 1
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._is_open or self._answers, _PATIENCE_S):
                raise Unavailable("nobody opened the gate", kind="timeout")
            self._waiting -= 1
            error = self._answers.pop(0) if self._answers else None
        if error is not None:
            raise error
        super().get_into(key, start, into)

    def wait_for(self, reads: int) -> None:
        """Until so many reads are waiting."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._waiting >= reads, _PATIENCE_S), f"{self._waiting} reads wait"

    def answer(self, *errors: LMCacheS3Error | None) -> None:
        """Let as many reads go, each with this error or none."""
        with self._changed:
            self._answers += errors
            self._changed.notify_all()

    def open(self) -> None:
        """Let all go, from now on."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()
