"""Handing over and leading: requests made, who leads when, what dies and gets lost, junk; a fleet in virtual time."""

from __future__ import annotations

import random
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from ulid import ULID

from lmcache_s3.errors import Conflict, LMCacheS3Error, Unavailable
from lmcache_s3.index.change import GROUP_BYTES, Change, grouped, joined
from lmcache_s3.index.follower import Follower, Pacing, Request
from lmcache_s3.index.inbox import (
    JUNK_AGE_S,
    LONGEST_PATIENCE_S,
    PATIENCE_S,
    STEP_DOWN_AFTER_S,
    HandOvers,
    Inbox,
    Leader,
)
from lmcache_s3.index.log import Log, LogLimits
from lmcache_s3.index.manifest import (
    NOBODY,
    Delta,
    Verdict,
    decode_delta,
    encode_delta,
    inbox_key,
    inbox_prefix,
    log_key,
    record_size,
)
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.simulated_s3 import Misbehaviour, SimulatedS3
from lmcache_s3.testing.virtual import Signal, Simulation, VirtualExecutor
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import ExtentName, ExtentRecord, Grid, ObjectInfo

SPACE_ID = "ab" * 32
OTHER = "01JDXB4Z5T8V6Q2W3E4R5T6Y7H"


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


@pytest.fixture
def fleet(memory_url: str) -> Fleet:
    return Fleet(CountingStore(open_store(memory_url)))


def lead(follower: Follower) -> None:
    """Make it the leader, whatever the log shows."""
    follower.log.commit((), lead=follower.log.writer)
    assert follower.leader.leads


# ---- requests, as PROTOCOL counts them -------------------------------------------------------------------------------


def test_a_hand_over_is_one_put_and_a_round_is_three_gets_and_one_a_hand_over(fleet: Fleet) -> None:
    leader, writer = fleet.add(poll_s=100), fleet.add(poll_s=100)
    lead(leader)
    writer.poll()
    records = [fleet.store_one(writer) for _ in range(3)]
    assert fleet.requests(writer.step) == {"put": 1}, "what is queued goes together"
    assert writer.hand_overs.handed_over == len(writer.hand_overs) == 1
    assert fleet.requests(leader.step) == {"list": 1, "get": 3 + 1, "create": 1, "delete": 1}
    assert not fleet.inbox()
    assert not fleet.answers, "the writer did not look yet"
    assert fleet.requests(writer.poll) == {"get": 1 + 2}
    assert fleet.answers == {record.name: [Verdict.LIVE] for record in records}
    assert writer.pending == 0
    fleet.clock.sleep(1)
    assert fleet.requests(leader.step) == {"list": 1, "get": 1}, "a round without work"


def test_hand_overs_are_so_far_apart_and_take_all_that_is_queued(fleet: Fleet) -> None:
    leader, writer = fleet.add(), fleet.add(hand_over_s=2.0, poll_s=1.0)
    lead(leader)
    writer.poll()
    before = fleet.store.counts["put"]
    for _ in range(40):
        fleet.store_one(writer)
        fleet.run(0.25)
    fleet.run(5)
    assert 5 <= fleet.store.counts["put"] - before <= 6
    assert len(fleet.answers) == 40
    assert leader.inbox.counters.merged == writer.hand_overs.handed_over


def test_a_lone_writer_never_waits_nor_hands_over(fleet: Fleet) -> None:
    writer = fleet.add(poll_s=100)
    for _ in range(5):
        fleet.store_one(writer)
        assert writer.due_s() <= fleet.clock()
        assert fleet.requests(writer.step) == {"create": 1, "get": 2}
    assert len(fleet.answers) == 5


# ---- who leads -------------------------------------------------------------------------------------------------------


