"""Followers of one log over one store and one clock, stepped one at a time: what each does, and when, is exact.

Records are random; nothing sleeps. For tests of hand-overs, leaders and merges.
"""

from __future__ import annotations

import random
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ulid import ULID

from lmcache_s3.errors import LMCacheS3Error
from lmcache_s3.index.change import Change
from lmcache_s3.index.follower import Follower, Pacing
from lmcache_s3.index.log import Log, LogLimits
from lmcache_s3.index.manifest import Verdict, inbox_prefix
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.types import ExtentName, ExtentRecord, Grid, ObjectInfo

SPACE_ID = "ab" * 32
OTHER = "01JDXB4Z5T8V6Q2W3E4R5T6Y7H"
"""A writer that takes no part."""


def make_record(born: int = 0, chunks: int = 2, hashes: bytes | None = None) -> ExtentRecord:
    hashes = secrets.token_bytes(16 * chunks) if hashes is None else hashes
    n = len(hashes) // 16
    name = ExtentName.fresh(hashes[-16:], n, "fast", born)
    return ExtentRecord(name, Grid(), b"\0" * 16, 0, hashes, b"\1\0\0\0" * n, b"\2" * 8 * n, 100)


@dataclass
class Clock:
    """Seconds; `sleep` lets them pass."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass
class Fleet:
    """Followers over one store and one clock, stepped one at a time."""

    store: CountingStore
    clock: Clock = field(default_factory=Clock)
    followers: list[Follower] = field(default_factory=list)
    answers: dict[ExtentName, list[Verdict]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)

    def log(self, over: ObjectStore | None = None, **limits: Any) -> Log:
        return Log(
            over or self.store,
            SPACE_ID,
            writer=str(ULID()),
            sleep=self.clock.sleep,
            rng=random.Random(len(self.followers)),
            nonce=lambda: secrets.token_hex(16),
            limits=LogLimits(**limits),
            clock=self.clock,
        )

    def add(self, over: ObjectStore | None = None, **pacing: Any) -> Follower:
        follower = Follower(
            self.log(over), Pacing(**pacing), rng=random.Random(len(self.followers)), ulid=lambda: str(ULID())
        )
        follower.log.open()
        self.followers.append(follower)
        return follower

    def store_one(self, follower: Follower, record: ExtentRecord | None = None) -> ExtentRecord:
        record = record or make_record(follower.log.state.version)
        follower.submit(Change(add=(record,)), lambda verdicts: self.answers.update({record.name: verdicts}))
        return record

    def run(self, seconds: float, *who: Follower) -> None:
        """Everybody (or `who`) does what is due, in order of time, for so long."""
        end_s = self.clock.now_s + seconds
        while True:
            next_up = min(who or self.followers, key=Follower.due_s)
            if next_up.due_s() > end_s:
                self.clock.now_s = max(self.clock.now_s, end_s)
                return
            self.clock.now_s = max(self.clock.now_s, next_up.due_s())
            try:
                next_up.step()
            except LMCacheS3Error as e:
                self.errors[e.kind] += 1

    def inbox(self) -> list[str]:
        return [info.key for info in self.store.list(inbox_prefix(SPACE_ID))]

    def requests(self, action: Callable[[], object]) -> dict[str, int]:
        before = Counter(self.store.counts)
        action()
        return dict(Counter(self.store.counts) - before)


def lead(follower: Follower) -> None:
    """Make it the leader, whatever the log shows."""
    follower.log.commit((), lead=follower.log.writer)
    assert follower.leader.leads


class Aged:
    """A store whose Last-Modified are what the test says."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self.modified_s: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        for info in self._inner.list(prefix, start_after, limit):
            yield ObjectInfo(info.key, info.size_bytes, self.modified_s.get(info.key, 1e6))
