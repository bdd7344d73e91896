"""The world: its store, the true history beside it, its processes, and what must hold after each step.

Raises `Violation`, naming the broken invariant: `manifest_model` lists them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache

from lmcache_s3.errors import Missing
from lmcache_s3.index import manifest
from lmcache_s3.index.change import Change
from lmcache_s3.index.checkpoint_loading import load_checkpoint
from lmcache_s3.index.log import IDLE_POLLS_PER_FENCE
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
from lmcache_s3.index.segments import Segment, decode_index
from lmcache_s3.testing.manifest_process import AS_IT_IS, SPACE, SPACE_ID, ULID, Process, Rules, Violation
from lmcache_s3.testing.manifest_roles import collector, object_keys
from lmcache_s3.types import Buffer, ExtentName, ExtentRecord, ObjectInfo, Outcome, space_prefix

_REBUILDER = ULID.format(999_999)
LOG = log_key(SPACE_ID, 0)[:-20]
INBOX = inbox_prefix(SPACE_ID)
_CHECKPOINTS = checkpoints_prefix(SPACE_ID)


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

    def __init__(self, milestone: int = 2, rules: Rules = AS_IT_IS, seed: int = 0) -> None:
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
                if key.startswith(INBOX):
                    self._check_inbox(key)
                del self.objects[key]
                self.seen[f"deleted {_folder(key)}"] += 1
                self._changed = True
            return None
        if verb == "create" and key in self.objects:
            return Outcome.LOST
        if not key.startswith(LOG):
            if self._contents.setdefault(key, data) != data:
                raise Violation(f"contents: {key} gets other bytes")
            self._handed_over_at.setdefault(key, self.truth.version)
            self.seen["handed over"] += key.startswith(INBOX)
        is_new, version = key not in self.objects, key.removeprefix(LOG)
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
        return [key for key in self.objects if key.startswith(INBOX)]


def _folder(key: str) -> str:
    """`extents`, `segments`, `manifest/log`, …"""
    parts = key.removeprefix(space_prefix(SPACE_ID)).split("/")
    return "/".join(parts[: 2 if parts[0] == "manifest" else 1])


@lru_cache(1024)
def _index(data: bytes, version: int, nonce: str) -> tuple[str, ...]:
    """Segments of a checkpoint."""
    return tuple(segment.file for segment in decode_index(data, version, nonce).segments)
