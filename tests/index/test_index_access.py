"""Which hits are told, when, how often, and that a busy process stays within its bounds."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from ulid import ULID

from lmcache_s3.index.access import Access
from lmcache_s3.index.change import Change
from lmcache_s3.index.follower import Follower, Pacing
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import decode_delta, inbox_prefix, log_key
from lmcache_s3.testing.stepped import SPACE_ID, Clock, make_record
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.types import ExtentName

HOUR_S = 3600.0


@pytest.fixture
def clock() -> Clock:
    return Clock(now_s=5000.0)


@pytest.fixture
def make_follower(store: CountingStore, clock: Clock) -> Callable[..., Follower]:
    def make(seed: int = 0, **pacing: Any) -> Follower:
        log = Log(
            store,
            SPACE_ID,
            writer=str(ULID()),
            sleep=lambda _: None,
            rng=random.Random(seed),
            nonce=lambda: secrets.token_hex(16),
            clock=clock,
        )
        log.open()
        return Follower(log, Pacing(**pacing), rng=random.Random(seed), ulid=lambda: str(ULID()))

    return make


def run(clock: Clock, follower: Follower, until_s: float) -> None:
    while follower.due_s() <= until_s:
        clock.now_s = max(clock.now_s, follower.due_s())
        follower.step()
    clock.now_s = max(clock.now_s, until_s)


def accesses(store: CountingStore, follower: Follower) -> list[tuple[int, tuple[ExtentName, ...]]]:
    """(version, names) of every delta that records accesses."""
    follower.poll()
    out = []
    for version in range(1, follower.log.state.version + 1):
        delta = decode_delta(store.get(log_key(SPACE_ID, version)), version)
        if delta.access:
            out.append((version, delta.access))
    return out


def test_a_hit_is_told_once_an_hour_however_often_it_happens(
    store: CountingStore, clock: Clock, make_follower: Callable[..., Follower]
) -> None:
    writer, reader = make_follower(), make_follower(1, poll_s=60.0)
    hot, cold = make_record(), make_record()
    writer.log.commit([hot, cold])
    start_s = clock()
    for minute in range(5 * 60):
        reader.touch([hot.name])
        run(clock, reader, start_s + 60.0 * minute)
    told = accesses(store, writer)
    assert all(names == (hot.name,) for _, names in told)
    assert 3 <= len(told) <= 5, (
        "the first after a random part of an hour, then hourly, as long as it is older than that"
    )
    assert writer.log.state.extents[hot.name].last_access == told[-1][0]
    assert writer.log.state.extents[cold.name].last_access == 1
    assert reader.log.counters.commits == len(told)


def test_the_first_time_is_random(clock: Clock, make_follower: Callable[..., Follower]) -> None:
    due = []
    for seed in range(50):
        follower = make_follower(seed)
        assert follower.access.gathered == 0
        due_before = follower.access.due_s
        assert due_before is None, "nothing was hit"
        follower.touch([make_record().name])
        due.append((follower.access.due_s or 0.0) - clock())
    assert 0 <= min(due) < HOUR_S / 10
    assert HOUR_S * 0.9 < max(due) <= HOUR_S


def test_two_processes_tell_one_hit_once(
    store: CountingStore, clock: Clock, make_follower: Callable[..., Follower]
) -> None:
    a, b = make_follower(0), make_follower(1)
    record = make_record()
    a.log.commit([record])
    clock.now_s += HOUR_S * 1.5
    for one in (a, b):
        one.poll()
        one.touch([record.name])
    run(clock, a, clock.now_s + 120)
    assert len(accesses(store, a)) == 1
    run(clock, b, clock.now_s + 2 * HOUR_S - 300)
    assert len(accesses(store, a)) == 1, "b saw that it was told"


def test_told_by_a_rival_between_the_look_and_the_commit(
    store: CountingStore, make_follower: Callable[..., Follower]
) -> None:
    a, b = make_follower(0), make_follower(1)
    record = make_record()
    a.log.commit([record])
    b.poll()
    a.log.commit((), access=[record.name])
    b.log.commit((), access=[record.name])
    assert b.log.state.version == 2
    b.log.commit((), access=[record.name, make_record().name])
    assert b.log.state.version == 3, "later again"
    assert b.log.state.extents[record.name].last_access == 3
    assert accesses(store, a)[-1] == (3, (record.name,)), "what is not live is not named"


def test_it_rides_along_with_a_commit(
    store: CountingStore, clock: Clock, make_follower: Callable[..., Follower]
) -> None:
    follower = make_follower(poll_s=1e6)
    old = make_record()
    follower.log.commit([old])
    clock.now_s += 2 * HOUR_S
    follower.poll()
    clock.now_s += 1.0
    follower.touch([old.name])
    follower.step()
    assert follower.log.state.version == 1, "it waits a little for company"
    new = make_record(1)
    follower.submit(Change(add=(new,)))
    follower.step()
    assert accesses(store, follower) == [(2, (old.name,))]
    assert new.name in follower.log.state.extents


def test_alone_it_goes_as_a_delta_of_its_own_or_is_handed_over(
    store: CountingStore, clock: Clock, make_follower: Callable[..., Follower]
) -> None:
    follower, leader = make_follower(poll_s=60.0), make_follower(1)
    records = [make_record(), make_record()]
    leader.log.commit(records)
    leader.log.commit((), lead=leader.log.writer)
    clock.now_s += 2 * HOUR_S
    follower.poll()
    leader.poll()
    follower.touch([records[0].name])
    store.counts.clear()
    run(clock, follower, clock() + 61.0)
    assert store.counts["put"] == follower.hand_overs.handed_over == 1
    assert follower.pending == 0, "nobody waits for it"
    leader.step()
    assert accesses(store, leader) == [(3, (records[0].name,))]
    assert not list(store.list(inbox_prefix(SPACE_ID)))
    assert leader.drain()

    follower.poll()
    clock.now_s += 2 * HOUR_S
    follower.poll()
    follower.touch([records[1].name])
    run(clock, follower, clock() + 61.0)
    assert accesses(store, leader)[-1] == (5, (records[1].name,))


def test_names_per_delta_and_gathered_are_bounded(clock: Clock, make_follower: Callable[..., Follower]) -> None:
    follower = make_follower()
    records = [make_record() for _ in range(25)]
    follower.log.commit(records)
    access = Access(clock, random.Random(1), HOUR_S, max_names=20, names_per_delta=8)
    access.seen(1)
    clock.now_s += 2 * HOUR_S
    access.seen(1)
    access.touch([record.name for record in records])
    access.touch([record.name for record in records[:20]])
    assert (access.gathered, access.dropped) == (20, 5)
    taken: list[ExtentName] = []
    for n in (8, 8, 4):
        assert access.due_s is not None
        assert access.due_s <= clock(), "the rest stays due"
        names = access.take(follower.log.state)
        assert len(names) == n
        taken += names
    assert set(taken) == {record.name for record in records[:20]}
    assert access.due_s is None


def test_what_was_watched_long_ago_is_bounded(clock: Clock) -> None:
    access = Access(clock, random.Random(1), HOUR_S)
    for version in range(10_000):
        access.seen(version)
        clock.now_s += 2.0
    assert len(access._seen) <= 66
    assert 10_000 - HOUR_S / 2 - 60 <= access._old_version() <= 10_000 - HOUR_S / 2


def test_touch_is_quick_and_may_come_from_any_thread(clock: Clock) -> None:
    access = Access(clock, random.Random(1), HOUR_S)
    names = [make_record().name for _ in range(64)]
    quickest = 1.0
    for _ in range(50):
        start = time.perf_counter()
        access.touch(names[:4])
        quickest = min(quickest, time.perf_counter() - start)
    assert quickest < 50e-6

    def touch_often() -> None:
        for _ in range(200):
            access.touch(names)

    threads = [threading.Thread(target=touch_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen: Counter[ExtentName] = Counter()
    state = Log(
        store=None,  # type: ignore[arg-type]
        space_id=SPACE_ID,
        writer=str(ULID()),
        sleep=lambda _: None,
        rng=random.Random(1),
        nonce=lambda: "",
    ).state
    while any(thread.is_alive() for thread in threads):
        seen.update(access.take(state))
    for thread in threads:
        thread.join()
    assert not seen, "nothing of it is live"
    assert access.gathered <= 64


def test_a_process_that_may_not_write_gathers_nothing(make_follower: Callable[..., Follower]) -> None:
    follower = make_follower(writes=False)
    follower.touch([make_record().name])
    assert follower.access.gathered == 0
