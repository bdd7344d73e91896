"""Collection of extents: victims, orphans, the grace; time is the store's; lost creates, dry runs, foreign objects."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmcache_s3.errors import Conflict, Invalid, Unavailable
from lmcache_s3.index.delta import Delta, encode_delta
from lmcache_s3.index.gc import Collector, GcSettings
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import Verdict, inbox_key, log_key
from lmcache_s3.index.policy import Why
from lmcache_s3.testing.clocked import ClockedStore
from lmcache_s3.testing.collecting import (
    DAY_S,
    HOUR_S,
    SPACE_ID,
    ULID,
    collect,
    extents_there,
    make_record,
    open_log,
    stored,
    upload,
)
from lmcache_s3.testing.faults import Fault, FaultyStore


def test_victims_leave_the_index_now_and_the_bucket_next_time(store: ClockedStore, log: Log) -> None:
    old, new = stored(log), stored(log)
    store.now_s += 2 * HOUR_S
    first = collect(log, max_bytes=20)
    assert [(r.name, r.why, r.encoded_bytes) for r in first.removed] == [(old.name, Why.BUDGET, 20)]
    assert set(log.state.extents) == {new.name}
    assert (first.floor, log.state.floor) == (2, 2)
    assert extents_there(store) == {old.name, new.name}, "a reader a little behind finds it"
    second = collect(log, max_bytes=20)
    assert (second.removed, second.objects) == ([], {"extent": 2})
    assert second.bytes["extent"] == 22
    assert extents_there(store) == {new.name}


def test_orphans_go_after_the_grace_and_not_before(store: ClockedStore, log: Log) -> None:
    orphan = make_record(log.state.version)
    upload(store, orphan)
    kept = stored(log)
    assert collect(log).objects == {}
    store.now_s += 0.9 * HOUR_S
    assert collect(log).objects == {}
    store.now_s += 0.2 * HOUR_S
    assert collect(log).objects == {"extent": 2}
    assert extents_there(store) == {kept.name}


def test_an_orphan_of_an_idle_space_goes_too(store: ClockedStore, log: Log) -> None:
    stored(log)
    orphan = make_record(log.state.version)
    upload(store, orphan)
    for _ in range(3):
        store.now_s += 2 * HOUR_S
        collect(log)
    assert orphan.name not in extents_there(store)


def test_the_time_is_the_stores_and_ours_says_nothing(store: ClockedStore, log: Log, monkeypatch: Any) -> None:
    import time

    stored(log)
    monkeypatch.setattr(time, "time", lambda: 9e15)
    assert collect(log).floor == 0
    store.now_s += 2 * HOUR_S
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert collect(log).floor == 1


def test_a_writer_stalled_past_the_grace_is_void(store: ClockedStore, log: Log) -> None:
    stalled = open_log(store)
    late = make_record(stalled.state.version)
    for _ in range(3):
        stored(log)
    store.now_s += 2 * HOUR_S
    collect(log)
    upload(store, late)  # a late PUT
    assert stalled.commit([late]) == [Verdict.VOID]
    collect(log)
    assert late.name not in extents_there(store)


def test_an_upload_within_the_grace_is_committed(store: ClockedStore, log: Log) -> None:
    for _ in range(3):
        stored(log)
    store.now_s += 2 * HOUR_S
    slow = make_record(log.state.version)
    upload(store, slow)
    collect(log)
    assert log.commit([slow]) == [Verdict.LIVE]


def test_by_age_and_by_tenant(store: ClockedStore, log: Log) -> None:
    a = stored(log, salt="a")
    below = stored(log, after=a)
    b = stored(log, salt="b")
    store.now_s += 10 * DAY_S
    used = stored(log, salt="c")
    report = collect(log, tenant_bytes={"a": 20}, dry_run=True)
    assert [(r.name, r.why) for r in report.removed] == [(below.name, Why.TENANT_BUDGET)]
    report = collect(log, ttl_s=9 * DAY_S, dry_run=True)
    assert [r.name for r in report.removed] == [below.name, a.name, b.name]
    assert {r.why for r in report.removed} == {Why.UNUSED}
    assert collect(log, ttl_s=11 * DAY_S, dry_run=True).removed == []
    assert [r.name for r in collect(log, default_tenant_bytes=0, dry_run=True).removed][-1] == used.name


def test_what_is_used_meanwhile_is_chosen_anew(store: ClockedStore, log: Log) -> None:
    first, second = stored(log), stored(log)
    store.now_s += 2 * HOUR_S

    class Used(Collector):
        raced = False

        def _commit(self, delta: Delta) -> bool:
            if not self.raced:
                self.raced = True
                hit = Delta(ULID, access=(first.name,))
                self.store.create(log_key(SPACE_ID, self.log.state.version + 1), encode_delta(hit))
            return super()._commit(delta)

    report = collect(log, max_bytes=20, kind=Used)
    assert [r.name for r in report.removed] == [second.name]
    assert set(log.state.extents) == {first.name}


def test_a_lost_answer_is_read_back(store: ClockedStore, log: Log) -> None:
    old = stored(log)
    log.store = FaultyStore(store, [Fault(mode="lost_answer", verbs=frozenset({"create"}), times=1)])
    report = collect(log, max_bytes=0)
    assert [r.name for r in report.removed] == [old.name]
    assert log.state.version == 2


def test_gives_up_when_others_always_win(store: ClockedStore, log: Log) -> None:
    stored(log)

    class Losing(Collector):
        def _commit(self, delta: Delta) -> bool:
            self.store.create(log_key(SPACE_ID, self.log.state.version + 1), encode_delta(Delta(ULID)))
            return super()._commit(delta)

    with pytest.raises(Conflict, match="in 3 attempts"):
        collect(log, max_bytes=0, max_attempts=3, kind=Losing)
    assert len(log.state.extents) == 1


def test_many_victims_take_several_versions(store: ClockedStore, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_s3.index.gc.MAX_REMOVALS", 2)
    records = [stored(log)]
    for _ in range(4):
        records.append(stored(log, after=records[-1]))
    before = log.state.version
    report = collect(log, max_bytes=0)
    assert [r.name for r in report.removed] == [r.name for r in reversed(records)]
    assert log.state.version == before + 3
    assert len(log.state.extents) == 0


def test_nothing_to_do_makes_no_version(store: ClockedStore, log: Log) -> None:
    stored(log)
    store.counts.clear()
    collect(log)
    assert log.state.version == 1
    assert store.counts == {"list": 1 + 1 + 1 + 256 + 1, "get": 1, "put": 1, "delete": 1}


def test_a_dry_run_says_what_the_round_then_does(store: ClockedStore, log: Log) -> None:
    upload(store, make_record(0))
    for _ in range(9):
        stored(log)
        log.checkpoint()
    store.now_s += 2 * HOUR_S
    before = store.copy()
    plan = collect(log, max_bytes=100, history_s=0, dry_run=True)
    assert store.objects == before.objects, "it changes nothing"
    done = collect(log, max_bytes=100, history_s=0)
    assert plan.removed == done.removed
    assert plan.objects == done.objects
    assert plan.bytes == done.bytes
    assert (plan.floor, plan.deleted_bytes) == (done.floor, done.deleted_bytes)
    gone = {key: size for key, (data, _) in before.objects.items() if key not in store.objects for size in [len(data)]}
    assert {d.key: d.size_bytes for d in plan.deletions} == gone
    assert {d.kind for d in plan.deletions} == {"extent", "version", "checkpoint", "segment"}


def test_objects_that_are_not_ours_are_left_alone_and_counted(store: ClockedStore, log: Log) -> None:
    stored(log)
    log.checkpoint()
    name = str(make_record().name)
    root = f"spaces/{SPACE_ID}/"
    other = "00" if not name.startswith("00") else "01"
    foreign = [
        f"{root}extents/00/readme",
        f"{root}extents/{other}/{name}/zarr.json",
        f"{root}extents/{name[:2]}/{name.replace('.fast.0-', '.fast.99999999999999999999-')}/zarr.json",
        f"{root}manifest/log/readme",
        f"{root}manifest/log/{10**20 - 1}",
        f"{root}manifest/checkpoints/readme",
        f"{root}segments/readme",
        f"{root}segments/{'9' * 20}.{'0' * 32}/x",
        f"{root}elsewhere",
    ]
    for key in foreign:
        store.put(key, b"?")
    store.now_s += 30 * DAY_S
    report = collect(log, history_s=0)
    assert report.foreign == 7  # what lies elsewhere, and beside checkpoints, is not looked at
    assert set(foreign) <= set(store.objects)
    assert report.floor == 1


def test_requests_run_in_parallel_and_all_end_before_an_error(store: ClockedStore, log: Log) -> None:
    for _ in range(20):
        upload(store, make_record(0))
    stored(log)
    store.now_s += 2 * HOUR_S
    faulty = FaultyStore(store, [Fault(mode="error", verbs=frozenset({"delete"}), key="extents", skip=3, times=1)])
    log.store = faulty
    with ThreadPoolExecutor(4) as executor:
        with pytest.raises(Unavailable):
            Collector(log, GcSettings(), executor=executor).run()
        # The live one, and what is in the part of the bucket whose sweep failed (names that begin alike).
        assert len({name.last_hash[:1] for name in extents_there(store)}) <= 2
        faulty.faults = []
        Collector(log, GcSettings(), executor=executor).run()
    assert extents_there(store) == set(log.state.extents)


def test_what_was_handed_over_is_merged_first(store: ClockedStore, log: Log) -> None:
    record = make_record(0)
    upload(store, record)
    key = inbox_key(SPACE_ID, ULID)
    store.put(key, encode_delta(Delta(ULID, add=(record,))))
    stored(log)
    store.now_s += 2 * HOUR_S
    assert collect(log, dry_run=True).objects == {"extent": 2}
    assert key in store.objects, "a dry run merges nothing"
    collect(log)
    assert key not in store.objects
    assert record.name in log.state.extents
    assert record.name in extents_there(store)


@pytest.mark.parametrize(
    "bad", [{"grace_s": -1}, {"ttl_s": float("nan")}, {"max_bytes": -1}, {"tenant_bytes": {"a": -1}}]
)
def test_settings_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        GcSettings(**bad)
