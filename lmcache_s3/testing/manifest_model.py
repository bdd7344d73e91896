"""A world in which the real manifest code (`lmcache_s3.index.log`) runs one store request at a time, in any order.

Every process is a thread that stops at each request until the scheduler lets it take one step and says what becomes of
the request: answered, answer lost, dropped, carried out late or twice. A process that is never stepped again has
crashed; one that is stepped much later was stalled. The world keeps the true history beside the store and checks, after
each step, what FORMAT.md promises. Deterministic: the same steps give the same run.

Raises `Violation`, naming the broken invariant:
  prefix    a published replica is a prefix of the history
  ack       what a commit reports is so
  durable   the objects of every extent that the history keeps live exist
  openable  the newest checkpoint is whole, and every later version can be read
  history   version numbers are genuinely created once, without gaps
  progress  when everybody runs on, every commit is answered and every reader sees the whole history
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from enum import Enum

from lmcache_s3.errors import Conflict, Missing, Unavailable
from lmcache_s3.index.log import IDLE_POLLS_PER_FENCE, Log, LogLimits
from lmcache_s3.index.manifest import (
    EMPTY,
    State,
    Verdict,
    apply,
    checkpoint_key,
    checkpoints_prefix,
    decode_delta,
    fence,
    log_key,
    parse_checkpoint_key,
    segments_prefix,
)
from lmcache_s3.index.replica import Replica
from lmcache_s3.index.segments import decode_index
from lmcache_s3.types import Buffer, ExtentName, ExtentRecord, Grid, ObjectInfo, Outcome, space_prefix

SPACE_ID = "5" * 64
_ULID = "01JDXB4Z5T8V6Q2W3E4R5T6Y{:02d}"
_PATIENCE_S = 60.0


class Violation(AssertionError):
    """An invariant is broken."""


class Fate(Enum):
    """What becomes of one request."""

    OK = "answered"
    LOST = "carried out, the answer lost"
    DROPPED = "not carried out, no answer"
    LATE = "carried out at some later time, no answer"
    TWICE = "answered, and carried out again at some later time"


class _Abandoned(BaseException):
    """Unwinds a process's thread when the world ends."""


class Process:
    """One process: a thread that runs only while it is being stepped."""

    def __init__(self, world: World, name: str, body: Callable[[Process], None], limits: LogLimits, log: type[Log]):
        self.world, self.name = world, name
        self.at: tuple[str, str] | None = None
        """(verb, key) of the request it waits to make; None before the first."""
        self.ended = False
        self.failed: BaseException | None = None
        self.fate = Fate.OK
        self.rng = random.Random(len(world.processes))
        self.log = log(
            StoreOf(self),
            SPACE_ID,
            writer=_ULID.format(len(world.processes)),
            sleep=lambda _: None,
            rng=random.Random(1),
            nonce=lambda: f"{world.number():032x}",
            limits=limits,
            replica=CheckedReplica(world),
        )
        self._body = body
        self._go, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    def step(self, fate: Fate = Fate.OK) -> None:
        """Make the request it waits at, and run on to the next."""
        self.fate = fate
        self._go.release()
        self._wait()

    def abandon(self) -> None:
        self._abandoned = True
        self._go.release()
        self._thread.join(_PATIENCE_S)

    def park(self, verb: str, key: str) -> Fate:
        """Called by its store before each request."""
        self.at = (verb, key)
        self._parked.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned
        return self.fate

    def _wait(self) -> None:
        if not self._parked.acquire(timeout=_PATIENCE_S):
            raise Violation(f"{self.name} neither ends nor makes a request after {self.at}")
        if self.failed is not None:
            raise self.failed

    def _run(self) -> None:
        try:
            self._body(self)
        except _Abandoned:
            return
        except BaseException as e:  # noqa: BLE001 — handed to the scheduler, which raises it
            self.failed = e
        self.ended = True
        self._parked.release()


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
        if self._process.park("list", prefix) in (Fate.LOST, Fate.DROPPED):
            raise Unavailable("no answer", kind="timeout", key=prefix)
        found = [key for key in sorted(self._world.objects) if key.startswith(prefix) and key > start_after]
        return iter([ObjectInfo(key, len(self._world.objects[key]), 0.0) for key in found[:limit]])

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
        if state.version >= len(self._world.states) or state != self._world.states[state.version]:
            raise Violation(f"prefix: a replica at version {state.version} is not what the history says")
        super().publish(state)


