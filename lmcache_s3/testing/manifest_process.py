"""One process of the world: a greenlet that stops at each request to the store until it is stepped and told its fate.

Raises `Violation` when a replica publishes what the history does not say, or when a process gives up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from greenlet import GreenletExit, getcurrent, greenlet

from lmcache_s3.errors import LMCacheS3Error, Missing, Unavailable
from lmcache_s3.identity import KVGroup, Space
from lmcache_s3.index.gc import Collector
from lmcache_s3.index.inbox import HandOvers, Inbox
from lmcache_s3.index.log import Log, LogLimits
from lmcache_s3.index.manifest import MAX_INTEGER, State
from lmcache_s3.index.rebuild import rebuild
from lmcache_s3.index.replica import Replica
from lmcache_s3.types import Buffer, ObjectInfo, Outcome, space_prefix

if TYPE_CHECKING:
    from lmcache_s3.testing.manifest_world import World


SPACE = Space("5" * 64, "bfloat16", (KVGroup("full", 1, 1, 1, 1),), chunk_tokens=4, model="none")
SPACE_ID = SPACE.id
ULID = "01JDXB4Z5T8V6Q2W3E4R{:06d}"
"""Of a number."""
_PAGE = 3
"""Keys in one page of a LIST."""
_EXTENTS = space_prefix(SPACE_ID) + "extents/"


class Violation(AssertionError):
    """An invariant is broken."""


class Fate(Enum):
    """What becomes of one request."""

    OK = "answered"
    LOST = "carried out, the answer lost"
    DROPPED = "not carried out, no answer"
    LATE = "carried out at some later time, no answer"
    TWICE = "answered, and carried out again at some later time"


@dataclass(frozen=True)
class Rules:
    """The code under test. A mutant replaces one of them."""

    log: type[Log] = Log
    collector: type[Collector] = Collector
    inbox: type[Inbox] = Inbox
    hand_overs: type[HandOvers] = HandOvers
    uploads_first: bool = True
    fresh_names: bool = True
    rebuild: Callable[..., object] = rebuild
    sweeps_covered: bool = False
    """Writers delete what they uploaded for nothing."""


AS_IT_IS = Rules()
"""Nothing replaced."""


class Process:
    """One process: a greenlet that runs only while it is being stepped."""

    def __init__(self, world: World, name: str, body: Callable[[Process], None], checkpoint_every: int) -> None:
        self.world, self.name, self.rules = world, name, world.rules
        self.at: tuple[str, str] | None = None
        """(verb, key) of the request it waits to make; None before the first."""
        self.fate = Fate.OK
        self.rng = random.Random(world.rng.random())
        self.now_s = 0.0
        """Its clock says anything, but never goes back."""
        self.number = len(world.processes)
        self.crashed = False
        self.log = world.rules.log(
            StoreOf(self),
            SPACE_ID,
            writer=ULID.format(self.number),
            sleep=self._sleep,
            rng=self.rng,
            nonce=lambda: f"{world.number():032x}",
            limits=LogLimits(milestone=world.milestone, checkpoint_every=checkpoint_every, max_commit_attempts=10**6),
            replica=CheckedReplica(world),
            clock=lambda: self.now_s,
        )
        self._greenlet = greenlet(lambda: body(self))
        self._run()

    @property
    def ended(self) -> bool:
        return bool(self._greenlet.dead)

    def step(self, fate: Fate = Fate.OK) -> None:
        """Make the request it waits at, and run on to the next."""
        self.fate = fate
        self._run()

    def abandon(self) -> None:
        """It never runs again."""
        if not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)

    def park(self, verb: str, key: str) -> Fate:
        """Called by its store before each request."""
        self.at = (verb, key)
        getcurrent().parent.switch()
        return self.fate

    def _run(self) -> None:
        self._greenlet.parent = getcurrent()
        try:
            self._greenlet.switch()
        except LMCacheS3Error as e:  # whatever is worth another try was tried again
            raise Violation(f"progress: {self.name} gives up: {e}") from e

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds


class StoreOf:
    """The world's objects as one process's `ObjectStore`."""

    url = "sim://"

    def __init__(self, process: Process) -> None:
        self._process, self._world = process, process.world

    def get(self, key: str, start: int = 0, end: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        if self._process.park("get", key) in (Fate.LOST, Fate.DROPPED):
            raise Unavailable("no answer", kind="timeout", key=key)
        if key not in self._world.objects:
            raise Missing(f"{key}: missing", key=key)
        return self._world.objects[key][start:end]

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        into[:] = self.get(key, start, start + len(into))

    def put(self, key: str, data: Buffer) -> None:
        self._write("put", key, bytes(data))

    def create(self, key: str, data: Buffer) -> Outcome:
        outcome = self._write("create", key, bytes(data))
        return Outcome.UNKNOWN if outcome is None else outcome

    def delete(self, key: str) -> None:
        self._write("delete", key, b"")

    def _write(self, verb: str, key: str, data: bytes) -> Outcome | None:
        fate = self._process.park(verb, key)
        if fate is Fate.TWICE or fate is Fate.LATE:
            self._world.air.append((verb, key, data))
        outcome = self._world.carry_out(verb, key, data) if fate not in (Fate.DROPPED, Fate.LATE) else None
        if fate in (Fate.OK, Fate.TWICE):
            return outcome
        if verb == "create":
            return None
        raise Unavailable("no answer", kind="timeout", key=key)

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        # A collector lists 256 folders, nearly all of them empty: those are no step of their own.
        if prefix.startswith(_EXTENTS) and not self._world.listed(prefix, start_after, 1):
            return iter(())
        return self._pages(prefix, start_after, limit)

    def _pages(self, prefix: str, start_after: str, limit: int | None) -> Iterator[ObjectInfo]:
        """Each page is a step: a listing of several is no snapshot."""
        left = limit or MAX_INTEGER
        while left:
            if self._process.park("list", prefix) in (Fate.LOST, Fate.DROPPED):
                raise Unavailable("no answer", kind="timeout", key=prefix)
            page = self._world.listed(prefix, start_after, min(left, _PAGE))
            yield from page
            if len(page) < _PAGE:
                return
            left -= len(page)
            start_after = page[-1].key

    def check(self) -> None:
        next(self.list("", limit=1), None)

    def close(self) -> None:
        pass


class CheckedReplica(Replica):
    """Nothing but the truth may be published."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def publish(self, state: State) -> None:
        states = self._world.states
        if state.version >= len(states) or state != states[state.version]:
            raise Violation(f"prefix: a replica at version {state.version} is not what the history says")
        super().publish(state)