def test_a_fast_log_gets_a_leader_and_a_quiet_one_loses_it(fleet: Fleet) -> None:
    writers = [fleet.add(poll_s=1.0, hand_over_s=1.0) for _ in range(4)]
    for _ in range(20):
        for writer in writers:
            fleet.store_one(writer)
        fleet.run(1.0)
    (leader,) = [writer for writer in writers if writer.leader.leads]
    fleet.run(5.0)
    assert {writer.log.state.lead for writer in writers} == {leader.log.writer}
    assert sum(writer.hand_overs.handed_over for writer in writers) > 10
    assert leader.hand_overs.handed_over == 0
    version = leader.log.state.version
    for _ in range(10):
        for writer in writers:
            fleet.store_one(writer)
        fleet.run(1.0)
    assert leader.log.state.version - version <= 11, "a version a second"
    fleet.run(STEP_DOWN_AFTER_S + 5)
    assert {writer.log.state.lead for writer in writers} == {None}
    assert len(fleet.answers) == 30 * 4
    assert not fleet.inbox()
    assert not fleet.errors


def test_a_slow_log_gets_no_leader(fleet: Fleet) -> None:
    writers = [fleet.add() for _ in range(2)]
    for _ in range(30):
        for writer in writers:
            fleet.store_one(writer)
        fleet.run(1.0)
    assert {writer.log.state.lead for writer in writers} == {None}
    assert writers[0].log.rate.per_s() == pytest.approx(2.0, abs=0.5)


def test_of_two_leaders_the_one_that_the_log_names_goes_on(fleet: Fleet) -> None:
    a, b, writer = fleet.add(), fleet.add(), fleet.add(poll_s=0.5)
    lead(a)
    a.leader.round()
    b.log.sync()
    lead(b)  # `a` does not know yet: it may still merge once
    writer.poll()
    record = fleet.store_one(writer)
    writer.step()
    merged = Inbox(a.log)
    merged.merge()
    assert record.name in a.log.state.extents
    b.leader.round()
    assert not fleet.inbox()
    counted = fleet.requests(lambda: a.leader.round())
    assert "list" not in counted
    assert not a.leader.leads
    assert b.leader.leads
    assert a.log.sync() == b.log.sync()
    assert [live.record for live in a.log.state.in_order()] == [record]


def test_only_one_of_many_who_want_to_lead_does(fleet: Fleet) -> None:
    a, b = fleet.log(), fleet.log()
    a.commit((), lead=a.writer)
    b.commit((), lead=b.writer)
    assert a.sync().lead == b.state.lead == a.writer, "b saw nobody leading when it asked"
    assert b.state.version == 1
    b.commit((), lead=b.writer)
    assert a.sync().lead == b.writer, "b knew of a"
    a.commit((), lead=NOBODY)
    assert b.sync().lead is None
    version = b.state.version
    b.commit((), lead=NOBODY)
    assert b.state.version == version, "nobody leads already"


def test_a_committer_gives_way_to_a_new_leader_and_hands_over(fleet: Fleet) -> None:
    a, b = fleet.add(), fleet.add(poll_s=0.5)
    lead(a)
    record = fleet.store_one(b)
    with pytest.raises(Conflict) as e:
        b.log.commit([record], give_way=True)
    assert e.value.kind == "leader"
    c = fleet.add(poll_s=0.5)
    c.log.replica.publish(fleet.log().state)  # has not seen the leader
    other = fleet.store_one(c)
    c.step()
    assert not fleet.errors
    fleet.run(4)
    assert set(fleet.answers) == {record.name, other.name}
    assert c.hand_overs.handed_over == 1


def test_a_leader_writes_the_checkpoints_that_are_due(fleet: Fleet) -> None:
    leader = Follower(fleet.log(checkpoint_every=4), Pacing(), rng=random.Random(1), ulid=lambda: str(ULID()))
    fleet.followers.append(leader)
    writer = fleet.add(poll_s=0.5, hand_over_s=0.5)
    lead(leader)
    writer.poll()
    for _ in range(10):
        fleet.store_one(writer)
        fleet.run(1.0)
    assert leader.log.counters.checkpoints >= 2
    assert writer.log.counters.checkpoints == 0
    assert fleet.log().open() == leader.log.sync()


