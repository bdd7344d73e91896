"""Each rule of collection is needed: a collector without it loses something."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import pytest

from lmcache_s3.errors import Conflict
from lmcache_s3.index.delta import Delta
from lmcache_s3.index.gc import Collector, GcReport
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import Verdict
from lmcache_s3.testing.clocked import ClockedStore
from lmcache_s3.testing.collecting import collect, extents_there, make_record, open_log, stored, upload
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.types import ExtentName, extent_prefix


class ByAge(Collector):
    """Deletes what is not live, without asking for the floor."""

    def _deletable(self, live: Container[ExtentName], floor: int, name: ExtentName) -> bool:
        return name not in live


class BeforeConfirmed(Collector):
    """Deletes victims before their removal is in the history."""

    def _commit(self, delta: Delta) -> bool:
        for name in delta.remove:
            for info in self.store.list(extent_prefix(self.space_id, name)):
                self.store.delete(info.key)
        return super()._commit(delta)


class Milestones(Collector):
    def _version_deletable(self, version: int, checkpoint: int, confirmed: int) -> bool:
        return version <= checkpoint


class WithoutCheckpoint(Collector):
    def _sweep_manifest(self, versions: Any, report: GcReport) -> None:
        self._sweep_versions(versions, self.log.state.version, report)


class AllSegments(Collector):
    def _segment_deletable(self, version: int, newest: Any) -> bool:
        return True


def lost_extents(store: ClockedStore, log: Log) -> set[ExtentName]:
    log.sync()
    return set(log.state.extents) - extents_there(store)


@pytest.mark.parametrize(("kind", "safe"), [(Collector, True), (ByAge, False)])
def test_by_age_alone_would_lose_a_stalled_writers_extent(
    kind: type[Collector], safe: bool, store: ClockedStore, log: Log
) -> None:
    stored(log)
    slow = make_record(log.state.version)
    upload(store, slow)
    collect(log, kind=kind)
    log.commit([slow])
    assert (not lost_extents(store, log)) == safe


@pytest.mark.parametrize(("kind", "safe"), [(Collector, True), (BeforeConfirmed, False)])
def test_deleting_before_the_removal_is_confirmed_would_lose_what_is_used(
    kind: type[Collector], safe: bool, store: ClockedStore, log: Log
) -> None:
    stored(log)
    log.store = FaultyStore(store, [Fault(mode="error", verbs=frozenset({"create"}))])
    with pytest.raises(Conflict):
        collect(log, kind=kind, max_bytes=0)
    log.store = store
    assert (not lost_extents(store, log)) == safe


@pytest.mark.parametrize(("kind", "safe"), [(Collector, True), (Milestones, False)])
def test_a_deleted_milestone_would_let_a_stalled_writer_fork_the_history(
    kind: type[Collector], safe: bool, store: ClockedStore, log: Log
) -> None:
    stalled = open_log(store)
    for _ in range(13):
        stored(log)
    log.checkpoint()
    collect(log, kind=kind, history_s=0)
    record = make_record(stalled.state.version)
    upload(store, record)
    verdict = stalled.commit([record])
    log.sync()
    assert ((record.name in log.state.extents) == (verdict == [Verdict.LIVE])) == safe


@pytest.mark.parametrize(("kind", "safe"), [(Collector, True), (WithoutCheckpoint, False)])
def test_without_a_checkpoint_deleted_versions_would_be_lost(
    kind: type[Collector], safe: bool, store: ClockedStore, log: Log
) -> None:
    for _ in range(13):
        stored(log)
    collect(log, kind=kind, history_s=0)
    assert (open_log(store).state == log.state) == safe


@pytest.mark.parametrize(("kind", "safe"), [(Collector, True), (AllSegments, False)])
def test_sweeping_young_segments_would_break_the_checkpoint_they_are_for(
    kind: type[Collector], safe: bool, store: ClockedStore, log: Log
) -> None:
    stored(log)
    log.checkpoint()
    stored(log)
    slow = open_log(store)

    class Interrupted(FaultyStore):
        def put(self, key: str, data: Any) -> None:
            if "/checkpoints/" in key:
                collect(log, kind=kind, history_s=0)
            super().put(key, data)

    slow.store = Interrupted(store)
    slow.checkpoint()
    try:
        opened = open_log(store).state == log.state
    except Exception:  # noqa: BLE001 — whatever a checkpoint without segments leads to
        opened = False
    assert opened == safe
