"""A world in which the real manifest code (`lmcache_s3.index`) runs one store request at a time, in any order.

Every process is a greenlet that stops at each request until the scheduler lets it take one step and says what becomes
of the request: answered, answer lost, dropped, carried out late or twice. A process that is never stepped again has
crashed; one that is stepped much later was stalled. The roles are the real ones (`Log`, `Follower` with its hand-overs
and leader, `Inbox`, `Collector`, `rebuild`); only their policy is replaced by whim, since safety must not rest on it:
when to lead, what to collect, how old anything is. The world keeps the true history beside the store and checks, after
each step, what FORMAT.md promises. Deterministic: the same steps give the same run.

Raises `Violation`, naming the broken invariant:
  prefix    (I1) a published replica is a prefix of the history
  ack       (I2) what a commit reports is so
  durable   (I3) the objects of every extent that the history keeps live exist
  contents  (I4) bytes behind a name never change
  openable  (I5) the newest checkpoint is whole, and every later version can be read
  handover  (I6) an inbox object is deleted only when the history has judged all of it
  history   (I7) version numbers are genuinely created once, without gaps
  progress  (I8) when everybody runs on, every store is answered, every reader sees the whole history, and nothing that
                 was handed over lies in the inbox for ever
"""

from __future__ import annotations

import hashlib
import math
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from greenlet import GreenletExit, getcurrent, greenlet

from lmcache_s3.codecs.fast import FastCodec
from lmcache_s3.errors import Conflict, LMCacheS3Error, Missing, Unavailable
from lmcache_s3.extent import array_metadata
from lmcache_s3.identity import KVGroup, Space
from lmcache_s3.index import manifest
from lmcache_s3.index.change import Change
from lmcache_s3.index.follower import Follower, Pacing
from lmcache_s3.index.gc import Collector, GcReport, GcSettings
from lmcache_s3.index.history import list_versions
from lmcache_s3.index.inbox import HandOvers, Inbox, Leader
from lmcache_s3.index.log import IDLE_POLLS_PER_FENCE, Log, LogLimits
from lmcache_s3.index.manifest import (
    EMPTY,
    MAX_INTEGER,
    State,
    Verdict,
    checkpoint_key,
    checkpoints_prefix,
    decode_delta,
    inbox_prefix,
    judged,
    log_key,
    parse_checkpoint_key,
    segments_prefix,
)
from lmcache_s3.index.rebuild import rebuild
from lmcache_s3.index.replica import Replica
from lmcache_s3.index.segments import Segment, decode_index, load_checkpoint
from lmcache_s3.types import (
    Buffer,
    ExtentName,
    ExtentRecord,
    Grid,
    ObjectInfo,
    Outcome,
    extent_prefix,
    shard_key,
    space_prefix,
)

SPACE = Space("5" * 64, "bfloat16", (KVGroup("full", 1, 1, 1, 1),), chunk_tokens=4, model="none")
SPACE_ID = SPACE.id
_ULID = "01JDXB4Z5T8V6Q2W3E4R{:06d}"
_REBUILDER = _ULID.format(999_999)
_PAGE = 3
"""Keys in one page of a LIST."""
_LONGEST = 3
"""Chunks in an extent."""
_LOG = log_key(SPACE_ID, 0)[:-20]
_EXTENTS = space_prefix(SPACE_ID) + "extents/"
_INBOX = inbox_prefix(SPACE_ID)
_CHECKPOINTS = checkpoints_prefix(SPACE_ID)


class Violation(AssertionError):
    """An invariant is broken."""


class Fate(Enum):
    """What becomes of one request."""

    OK = "answered"
    LOST = "carried out, the answer lost"
    DROPPED = "not carried out, no answer"
    LATE = "carried out at some later time, no answer"
    TWICE = "answered, and carried out again at some later time"


# ---- what takes part -------------------------------------------------------------------------------------------------


class WhimLeader(Leader):
    """Leads and steps down at whim, by its log's generator."""

    def should_claim(self) -> bool:
        return self.log.state.lead is None and self.log.rng.random() < 0.3

    def _is_quiet(self, arrived: int) -> bool:
        return self.log.rng.random() < 0.1


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
            writer=_ULID.format(self.number),
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


class _Crash(Exception):
    """The rebuild stops here."""