def test_a_store_that_is_away_is_asked_less_and_less_often(fleet: Fleet) -> None:
    faulty = FaultyStore(fleet.store)
    writer = fleet.add(faulty, poll_s=1.0)
    record = fleet.store_one(writer)
    faulty.faults = [Fault(mode="error")]
    asked = []
    for _ in range(12):
        fleet.clock.now_s = max(fleet.clock.now_s, writer.due_s())
        asked.append(fleet.clock.now_s)
        with pytest.raises(Unavailable):
            writer.step()
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert all(0.05 * 2**i <= pause <= 60 for i, pause in enumerate(pauses[:9], 1))
    assert max(pauses) > 30
    assert writer.pending == 1
    faulty.faults = []
    fleet.run(61.0)
    assert fleet.answers == {record.name: [Verdict.LIVE]}
    assert writer.due_s() - fleet.clock() <= 1.1, "back to its polls"


# ---- what dies, stalls and gets lost ---------------------------------------------------------------------------------


def test_a_dead_leader_is_replaced_by_one_of_those_who_waited(fleet: Fleet) -> None:
    dead = fleet.add()
    lead(dead)
    fleet.followers.clear()
    writers = [fleet.add(poll_s=1.0, hand_over_s=0.5) for _ in range(8)]
    records = [fleet.store_one(writer) for writer in writers]
    start_s = fleet.clock()
    fleet.run(PATIENCE_S - 0.1)
    assert not fleet.answers
    assert len(fleet.inbox()) == 8
    fleet.run(PATIENCE_S + 5)
    assert set(fleet.answers) == {record.name for record in records}
    leaders = {writer.log.state.lead for writer in writers}
    assert len(leaders) == 1
    assert leaders < {writer.log.writer for writer in writers}
    assert sum(writer.hand_overs.taken_back for writer in writers) < 8, "most waited for the new leader"
    assert fleet.clock() - start_s <= 2 * PATIENCE_S + 5
    fleet.run(3)
    assert not fleet.inbox(), "what the dead one left was deleted"
    assert len(writers[0].log.state.extents) == 8


def test_a_leader_that_steps_down_leaves_nobody_waiting(fleet: Fleet) -> None:
    leader, writer = fleet.add(merge_s=100), fleet.add(poll_s=1.0)
    lead(leader)
    leader.step()
    writer.poll()
    record = fleet.store_one(writer)
    fleet.run(0.5)
    assert len(writer.hand_overs) == 1
    assert leader.drain()
    assert not leader.leader.leads
    fleet.run(2.0, writer)
    assert fleet.answers == {record.name: [Verdict.LIVE]}
    assert writer.hand_overs.taken_back == 1
    assert writer.log.state.lead is None
    assert len(fleet.inbox()) == 1, "left for the next who merges"
    log = fleet.log()
    log.open()
    Inbox(log).merge()
    assert not fleet.inbox()
    assert log.state.version == writer.log.state.version, "found judged: no version"


def test_close_commits_what_is_handed_over_and_queued(fleet: Fleet) -> None:
    leader, writer = fleet.add(), fleet.add(poll_s=100, hand_over_s=100)
    lead(leader)
    writer.poll()
    first = fleet.store_one(writer)
    writer.step()
    second = fleet.store_one(writer)
    assert writer.drain()
    assert fleet.answers == {first.name: [Verdict.LIVE], second.name: [Verdict.LIVE]}
    assert writer.log.state.lead == leader.log.writer, "who leads goes on leading"
    third = fleet.store_one(leader)
    assert leader.drain()
    assert third.name in fleet.answers
    assert leader.log.state.lead is None
    assert leader.log.state.version == 3, "stepping down rides along"


@pytest.mark.parametrize("mode", ["error", "error_after", "lost_answer"])
@pytest.mark.parametrize("verb", ["get", "put", "create", "delete", "list"])
def test_lost_answers_and_errors_lose_nothing(fleet: Fleet, mode: Any, verb: Any) -> None:
    faults = [Fault(mode=mode, verbs=frozenset({verb}), times=3, skip=1, key="manifest/")]
    stores = [FaultyStore(fleet.store), FaultyStore(fleet.store)]
    leader, writer = fleet.add(stores[0]), fleet.add(stores[1], poll_s=0.5, hand_over_s=0.5)
    lead(leader)
    writer.poll()
    for store in stores:
        store.faults = faults
    records = []
    for _ in range(10):
        records += [fleet.store_one(writer), fleet.store_one(leader)]
        fleet.run(1.0)
    fleet.run(60.0)
    assert set(fleet.answers) == {record.name for record in records}
    assert all(verdicts == [Verdict.LIVE] for verdicts in fleet.answers.values())
    assert not fleet.inbox()
    assert leader.log.state.lead is None, "it stepped down, in the end"
    assert {live.record.name for live in leader.log.sync().in_order()} == set(fleet.answers)


