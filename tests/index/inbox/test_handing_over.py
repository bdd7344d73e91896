"""The writer's side: what a hand-over costs, how long a writer waits for a leader, what is never lost."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from ulid import ULID

from lmcache_s3.errors import Unavailable
from lmcache_s3.index.change import Change
from lmcache_s3.index.follower import Request
from lmcache_s3.index.inbox import LONGEST_PATIENCE_S, PATIENCE_S, HandOvers
from lmcache_s3.index.manifest import Verdict
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.stepped import Fleet, lead, make_record

# ---- requests: those of FORMAT.md §4.4 and §4.6, and no more ---------------------------------------------------------


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


# ---- patience --------------------------------------------------------------------------------------------------------


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


# ---- nothing is lost -------------------------------------------------------------------------------------------------


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
