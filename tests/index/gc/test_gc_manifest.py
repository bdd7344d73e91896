"""Collection of checkpoints, segments and versions: what goes, what history is kept, what damage stops it."""

from __future__ import annotations

import pytest

from lmcache_s3.errors import Invalid
from lmcache_s3.index.gc import Checkpoint, Collector
from lmcache_s3.index.history import as_of
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import checkpoint_key, segments_prefix
from lmcache_s3.testing.clocked import ClockedStore
from lmcache_s3.testing.collecting import DAY_S, SPACE_ID, checkpoints_there, collect, open_log, stored, versions_there


def test_versions_go_that_a_checkpoint_and_a_milestone_make_dispensable(store: ClockedStore, log: Log) -> None:
    for _ in range(13):
        stored(log)
    collect(log, history_s=0)
    assert versions_there(store) == list(range(1, 14)), "no checkpoint, no deletion"
    log.checkpoint()
    collect(log, history_s=0)
    assert log.state.version == 13
    # fence(k) = the second milestone above k, at most 13: k < 8. 4 is a milestone.
    assert versions_there(store) == [4, 8, 9, 10, 11, 12, 13]
    assert open_log(store).state == log.state


def test_the_newest_checkpoint_stays_and_the_rest_goes(store: ClockedStore, log: Log) -> None:
    for _ in range(5):
        stored(log)
        log.checkpoint()
    abandoned = segments_prefix(SPACE_ID, 3, "a" * 32) + "00000.entries.parquet"
    under_way = segments_prefix(SPACE_ID, 5, "b" * 32) + "00000.entries.parquet"
    for key in (abandoned, under_way):
        store.put(key, b"x")
    report = collect(log, history_s=0)
    assert checkpoints_there(store) == [5]
    assert abandoned not in store.objects
    assert under_way in store.objects, "its index may come any moment"
    assert report.objects == {"checkpoint": 4, "segment": 4 * 2 + 1}
    assert open_log(store).state == log.state


def test_a_checkpoint_that_is_not_whole_deletes_nothing(store: ClockedStore, log: Log) -> None:
    for _ in range(13):
        stored(log)
    log.checkpoint()
    (segment, *_) = [key for key in store.objects if "/segments/" in key]
    data = store.objects.pop(segment)
    report = collect(log, history_s=0)
    assert report.problem is not None
    assert "is not whole" in report.problem
    assert versions_there(store) == list(range(1, 14))
    store.objects[segment] = data
    assert collect(log, history_s=0).problem is None
    store.put(checkpoint_key(SPACE_ID, 99, "c" * 32), b"{}")
    assert collect(log, history_s=0).problem is not None


def test_kept_history_can_be_read(store: ClockedStore) -> None:
    log = open_log(store, milestone=4)
    truth = {}
    for day in range(30):
        for _ in range(4):
            stored(log)
            truth[log.state.version] = log.state
        log.checkpoint()
        store.now_s += DAY_S
        if day % 5 == 4:
            collect(log, history_s=7 * DAY_S)
            truth[log.state.version] = log.state
    collect(log, history_s=7 * DAY_S)
    newest = log.state.version
    for version in range(newest - 20, newest):
        if version in truth:
            assert as_of(store, SPACE_ID, version) == truth[version]
    assert len(checkpoints_there(store)) <= 10
    kept = versions_there(store)
    assert 4 in kept
    assert 5 not in kept
    with pytest.raises(Invalid, match="not kept any more; the oldest that is: "):
        as_of(store, SPACE_ID, 5)
    with pytest.raises(Invalid, match=f"the newest is {newest}"):
        as_of(store, SPACE_ID, newest + 1)


def test_without_an_old_checkpoint_the_kept_history_keeps_all_versions(store: ClockedStore, log: Log) -> None:
    for _ in range(13):
        stored(log)
    store.now_s += 3 * DAY_S
    stored(log)
    log.checkpoint()
    truth = log.state
    collect(log, history_s=2 * DAY_S)
    assert versions_there(store)[:14] == list(range(1, 15))
    assert as_of(store, SPACE_ID, 14) == truth
    store.now_s += 3 * DAY_S
    stored(log)
    collect(log, history_s=2 * DAY_S)
    assert versions_there(store)[0] == 4


def test_a_newest_checkpoint_superseded_meanwhile_is_no_damage(store: ClockedStore, log: Log) -> None:
    stored(log)
    log.checkpoint()
    stored(log)

    class Overtaken(Collector):
        overtaken = False

        def _check_whole(self, newest: Checkpoint) -> None:
            if not self.overtaken:
                self.overtaken = True
                self.log.checkpoint()
                collect(open_log(store), history_s=0)
            super()._check_whole(newest)

    report = collect(log, history_s=0, kind=Overtaken)
    assert report.problem is None
    assert checkpoints_there(store) == [log.state.version]