def test_an_inbox_object_goes_only_after_the_version_is_confirmed(fleet: Fleet) -> None:
    writer = fleet.add()
    lead(writer)
    record = make_record()
    fleet.store.put(inbox_key(SPACE_ID, str(ULID())), encode_delta(Delta(OTHER, add=(record,))))
    faulty = FaultyStore(fleet.store)
    log = fleet.log(faulty)
    log.open()
    # The create is won; the fence, asked after it, does not answer: not confirmed.
    faulty.faults = [Fault(mode="error", verbs=frozenset({"get"}), key="log/0*8192$")]
    with pytest.raises(Unavailable):
        Inbox(log).merge()
    assert len(fleet.inbox()) == 1
    faulty.faults = []
    log.sync()
    assert Inbox(log).merge() == 1
    assert not fleet.inbox()
    assert record.name in log.state.extents
    assert log.state.version == 2


def test_a_failed_deletion_is_made_up_for(fleet: Fleet) -> None:
    faulty = FaultyStore(fleet.store, [Fault(mode="error", verbs=frozenset({"delete"}))])
    log = fleet.log(faulty)
    record = make_record()
    fleet.store.put(inbox_key(SPACE_ID, str(ULID())), encode_delta(Delta(OTHER, add=(record,))))
    inbox = Inbox(log)
    for _ in range(2):
        inbox.merge()
    assert (log.state.version, len(fleet.inbox())) == (1, 1)
    faulty.faults = []
    inbox.merge()
    assert (log.state.version, fleet.inbox()) == (1, [])
    assert (inbox.counters.undeleted, inbox.counters.deleted) == (2, 1)


def test_one_failed_get_does_not_stop_the_others(fleet: Fleet) -> None:
    records = [make_record() for _ in range(5)]
    keys = [inbox_key(SPACE_ID, str(ULID())) for _ in records]
    for key, record in zip(keys, records, strict=True):
        fleet.store.put(key, encode_delta(Delta(OTHER, add=(record,))))
    faulty = FaultyStore(fleet.store, [Fault(mode="error", verbs=frozenset({"get"}), key=keys[2])])
    inbox = Inbox(fleet.log(faulty))
    inbox.merge()
    assert fleet.inbox() == [keys[2]]
    assert set(inbox.log.state.extents) == {record.name for record in records} - {records[2].name}
    own = Request(Change(add=(make_record(),)), lambda _: None, lambda _: None)
    confirmed: list[Request] = []
    inbox.merge([own], confirmed.extend)
    assert confirmed == [own]
    faulty.faults = []
    inbox.merge()
    assert not fleet.inbox()
    assert inbox.counters.unread == 2


def test_void_and_covered_hand_overs_are_answered(fleet: Fleet) -> None:
    leader, writer = fleet.add(), fleet.add(poll_s=0.5)
    for _ in range(3):
        leader.log.commit([make_record()])
    lead(leader)
    writer.poll()
    stale, twin = make_record(born=0), make_record(leader.log.state.version)
    leader.log.commit([make_record(hashes=twin.hashes)], floor=2)
    for record in (stale, twin):
        fleet.store_one(writer, record)
    fleet.run(4)
    assert fleet.answers == {stale.name: [Verdict.VOID], twin.name: [Verdict.COVERED]}
    assert not fleet.inbox()


