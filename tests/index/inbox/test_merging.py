"""Merging the inbox: what goes when, what fails and is made up for, junk, and hand-overs of any size."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from ulid import ULID

from lmcache_s3.errors import Unavailable
from lmcache_s3.index.change import GROUP_BYTES, Change, grouped, joined
from lmcache_s3.index.follower import Request
from lmcache_s3.index.inbox import JUNK_AGE_S, Inbox
from lmcache_s3.index.manifest import Delta, decode_delta, encode_delta, inbox_key, inbox_prefix, log_key, record_size
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.stepped import OTHER, SPACE_ID, Aged, Fleet, lead, make_record


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


def test_a_removal_is_not_judged_by_a_state_from_before_it(fleet: Fleet) -> None:
    """Whoever merges may have stood still between its look at the log and its look at the inbox."""
    merger = fleet.log()
    merger.open()
    writer, record = fleet.log(), make_record()
    writer.commit([record])
    fleet.store.put(inbox_key(SPACE_ID, str(ULID())), encode_delta(Delta(OTHER, remove=(record.name,))))
    assert merger.state.version == 0
    Inbox(merger).merge()
    writer.sync()
    assert (list(writer.state.extents), fleet.inbox()) == ([], [])


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


def test_a_round_does_not_wait_for_a_get_that_hangs(fleet: Fleet) -> None:
    records = [make_record() for _ in range(5)]
    keys = [inbox_key(SPACE_ID, str(ULID())) for _ in records]
    for key, record in zip(keys, records, strict=True):
        fleet.store.put(key, encode_delta(Delta(OTHER, add=(record,))))
    go_on = threading.Event()
    hangs = Fault(mode="latency", verbs=frozenset({"get"}), key=keys[1], latency_s=1)
    faulty = FaultyStore(fleet.store, [hangs], sleep=lambda _: go_on.wait(30))
    with ThreadPoolExecutor(4) as pool:
        inbox = Inbox(fleet.log(faulty), pool)
        assert inbox.merge() == 4
        assert inbox.merge() == 0
        assert set(inbox.log.state.extents) == {record.name for record in records} - {records[1].name}
        assert (inbox.counters.late, faulty.fired["latency"]) == (2, 1)
        go_on.set()
        assert inbox.merge() == 1
        assert len(inbox.log.state.extents) == 5
        assert faulty.fired["latency"] == 1, "asked for once"
    assert not fleet.inbox()


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
        inbox._executor = inbox._behind = executor
        inbox.merge()
    inbox.merge()
    assert not fleet.inbox()
    assert (inbox.counters.deleted, inbox.counters.undeleted, inbox.log.state.version) == (6, 1, 2)


# ---- junk in the inbox -----------------------------------------------------------------------------------------------


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


# ---- big and odd hand-overs ------------------------------------------------------------------------------------------


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
