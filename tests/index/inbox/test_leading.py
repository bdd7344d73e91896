"""Who leads when: a log that is fast enough gets one leader, who gives way, steps down, or dies and is replaced."""

from __future__ import annotations

import random

import pytest
from ulid import ULID

from lmcache_s3.errors import Conflict
from lmcache_s3.index.follower import Follower, Pacing
from lmcache_s3.index.inbox import PATIENCE_S, STEP_DOWN_AFTER_S, Inbox, Leader
from lmcache_s3.index.manifest import NOBODY, Delta, Verdict, encode_delta, inbox_key
from lmcache_s3.testing.stepped import OTHER, SPACE_ID, Fleet, lead, make_record


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