class World:
    """The store, the true history, the processes. `milestone` is shrunk, so that deletion happens early."""

    def __init__(self, milestone: int = 2) -> None:
        self.milestone = milestone
        self.objects: dict[str, bytes] = {}
        self.air: list[tuple[str, str, bytes]] = []
        """Writes that will take effect (again) some time."""
        self.states = [EMPTY]
        """The truth: the state after each version."""
        self.bodies = [b""]
        self.ever: set[ExtentName] = set()
        """Extents that were ever live."""
        self.processes: list[Process] = []
        self._number = 0

    def number(self) -> int:
        self._number += 1
        return self._number

    def add(
        self, name: str, body: Callable[[Process], None], log: type[Log] = Log, checkpoint_every: int = 10**6
    ) -> None:
        limits = LogLimits(milestone=self.milestone, checkpoint_every=checkpoint_every, max_commit_attempts=10**6)
        self.processes.append(Process(self, name, body, limits, log))

    def close(self) -> None:
        for process in self.processes:
            process.abandon()

    # ---- the store --------------------------------------------------------------------------------------------------

    def carry_out(self, verb: str, key: str, data: bytes) -> Outcome | None:
        if verb == "delete":
            self.objects.pop(key, None)
            return None
        if verb == "create" and key in self.objects:
            return Outcome.LOST
        if key.startswith(log_key(SPACE_ID, 0)[:-20]) and key not in self.objects:
            self._created(int(key[-20:]), data)
        self.objects[key] = data
        return Outcome.WON if verb == "create" else None

    def _created(self, version: int, data: bytes) -> None:
        if version > len(self.states):
            raise Violation(f"history: version {version} created after {len(self.states) - 1}")
        if version == len(self.states):
            self.states.append(apply(self.states[-1], decode_delta(data, version)))
            self.bodies.append(data)
            self.ever |= set(self.states[-1].extents)

    def deliver(self, i: int) -> None:
        """One write in the air takes effect."""
        verb, key, data = self.air.pop(i % len(self.air))
        self.carry_out(verb, key, data)

    # ---- checks -----------------------------------------------------------------------------------------------------

    def newest_checkpoint(self) -> tuple[int, str] | None:
        keys = [key for key in self.objects if key.startswith(checkpoints_prefix(SPACE_ID))]
        return parse_checkpoint_key(min(keys)) if keys else None

    def check(self) -> None:
        for name in self.states[-1].extents:
            if object_key(name) not in self.objects:
                raise Violation(f"durable: {name} is live, its object does not exist")
        newest = self.newest_checkpoint()
        if newest is not None:
            index = decode_index(self.objects[checkpoint_key(SPACE_ID, *newest)], *newest)
            for segment in index.segments:
                if segments_prefix(SPACE_ID, *newest) + segment.file not in self.objects:
                    raise Violation("openable: the newest checkpoint lacks a segment")
        for version in range(1 + (newest[0] if newest else 0), len(self.states)):
            if self.objects.get(log_key(SPACE_ID, version)) != self.bodies[version]:
                raise Violation(f"openable: version {version}, after the newest checkpoint, is gone or changed")

    def acknowledge(self, record: ExtentRecord, verdict: Verdict) -> None:
        void = record.name not in self.states[-1].extents and record.name.born < self.states[-1].floor
        if verdict is Verdict.LIVE and record.name not in self.ever:
            raise Violation(f"ack: {record.name} was reported live and is not in the history")
        if verdict is Verdict.VOID and not void:
            raise Violation(f"ack: {record.name} was reported void and is not")

    def finish(self, limit: int = 20_000) -> None:
        """Everybody runs on without faults; writers must end, then a look at every replica."""
        for _ in range(limit):
            running = [p for p in self.processes if not p.ended and p.name.startswith("writer")]
            if not running:
                break
            for process in running:
                process.step()
            self.check()
        else:
            raise Violation("progress: a writer waits for ever")
        for process in self.processes:
            if not process.ended and process.name.startswith("reader"):
                for _ in range(12 * IDLE_POLLS_PER_FENCE):
                    if process.log.state.version == len(self.states) - 1:
                        break
                    process.step()
                else:
                    raise Violation(
                        f"progress: a reader stays at {process.log.state.version} of {len(self.states) - 1}"
                    )