class _Offline:
    """The world's objects for a rebuild, at its own pace: nobody else runs. Stops before its write number `writes`."""

    url = "sim://"

    def __init__(self, world: World, writes: int | None) -> None:
        self._world, self._left = world, writes

    def get(self, key: str, start: int = 0, end: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        if key not in self._world.objects:
            raise Missing(f"{key}: missing", key=key)
        return self._world.objects[key][start:end]

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        into[:] = self.get(key, start, start + len(into))

    def put(self, key: str, data: Buffer) -> None:
        self._write("put", key, data)

    def create(self, key: str, data: Buffer) -> Outcome:
        return self._write("create", key, data) or Outcome.UNKNOWN

    def delete(self, key: str) -> None:
        self._write("delete", key, b"")

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        return iter(self._world.listed(prefix, start_after, limit))

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _write(self, verb: str, key: str, data: Buffer) -> Outcome | None:
        if self._left is not None:
            if not self._left:
                raise _Crash
            self._left -= 1
        return self._world.carry_out(verb, key, bytes(data))


class World:
    """The store, the true history, the processes. `milestone` is shrunk, so that deletion happens early."""

    def __init__(self, milestone: int = 2, rules: Rules = Rules(), seed: int = 0) -> None:
        self.milestone, self.rules = milestone, rules
        self.rng = random.Random(seed)
        self.objects: dict[str, bytes] = {}
        self.air: list[tuple[str, str, bytes]] = []
        """Writes that will take effect (again) some time."""
        self.states: list[State | None] = [EMPTY]
        """The truth: the state after each version; None for numbers that a rebuild passed over."""
        self.bodies: list[bytes | None] = [b""]
        self.ever: set[ExtentName] = set()
        """Extents that were ever live."""
        self.processes: list[Process] = []
        self.rebuilt = 0
        """Rebuilds that came to their end."""
        self.seen: Counter[str] = Counter()
        """What happened, to know whether a run was worth anything: objects deleted, by folder; hand-overs; leaders."""
        self.prompts = self.rng.choice([2, 100, 100])
        """Few: extents cover each other all the time. Many: the history grows long."""
        self.lies_s = self.rng.choice([0.0, 0.0, 50.0])
        """How far the store's Last-Modified may be off."""
        self._times_s: dict[str, float] = {}
        self._now_s = 0.0
        self._contents: dict[str, bytes] = {}
        """First bytes of every object that has a name of its own."""
        self._handed_over_at: dict[str, int] = {}
        """Version of the truth when an inbox object was first put."""
        self._number = 0
        self._is_rebuilding = False
        self._changed = True

    @property
    def truth(self) -> State:
        state = self.states[-1]
        assert state is not None
        return state

    def number(self) -> int:
        self._number += 1
        return self._number

    def add(self, name: str, body: Callable[[Process], None], checkpoint_every: int = 10**6) -> None:
        self.processes.append(Process(self, name, body, checkpoint_every))

    def close(self) -> None:
        for process in self.processes:
            process.abandon()

    # ---- the store ---------------------------------------------------------------------------------------------------

    def listed(self, prefix: str, start_after: str, limit: int | None) -> list[ObjectInfo]:
        found = [key for key in sorted(self.objects) if key.startswith(prefix) and key > start_after]
        return [ObjectInfo(key, len(self.objects[key]), self._modified_s(key)) for key in found[:limit]]

    def _modified_s(self, key: str) -> float:
        return self._times_s[key] + (self.rng.uniform(-self.lies_s, self.lies_s) if self.lies_s else 0.0)

    def carry_out(self, verb: str, key: str, data: bytes) -> Outcome | None:
        self._now_s += 1.0
        if verb == "delete":
            if key in self.objects:
                if key.startswith(_INBOX):
                    self._check_inbox(key)
                del self.objects[key]
                self.seen[f"deleted {_folder(key)}"] += 1
                self._changed = True
            return None
        if verb == "create" and key in self.objects:
            return Outcome.LOST
        if not key.startswith(_LOG):
            if self._contents.setdefault(key, data) != data:
                raise Violation(f"contents: {key} gets other bytes")
            self._handed_over_at.setdefault(key, self.truth.version)
            self.seen["handed over"] += key.startswith(_INBOX)
        is_new, version = key not in self.objects, key.removeprefix(_LOG)
        self.objects[key] = data
        self._times_s[key] = self._now_s
        self._changed = True
        if version != key and is_new:
            self._created(int(version))
        if key.startswith(_CHECKPOINTS) and self._is_rebuilding:
            self._goes_on_at(*parse_checkpoint_key(key))
        return Outcome.WON if verb == "create" else None

    def _created(self, version: int) -> None:
        if version > len(self.states) and not (self._is_rebuilding and version % self.milestone == 0):
            raise Violation(f"history: version {version} created after {len(self.states) - 1}")
        while (data := self.objects.get(log_key(SPACE_ID, len(self.states)))) is not None:
            delta = decode_delta(data, len(self.states))
            self.seen["led"] += bool(delta.lead)
            self.seen["access"] += bool(delta.access)
            self.states.append(manifest.apply(self.truth, delta))
            self.bodies.append(data)
            self.ever |= {record.name for record in delta.add if record.name in self.truth.extents}

    def _goes_on_at(self, version: int, nonce: str) -> None:
        """The history goes on from a rebuild's checkpoint."""
        if version < len(self.states):
            raise Violation(f"history: rebuild makes version {version}, which was in the history")
        index = decode_index(self.objects[checkpoint_key(SPACE_ID, version, nonce)], version, nonce)

        def get(segment: Segment) -> bytes:
            return self.objects[segments_prefix(SPACE_ID, version, nonce) + segment.file]

        state = load_checkpoint(index, get, None)
        for live in self.truth.extents.values():
            if not all(chunk in state.chunks for chunk in live.record.chunk_hashes()):
                raise Violation(f"ack: rebuild forgets {live.record.name}")
        passed = version - len(self.states)
        self.states += [*[None] * passed, state]
        self.bodies += [None] * (passed + 1)
        self.ever |= set(state.extents)
        self._created(version)

    def deliver(self, i: int) -> None:
        """One write in the air takes effect."""
        verb, key, data = self.air.pop(i % len(self.air))
        self.carry_out(verb, key, data)

    # ---- rebuild -----------------------------------------------------------------------------------------------------

    def rebuild(self, writes: int | None = None) -> None:
        """Offline: nobody runs meanwhile. Collectors were ended and their requests are over, everybody else goes on
        afterwards from where it stood. writes: crash before this write."""
        for process in self.processes:
            if process.name in ("collector", "sweeper"):
                process.abandon()
        self.air = [write for write in self.air if write[0] != "delete"]
        self._is_rebuilding = True
        try:
            nonce = f"{self.number():032x}"
            store = _Offline(self, writes)
            self.rules.rebuild(store, SPACE, writer=_REBUILDER, nonce=nonce, milestone=self.milestone)
            self.rebuilt += 1
        except _Crash:
            pass
        finally:
            self._is_rebuilding = False
        self.add("collector", collector)

    # ---- checks ------------------------------------------------------------------------------------------------------

    def newest_checkpoint(self) -> tuple[int, str] | None:
        keys = [key for key in self.objects if key.startswith(_CHECKPOINTS)]
        return parse_checkpoint_key(min(keys)) if keys else None

    def check(self) -> None:
        """What must hold after each step; costs something only if the store changed."""
        if not self._changed:
            return
        self._changed = False
        for name in self.truth.extents:
            if not all(key in self.objects for key in object_keys(name)):
                raise Violation(f"durable: {name} is live, its objects do not exist")
        newest = self.newest_checkpoint()
        if newest is not None:
            index = _index(self.objects[checkpoint_key(SPACE_ID, *newest)], *newest)
            for segment in index:
                if segments_prefix(SPACE_ID, *newest) + segment not in self.objects:
                    raise Violation("openable: the newest checkpoint lacks a segment")
        for version in range(1 + (newest[0] if newest else 0), len(self.states)):
            if self.objects.get(log_key(SPACE_ID, version)) != self.bodies[version]:
                raise Violation(f"openable: version {version}, after the newest checkpoint, is gone or changed")

    def acknowledge(self, record: ExtentRecord, verdict: Verdict) -> None:
        """A writer is told what became of its store."""
        name = record.name
        if verdict is Verdict.LIVE and name not in self.ever:
            raise Violation(f"ack: {name} was reported live and is not in the history")
        if verdict is Verdict.VOID and (name in self.truth.extents or name.born >= self.truth.floor):
            raise Violation(f"ack: {name} was reported void and is not")
        if verdict is Verdict.COVERED and not self._said(lambda state: judged(state, record) is Verdict.COVERED):
            raise Violation(f"ack: {name} was reported covered and never was")

    def _check_inbox(self, key: str) -> None:
        change = Change.of(decode_delta(self.objects[key], MAX_INTEGER))
        since = self._handed_over_at[key]
        for record in change.add:
            if not self._said(lambda state, record=record: judged(state, record) is not None):  # type: ignore[misc]
                raise Violation(f"handover: {key} is deleted, {record.name} was never judged")
        for name in change.remove:
            if not self._said(lambda state, name=name: name not in state.extents, since):  # type: ignore[misc]
                raise Violation(f"handover: {key} is deleted, {name} was not removed")

    def _said(self, says: Callable[[State], bool], since: int = 0) -> bool:
        """Whether the history said it at some version."""
        return any(state is not None and says(state) for state in reversed(self.states[since:]))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def finish(self, limit: int = 20_000) -> None:
        """Everybody who has not crashed runs on without faults: writers must end, then a look at every replica, then a
        collector must find the inbox empty in the end."""
        self._run_on("writer", lambda process: process.ended, limit, "a writer waits for ever")
        self._run_on("reader", self._is_up_to_date, 24 * IDLE_POLLS_PER_FENCE, "a reader stays behind")
        while self.air:
            self.deliver(0)
            self.check()
        self._run_on("collector", lambda _: not self._waiting(), 6_000, "a hand-over lies in the inbox for ever")

    def _run_on(self, role: str, is_done: Callable[[Process], bool], limit: int, why: str) -> None:
        processes = [p for p in self.processes if p.name.startswith(role) and not p.crashed]
        for _ in range(limit):
            running = [p for p in processes if not p.ended and not is_done(p)]
            if not running:
                return
            for process in running:
                process.step()
                self.check()
        raise Violation(f"progress: {why}")

    def _is_up_to_date(self, process: Process) -> bool:
        return process.log.state.version == len(self.states) - 1

    def _waiting(self) -> list[str]:
        return [key for key in self.objects if key.startswith(_INBOX)]


def _folder(key: str) -> str:
    """`extents`, `segments`, `manifest/log`, …"""
    parts = key.removeprefix(space_prefix(SPACE_ID)).split("/")
    return "/".join(parts[: 2 if parts[0] == "manifest" else 1])


@lru_cache(1024)
def _index(data: bytes, version: int, nonce: str) -> tuple[str, ...]:
    """Segments of a checkpoint."""
    return tuple(segment.file for segment in decode_index(data, version, nonce).segments)


# ---- extents ---------------------------------------------------------------------------------------------------------


def object_keys(name: ExtentName) -> tuple[str, str]:
    return shard_key(SPACE_ID, name, Grid(), 0), f"{extent_prefix(SPACE_ID, name)}/zarr.json"


@lru_cache(256)
def _prefix_hash(prompt: int, chunk: int) -> bytes:
    return hashlib.sha256(b"%d %d" % (prompt, chunk)).digest()[:16]


def make_record(me: Process) -> ExtentRecord:
    """An extent of some prompt's beginning, named now."""
    prompt, chunks = me.rng.randrange(me.world.prompts), me.rng.randint(1, _LONGEST)
    hashes = [_prefix_hash(prompt, chunk) for chunk in range(chunks)]
    nonce = f"{me.world.number():032x}" if me.rules.fresh_names else hashes[-1].hex()
    name = ExtentName(hashes[-1], chunks, "fast", me.log.state.version, nonce)
    cell_bytes = SPACE.geometry.chunk_bytes + 4
    return ExtentRecord(
        name=name,
        grid=Grid(),
        parent=b"\0" * 16,
        first_token=0,
        hashes=b"".join(hashes),
        lengths=struct.pack(f"<{chunks}I", *[cell_bytes] * chunks),
        sums=struct.pack(f"<{chunks}Q", *range(chunks)),
        raw_bytes=SPACE.geometry.chunk_bytes * chunks,
    )


def upload(me: Process, record: ExtentRecord) -> None:
    """Shard, then `zarr.json`. Two uploads never have the same bytes: engines round differently."""
    shard, document = object_keys(record.name)
    data = b"%8d" % me.world.number()
    data += bytes(record.encoded_bytes + 16 * record.n_chunks + 4 - len(data))
    metadata = array_metadata(
        record, SPACE.geometry, FastCodec(), space_id=SPACE_ID, fidelity="exact", writer=me.log.writer
    )
    retry(lambda: me.log.store.put(shard, data))
    retry(lambda: me.log.store.put(document, metadata))


def retry(step: Callable[[], object]) -> None:
    """Until the store answers."""
    while True:
        try:
            step()
        except (Unavailable, Conflict):
            continue
        return


# ---- processes -------------------------------------------------------------------------------------------------------


def writer(extents: int) -> Callable[[Process], None]:
    """Stores `extents` extents: names one, uploads it, commits it directly."""

    def body(me: Process) -> None:
        for _ in range(extents):
            record = make_record(me)
            if me.rules.uploads_first:
                upload(me, record)

            def commit(record: ExtentRecord = record) -> None:
                verdict = me.log.commit([record])[0]
                me.world.acknowledge(record, verdict)
                _answered(me, record, verdict)

            retry(commit)
            if not me.rules.uploads_first:
                upload(me, record)
            retry(me.log.checkpoint_if_due)

    return body


def _answered(me: Process, record: ExtentRecord, verdict: Verdict) -> None:
    if me.rules.sweeps_covered and verdict is Verdict.COVERED:
        for key in object_keys(record.name):
            retry(lambda key=key: me.log.store.delete(key))  # type: ignore[misc]


def follower(extents: int) -> Callable[[Process], None]:
    """Stores `extents` extents the way that is cheapest, as an engine does: directly, by hand-over, or as the leader.
    Takes back a damaged one and records accesses now and then. Ends by stepping down, or dies."""

    def body(me: Process) -> None:
        pacing = Pacing(poll_s=2.0, hand_over_s=0.5, merge_s=1.0, access_s=5.0)
        ulid = lambda: _ULID.format(100_000 + me.world.number())  # noqa: E731
        whole = Follower(me.log, pacing, rng=me.rng, ulid=ulid)
        whole.inbox = me.rules.inbox(me.log)
        whole.leader = WhimLeader(me.log, whole.inbox, me.log.clock)
        whole.hand_overs = me.rules.hand_overs(me.log, clock=me.log.clock, rng=me.rng, ulid=ulid)
        covered: list[ExtentRecord] = []
        retry(me.log.open)
        left = extents
        while left or whole.pending:
            if left and (whole.pending < 2 or me.rng.random() < 0.1):
                left -= 1
                record = make_record(me)
                if me.rules.uploads_first:
                    upload(me, record)
                whole.submit(_change(me, record), _done(me, record, covered))
            if me.rng.random() < 0.3:
                whole.touch(name for name in me.log.state.extents if me.rng.random() < 0.3)
            me.now_s = max(me.now_s, whole.due_s()) + me.rng.choice([0.0, 0.0, 0.0, 20.0])
            try:
                whole.step()
            except LMCacheS3Error:
                continue
            while covered:
                _answered(me, covered.pop(), Verdict.COVERED)
        if me.rng.random() < 0.5:
            retry(whole.drain)

    return body


def _change(me: Process, record: ExtentRecord) -> Change:
    names = [name for name in me.log.state.extents if me.rng.random() < 0.05]
    return Change(add=(record,), remove=tuple(names))


def _done(me: Process, record: ExtentRecord, covered: list[ExtentRecord]) -> Callable[[list[Verdict]], None]:
    def done(verdicts: list[Verdict]) -> None:
        me.world.acknowledge(record, verdicts[0])
        if verdicts[0] is Verdict.COVERED:
            covered.append(record)

    return done


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
    """Round after round with another policy each: what to remove, how old is old."""
    retry(me.log.open)
    while True:
        settings = GcSettings(
            grace_s=me.rng.choice([0.0, 10.0, 100.0]),
            history_s=me.rng.choice([0.0, 0.0, 50.0]),
            ttl_s=me.rng.choice([None, 0.0, 30.0]),
            max_bytes=me.rng.choice([None, None, 0, 60]),
            max_attempts=3,
        )
        try:
            me.rules.collector(me.log, settings).run()
        except (Unavailable, Conflict):
            continue


def sweeper(me: Process) -> None:
    """A collector that keeps no history and only sweeps the manifest: versions go as early as they may."""
    retry(me.log.open)
    whole = me.rules.collector(me.log, GcSettings(history_s=0.0))
    while True:
        retry(me.log.sync)
        try:
            versions = list_versions(me.log.store, SPACE_ID, upto=me.log.state.version)
            whole._sweep_manifest(versions, GcReport(dry_run=False, now_s=math.inf))
        except Unavailable:
            continue


# ---- seeded runs -----------------------------------------------------------------------------------------------------

CASTS = ("direct", "followers", "mixed", "log", "rebuild")
_DELTA_WRITES = ("put", "create", "delete")


def populate(world: World, cast: str, extents: int = 10) -> None:
    """direct: writers that commit. followers: writers that hand over and lead. mixed: both. log: a long history, of
    which little is left. rebuild: as direct, but in `play` there always is a rebuild that crashes."""
    first, second = {
        "direct": (writer, writer),
        "followers": (follower, follower),
        "mixed": (follower, writer),
        "log": (writer, writer),
        "rebuild": (writer, writer),
    }[cast]
    if cast == "log":
        world.prompts = 1000
        world.add("sweeper", sweeper)
    world.add("writer-a", first(extents))
    world.add("writer-b", second(extents), checkpoint_every=2)
    if cast in ("followers", "log"):
        world.add("writer-c", first(extents))
    world.add("reader", reader)
    world.add("checkpointer", checkpointer)
    if cast != "log":
        world.add("collector", collector)
    if cast == "direct":
        world.add("collector", collector)


def play(seed: int, rules: Rules = Rules(), *, steps: int = 1000, cast: str | None = None) -> World:
    """One seeded run: random turns, with long stalls, mostly of processes that are about to write. Some runs have a
    rebuild in their middle, or a writer that crashes."""
    rng = random.Random(seed)
    world = World(rules=rules, seed=seed)
    try:
        cast = cast or CASTS[seed % len(CASTS)]
        populate(world, cast)
        faults = rng.choice([0.0, 0.05, 0.2])
        crashes = cast == "rebuild"
        rebuild_at = rng.randrange(steps // 2) if crashes or rng.random() < 0.2 else None
        asleep: dict[Process, int] = {}
        for now in range(steps):
            if now == rebuild_at:
                world.rebuild(rng.choice(range(8)) if crashes or rng.random() < 0.5 else None)
                world.check()
            awake = [p for p in world.processes if not p.ended and not p.crashed and asleep.get(p, 0) <= now]
            if awake:
                _turn(world, rng.choice(awake), rng, faults, asleep, now)
        world.finish()
    except Violation as e:
        raise Violation(f"seed {seed}: {e}") from e
    finally:
        world.close()
    return world


def halt(seed: int, who: int, request: int, *, forever: bool, cast: str = "mixed") -> bool:
    """A seeded run without other faults in which process `who` stops before its request number `request`: it crashed
    (`forever`), or goes on when all others have done what they wanted. Whether it came so far."""
    rng = random.Random(seed)
    world = World(seed=seed)
    try:
        populate(world, cast, extents=5)
        halted, made = world.processes[who], 0
        for _ in range(600):
            awake = [p for p in world.processes if not p.ended and (p is not halted or made < request)]
            process = rng.choice(awake)
            made += process is halted
            process.step()
            world.check()
        reached = made == request and not halted.ended
        halted.crashed = True
        world.finish()
        halted.crashed = forever
        world.finish()
    except Violation as e:
        raise Violation(f"seed {seed}, {halted.name} halts before request {request}: {e}") from e
    finally:
        world.close()
    return reached


def _turn(
    world: World, process: Process, rng: random.Random, faults: float, asleep: dict[Process, int], now: int
) -> None:
    verb, key = process.at or ("", "")
    about_to_create = verb == "create" and key.startswith(_LOG)
    if rng.random() < (0.3 if about_to_create else 0.1 if verb == "delete" else 0.02):
        asleep[process] = now + rng.randrange(20, 600 if process.name == "reader" else 250)
        return
    if key.startswith(_INBOX) and process.name.startswith("writer") and rng.random() < 0.02:
        process.crashed = True
        return
    fate = Fate.OK
    if rng.random() < (faults if verb in _DELTA_WRITES else faults / 4):
        fate = rng.choice(list(Fate))
    process.step(fate)
    if world.air and rng.random() < 0.05:
        world.deliver(rng.randrange(len(world.air)))
    world.check()
