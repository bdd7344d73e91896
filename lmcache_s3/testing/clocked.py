"""A store with a clock of its own: what it writes is as old as the test says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from lmcache_s3.errors import Missing
from lmcache_s3.types import Buffer, ObjectInfo, Outcome


@dataclass
class ClockedStore:
    """An `ObjectStore` in memory. now_s: Last-Modified of what is written next. Single thread."""

    now_s: float = 1_000_000.0
    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    url: str = "clocked://"

    def get(self, key: str, start: int = 0, end: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        self.counts["get"] += 1
        if key not in self.objects:
            raise Missing(f"{key}: missing", key=key)
        data = self.objects[key][0][start:end]
        assert limit_bytes is None or len(data) <= limit_bytes
        return data

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        into[:] = self.get(key, start, start + len(into))

    def put(self, key: str, data: Buffer) -> None:
        self.counts["put"] += 1
        self.objects[key] = (bytes(data), self.now_s)

    def create(self, key: str, data: Buffer) -> Outcome:
        self.counts["create"] += 1
        if key in self.objects:
            return Outcome.LOST
        self.objects[key] = (bytes(data), self.now_s)
        return Outcome.WON

    def delete(self, key: str) -> None:
        self.counts["delete"] += 1
        self.objects.pop(key, None)

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        self.counts["list"] += 1
        found = sorted(key for key in self.objects if key.startswith(prefix) and key > start_after)
        return iter([ObjectInfo(key, len(self.objects[key][0]), self.objects[key][1]) for key in found[:limit]])

    def check(self) -> None: ...

    def close(self) -> None: ...

    def copy(self) -> ClockedStore:
        return replace(self, objects=dict(self.objects), counts=Counter())
