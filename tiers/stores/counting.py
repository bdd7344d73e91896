"""A store that counts what goes through it: requests by verb, bytes read and written. For metrics and benchmarks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import Buffer, ObjectInfo, Outcome


class CountingStore:
    """Wraps any `ObjectStore`. Thread-safe; failed requests count too, their bytes do not.

    counts: by verb (get, put, create, delete, list); a listing counts once however many pages it takes.
    read_bytes, written_bytes: of bodies that arrived, or were answered (a create that lost sent its body too).
    """

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner
        self.counts: Counter[str] = Counter()
        self.read_bytes = 0
        self.written_bytes = 0
        self._lock = threading.Lock()
        self._here = threading.local()

    @property
    def url(self) -> str:
        return self.inner.url

    def check(self) -> None:
        self._count("list")
        self.inner.check()

    def get(self, key: str, start: int = 0, end: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        self._count("get")
        data = self.inner.get(key, start, end, limit_bytes=limit_bytes)
        self._moved(read=len(data))
        return data

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        self._count("get")
        self.inner.get_into(key, start, into)
        self._moved(read=into.nbytes)

    def put(self, key: str, data: Buffer) -> None:
        self._count("put")
        self.inner.put(key, data)
        self._moved(written=memoryview(data).nbytes)

    def create(self, key: str, data: Buffer) -> Outcome:
        self._count("create")
        outcome = self.inner.create(key, data)
        self._moved(written=memoryview(data).nbytes)
        return outcome

    def delete(self, key: str) -> None:
        self._count("delete")
        self.inner.delete(key)

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        self._count("list")
        return self.inner.list(prefix, start_after, limit)

    def close(self) -> None:
        self.inner.close()

    def reset(self) -> None:
        """All counters back to zero."""
        with self._lock:
            self.counts.clear()
            self.read_bytes = self.written_bytes = 0

    def requests_by_this_thread(self) -> int:
        """Requests that the calling thread made itself, since start: proof of who waits for the store."""
        return getattr(self._here, "requests", 0)

    def _count(self, verb: str) -> None:
        self._here.requests = self.requests_by_this_thread() + 1
        with self._lock:
            self.counts[verb] += 1

    def _moved(self, *, read: int = 0, written: int = 0) -> None:
        with self._lock:
            self.read_bytes += read
            self.written_bytes += written