def test_a_removal_waits_for_the_extent_it_takes_back(fleet: Fleet) -> None:
    """Merged in one version, or the wrong way round, the extent would come back."""
    leader, writer = fleet.add(), fleet.add(poll_s=0.5, hand_over_s=0.1)
    lead(leader)
    writer.poll()
    record = fleet.store_one(writer)
    ended: list[list[Verdict]] = []
    writer.submit(Change(remove=(record.name,)), ended.append)
    fleet.run(10)
    assert fleet.answers == {record.name: [Verdict.LIVE]}
    assert ended == [[]]
    assert writer.hand_overs.handed_over == 2
    assert not writer.log.sync().extents
    fleet.run(20)
    assert not writer.log.sync().extents
    # The same without a leader.
    leader.drain()
    writer.poll()
    record = fleet.store_one(writer)
    writer.submit(Change(remove=(record.name,)), ended.append)
    fleet.run(5)
    assert fleet.answers[record.name] == [Verdict.LIVE]
    assert len(ended) == 2
    assert not writer.log.sync().extents


def test_a_name_added_and_removed_in_one_commit_is_removed(fleet: Fleet) -> None:
    log = fleet.log(max_commit_attempts=3)
    record = make_record()
    assert log.commit([record], [record.name]) == [Verdict.VOID]
    assert log.state.version == 0
    log.commit([record])
    assert log.commit([record], [record.name]) == [Verdict.VOID]
    assert (log.state.version, len(log.state.extents)) == (2, 0)


# ---- junk in the inbox -----------------------------------------------------------------------------------------------


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


JUNK = {
    "newer format": (str(ULID()), b'{"format":2}'),
    "no JSON": (str(ULID()), b"\0\xff"),
    "truncated": (str(ULID()), encode_delta(Delta(OTHER, add=(make_record(),)))[:-9]),
    "no ULID": ("README.txt", encode_delta(Delta(OTHER, add=(make_record(),)))),
    "a folder": (f"old/{ULID()}", encode_delta(Delta(OTHER, add=(make_record(),)))),
    "oversized": (str(ULID()), b" " * (16 * 2**20 + 1)),
}


@pytest.mark.parametrize("what", JUNK)
def test_junk_is_counted_and_stops_nobody(fleet: Fleet, what: str) -> None:
    name, body = JUNK[what]
    aged = Aged(fleet.store)
    log = fleet.log(aged)
    inbox = Inbox(log)
    junk, record = inbox_prefix(SPACE_ID) + name, make_record()
    good = inbox_key(SPACE_ID, str(ULID()))
    fleet.store.put(junk, body)
    fleet.store.put(good, encode_delta(Delta(OTHER, add=(record,))))
    inbox.merge()
    assert record.name in log.state.extents
    assert fleet.inbox() == [junk]
    assert (inbox.counters.junk, inbox.counters.merged, inbox.counters.deleted) == (1, 1, 1)
    assert fleet.requests(inbox.merge) == {"list": 1}, "read once"
    assert inbox.counters.junk == 1

    aged.modified_s[junk] = 1e6
    inbox.merge(newest_s=1e6 + JUNK_AGE_S - 1)
    assert fleet.inbox() == [junk]
    aged.modified_s[junk] = 1e6 - JUNK_AGE_S - 1
    inbox.merge()
    assert fleet.inbox() == [junk], "its own age tells nothing of the store's clock"
    fleet.store.put(good, encode_delta(Delta(OTHER, add=(make_record(),))))
    inbox.merge()
    assert not fleet.inbox()
    assert inbox.counters.junk_deleted == 1


def test_what_a_hand_over_says_of_leader_and_floor_is_ignored(fleet: Fleet) -> None:
    log = fleet.log()
    body = encode_delta(Delta(OTHER, add=(make_record(),), lead=OTHER, floor=10**6))
    fleet.store.put(inbox_key(SPACE_ID, str(ULID())), body)
    Inbox(log).merge()
    assert (log.state.version, log.state.lead, log.state.floor) == (1, None, 0)


def test_big_inboxes_are_read_in_parallel_and_committed_in_several_versions(fleet: Fleet) -> None:
    big = [make_record(chunks=2**15) for _ in range(6)]
    assert 4 * record_size(big[0]) > GROUP_BYTES
    for record in big:
        fleet.store.put(inbox_key(SPACE_ID, str(ULID())), encode_delta(Delta(OTHER, add=(record,))))
    for _ in range(50):
        record = make_record()
        fleet.store.put(inbox_key(SPACE_ID, str(ULID())), encode_delta(Delta(OTHER, add=(record,))))
    with ThreadPoolExecutor(8) as executor:
        log = fleet.log()
        assert Inbox(log, executor).merge() == 56
    assert len(log.state.extents) == 56
    assert not fleet.inbox()
    assert 2 <= log.state.version <= 6
    for version in range(1, log.state.version + 1):
        data = fleet.store.get(log_key(SPACE_ID, version))
        assert len(data) <= GROUP_BYTES
        assert decode_delta(data, version).writer == log.writer