# ---- processes -------------------------------------------------------------------------------------------------------


def object_key(name: ExtentName) -> str:
    return f"{space_prefix(SPACE_ID)}extents/{name}"


def make_record(world: World, born: int) -> ExtentRecord:
    n = world.number()
    last = n.to_bytes(16, "big")
    name = ExtentName(last, 1, "fast", born, f"{n:032x}")
    return ExtentRecord(name, Grid(), b"\0" * 16, 0, last, b"\1\0\0\0", b"\2" * 8, 1)


def retry(step: Callable[[], object]) -> None:
    """Until the store answers."""
    while True:
        try:
            step()
        except (Unavailable, Conflict):
            continue
        return


def writer(extents: int) -> Callable[[Process], None]:
    """Stores `extents` extents: names it, uploads it, commits it."""

    def body(me: Process) -> None:
        for _ in range(extents):
            record = make_record(me.world, me.log.state.version)
            retry(lambda record=record: me.log.store.put(object_key(record.name), b"x"))  # type: ignore[misc]

            def commit(record: ExtentRecord = record) -> None:
                me.world.acknowledge(record, me.log.commit([record])[0])

            retry(commit)
            retry(me.log.checkpoint_if_due)

    return body


def reader(me: Process) -> None:
    """Opens and follows the log for ever."""
    retry(me.log.open)
    while True:
        retry(me.log.sync)


def checkpointer(me: Process) -> None:
    """Opens, and writes a checkpoint of every version it sees."""
    retry(me.log.open)
    done = 0
    while True:
        retry(me.log.sync)
        if me.log.state.version > done:
            done = me.log.state.version
            retry(me.log.checkpoint)


def collector(me: Process) -> None:
    """Removes live extents and raises the floor at whim; deletes what FORMAT.md §4.5 lets it delete."""
    retry(me.log.open)
    while True:
        retry(me.log.sync)
        state = me.log.state
        if state.version and me.rng.random() < 0.3:
            names = [live.record.name for live in state.in_order() if me.rng.random() < 0.2]
            floor = me.rng.randrange(state.version) if me.rng.random() < 0.5 else 0
            retry(lambda names=names, floor=floor: me.log.commit([], names, floor=floor))  # type: ignore[misc]
        try:
            for key in _plan(me):
                me.log.store.delete(key)
        except Unavailable:
            continue


def _plan(me: Process) -> Sequence[str]:
    """What may be deleted, by the confirmed state and the newest checkpoint listed."""
    state, world, store = me.log.state, me.world, me.log.store
    listed = [parse_checkpoint_key(info.key) for info in store.list(checkpoints_prefix(SPACE_ID))]
    keys = sorted(world.objects)
    doomed = []
    for key in (key for key in keys if "/extents/" in key):
        name = ExtentName.parse(key.rpartition("/")[2])
        if name not in state.extents and name.born < state.floor:
            doomed.append(key)
    if not listed:
        return doomed
    newest = listed[0]
    for key in (key for key in keys if "/manifest/log/" in key):
        k = int(key[-20:])
        if k <= newest[0] and fence(k, world.milestone) <= state.version and k % world.milestone:
            doomed.append(key)
    doomed += [checkpoint_key(SPACE_ID, *old) for old in listed[1:]]
    kept = segments_prefix(SPACE_ID, *newest)
    for key in (key for key in keys if "/segments/" in key and not key.startswith(kept)):
        version, nonce = key.split("/")[-2].split(".")
        if int(version) < newest[0] or (int(version), nonce) in listed[1:]:
            doomed.append(key)
    return doomed