def test_the_longest_hand_over_is_merged_whole_and_stops_nobody(fleet: Fleet) -> None:
    """16 MiB, written by another program: what we make of it must not be longer than a version may be."""
    live, last = make_record(), make_record()
    log = fleet.log()
    log.commit([live])
    delta = Delta(OTHER, add=tuple(make_record(chunks=2**15) for _ in range(13)), remove=(live.name,))
    body = encode_delta(delta).replace(b'"floor":0,"access":[],', b"").replace(b'{"format"', b'{ "format"')
    body += b" " * (16 * 2**20 - len(body))
    key = inbox_key(SPACE_ID, str(ULID()))
    fleet.store.put(key, body)
    fleet.store.put(inbox_key(SPACE_ID, str(ULID())), encode_delta(Delta(OTHER, add=(last,))))
    inbox = Inbox(log)
    inbox.merge()
    assert not fleet.inbox()
    assert set(log.state.extents) == {record.name for record in delta.add} | {last.name}
    assert inbox.counters.deleted == 2
    assert log.state.version > 3


def test_what_is_added_and_removed_at_once_is_merged_as_removed(fleet: Fleet) -> None:
    log = fleet.log()
    record, other = make_record(), make_record()
    fleet.store.put(inbox_key(SPACE_ID, str(ULID())), encode_delta(Delta(OTHER, (record, other), (record.name,))))
    Inbox(log).merge()
    assert not fleet.inbox()
    assert set(log.state.extents) == {other.name}


def test_a_round_reads_a_bounded_part(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_s3.index.inbox.MAX_ROUND_OBJECTS", 4)
    log = fleet.log()
    for _ in range(10):
        fleet.store.put(inbox_key(SPACE_ID, str(ULID())), encode_delta(Delta(OTHER, add=(make_record(),))))
    inbox = Inbox(log)
    for left in (6, 2, 0):
        inbox.merge()
        assert len(fleet.inbox()) == left
    assert len(log.state.extents) == 10


def test_grouping() -> None:
    def request(change: Change) -> Request:
        return Request(change, lambda _: None, lambda _: None)

    a, b = make_record(), make_record()
    adds = [request(Change(add=(r,))) for r in (a, b, a)]
    assert list(grouped(adds)) == [adds]
    one = joined(r.change for r in adds)
    assert (one.add, one.remove) == ((a, b), ())
    back = request(Change(remove=(a.name,)))
    assert list(grouped([*adds, back, adds[0]])) == [adds, [back], [adds[0]]]
    assert list(grouped([])) == []
    assert list(grouped(adds, limit_bytes=1)) == [[one] for one in adds]


# ---- the writer's side -----------------------------------------------------------------------------------------------


def test_patience_is_random_and_a_new_leader_has_its_own(fleet: Fleet) -> None:
    log, other = fleet.log(), fleet.log()
    other.commit((), lead=other.writer)
    log.sync()
    waits = []
    for seed in range(20):
        hand_overs: HandOvers[Request] = HandOvers(
            log, clock=fleet.clock, rng=random.Random(seed), ulid=lambda: str(ULID())
        )
        request = Request(Change(add=(make_record(),)), lambda _: None, lambda _: None)
        hand_overs.put([request])
        assert hand_overs.due_s is not None
        waits.append(hand_overs.due_s - fleet.clock())
    assert PATIENCE_S <= min(waits) < PATIENCE_S + 1 < 2 * PATIENCE_S - 1 < max(waits) <= 2 * PATIENCE_S
    fleet.clock.sleep(2 * PATIENCE_S)
    for i in range(2):  # only once: leaders might follow one another for ever
        third = fleet.log()
        third.sync()
        third.commit((), lead=third.writer)
        log.sync()
        assert hand_overs.take_given_up() == (([], False) if i == 0 else ([request], False))
        fleet.clock.sleep(2 * PATIENCE_S)
    hand_overs.put([request])
    fleet.clock.sleep(2 * PATIENCE_S)
    assert hand_overs.take_given_up() == ([request], True), "the one it trusted is still named"


def test_a_busy_leader_is_left_more_time_but_not_for_ever(fleet: Fleet) -> None:
    log, leader = fleet.log(), fleet.log()
    leader.commit((), lead=leader.writer)
    log.sync()
    hand_overs: HandOvers[Request] = HandOvers(log, clock=fleet.clock, rng=random.Random(1), ulid=lambda: str(ULID()))
    request = Request(Change(add=(make_record(),)), lambda _: None, lambda _: None)
    hand_overs.put([request])
    waited_s = 0.0
    while not (given_up := hand_overs.take_given_up()[0]):
        leader.commit([make_record()])  # others', for its round is long
        log.sync()
        fleet.clock.sleep(1.0)
        waited_s += 1.0
    assert given_up == [request]
    assert LONGEST_PATIENCE_S <= waited_s < LONGEST_PATIENCE_S + 5

    hand_overs.put([request])
    for _ in range(2):
        leader.commit([make_record()])
        log.sync()
        fleet.clock.sleep(1.0)
    fleet.clock.sleep(2 * PATIENCE_S - 2.0)  # it died
    assert hand_overs.take_given_up() == ([request], True)


def test_deletions_go_on_beside_the_next_round(fleet: Fleet) -> None:
    gate, deleted = threading.Event(), []

    class Slow(Aged):
        def delete(self, key: str) -> None:
            gate.wait(10)
            deleted.append(key)
            if len(deleted) == 1:
                raise Unavailable("injected", kind="network")
            fleet.store.delete(key)

    def hand_over() -> None:
        for _ in range(3):
            fleet.store.put(inbox_key(SPACE_ID, str(ULID())), encode_delta(Delta(OTHER, add=(make_record(),))))

    with ThreadPoolExecutor(8) as executor:
        inbox = Inbox(fleet.log(Slow(fleet.store)), executor, deletes_behind=True)
        hand_over()
        assert inbox.merge() == 3
        hand_over()
        assert inbox.merge() == 3, "what is being deleted is not read again"
        assert (len(inbox.log.state.extents), len(fleet.inbox()), inbox.counters.deleted) == (6, 6, 0)
        gate.set()
    assert len(fleet.inbox()) == 1
    assert inbox.counters.deleted == 0
    with ThreadPoolExecutor(1) as executor:
        inbox._behind = executor
        inbox.merge()
    inbox.merge()
    assert not fleet.inbox()
    assert (inbox.counters.deleted, inbox.counters.undeleted, inbox.log.state.version) == (6, 1, 2)


def test_leader_steps_down_only_after_a_whole_quiet_while(fleet: Fleet) -> None:
    log = fleet.log()
    log.commit((), lead=log.writer)
    leader = Leader(log, Inbox(log), fleet.clock)
    for second in range(2 * int(STEP_DOWN_AFTER_S)):
        if second % 10 < 9 or second < STEP_DOWN_AFTER_S:  # 0.9 a second are too few, 1 is not
            fleet.store.put(inbox_key(SPACE_ID, str(ULID())), encode_delta(Delta(OTHER, add=(make_record(),))))
        assert leader.round()
        if not leader.leads:
            break
        fleet.clock.sleep(1.0)
    assert STEP_DOWN_AFTER_S < second < STEP_DOWN_AFTER_S + 12
    assert log.state.lead is None


# ---- a fleet in virtual time -----------------------------------------------------------------------------------------


@dataclass
class Instance:
    """One process of the simulation: stores an extent now and then."""

    world: Simulation
    bucket: SimulatedS3
    number: int
    pause_s: float
    until_s: float
    stored: dict[ExtentName, float]
    answered: dict[ExtentName, float]
    """When, by virtual time."""

    def __post_init__(self) -> None:
        rng = self.world.generator(f"instance {self.number}")
        self.log = Log(
            self.bucket.client(f"{self.number}"),
            SPACE_ID,
            writer=_ulid(rng),
            sleep=self.world.sleep,
            rng=rng,
            nonce=lambda: rng.randbytes(16).hex(),
            clock=self.world.clock,
        )
        self.follower = Follower(
            self.log,
            Pacing(poll_s=1.0, hand_over_s=0.5),
            rng=rng,
            ulid=lambda: _ulid(rng),
            executor=VirtualExecutor(self.world, 32),
        )
        self.rng, self.signal = rng, Signal(self.world)
        self.errors: Counter[str] = Counter()

    def store(self) -> None:
        while self.world.clock() < self.until_s:
            self.world.sleep(self.rng.expovariate(1 / self.pause_s))
            record = make_record(self.log.state.version)
            self.stored[record.name] = self.world.clock()
            self.follower.submit(Change(add=(record,)), partial(self.note, record.name))
            self.signal.set()

    def note(self, name: ExtentName, verdicts: list[Verdict]) -> None:
        assert name not in self.answered
        self.answered[name] = self.world.clock()

    def run(self) -> None:
        self.attempt(self.log.open)
        while True:
            left_s = self.follower.due_s() - self.world.clock()
            if left_s > 0:
                self.signal.wait(left_s)
            else:
                self.attempt(self.follower.step)

    def attempt(self, step: Callable[[], object]) -> None:
        try:
            step()
        except LMCacheS3Error as e:
            self.errors[e.kind] += 1


def _ulid(rng: random.Random) -> str:
    return str(ULID.from_bytes(bytes([rng.randrange(0, 256)]) + rng.randbytes(15)))


@pytest.mark.parametrize("faulty", [False, True], ids=["calm", "misbehaving"])
def test_a_fleet_loses_nothing_whoever_leads_and_dies(faulty: bool) -> None:
    wrong = Misbehaviour(throttled=0.01, lost=0.005, late=0.005, repeated=0.005) if faulty else Misbehaviour()
    with Simulation(seed=5) as world:
        bucket = SimulatedS3(world, misbehaviour=wrong)
        stored: dict[ExtentName, float] = {}
        answered: dict[ExtentName, float] = {}
        instances = [Instance(world, bucket, n, 2.0, 60.0, stored, answered) for n in range(24)]
        for instance in instances:
            world.start(instance.run, owner=instance.number)
            world.start(instance.store, owner=instance.number)
        world.run_until(30.0)
        newest = max(instances, key=lambda instance: instance.log.state.version).log.state
        leading = [instance for instance in instances if instance.log.writer == newest.lead]
        assert len(leading) == 1
        handed_over = sum(instance.follower.hand_overs.handed_over for instance in instances)
        assert handed_over > 100
        world.crash(leading[0].number)
        survivors = [instance for instance in instances if instance is not leading[0]]
        lost_with_it = leading[0].follower.pending
        world.run_until(140.0)
        unanswered = [name for name in stored if name not in answered]
        assert len(unanswered) <= lost_with_it + 1
        newest = max(survivors, key=lambda instance: instance.log.state.version).log.state
        live = set(newest.extents)
        assert set(answered) <= live
        if not faulty:
            assert not any(instance.errors for instance in survivors)
            assert not any(key.startswith(inbox_prefix(SPACE_ID)) for key in bucket.objects)
            waits = sorted(answered[name] - stored[name] for name in answered)
            assert waits[len(waits) // 2] < 3
            assert waits[-1] < 2 * PATIENCE_S + 5
            assert not any(instance.follower.leader.leads for instance in survivors), "nothing more was stored"


def test_many_lost_races_are_a_reason_to_lead_too(fleet: Fleet) -> None:
    """A store that answers slowly never sees many versions a second, however many race for the next one."""
    follower = fleet.add()
    assert not follower.leader.should_claim()
    for _ in range(4):
        follower.log.pace.lost()
    assert follower.log.rate.per_s() == 0
    assert follower.leader.should_claim()
    fleet.store_one(follower)
    fleet.run(20.0, follower)
    assert follower.log.state.lead == follower.log.writer
