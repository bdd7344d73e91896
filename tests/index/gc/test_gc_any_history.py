"""Collection after any history, stopped at any write, and on a real server: nothing live goes, everything dead does."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_s3.errors import Conflict, Unavailable
from lmcache_s3.index.gc import Collector, GcSettings
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import Verdict
from lmcache_s3.testing.clocked import ClockedStore
from lmcache_s3.testing.collecting import (
    DAY_S,
    HOUR_S,
    SPACE_ID,
    collect,
    extents_there,
    make_record,
    open_log,
    stored,
    upload,
    versions_there,
)
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import ExtentRecord

STEPS = st.lists(
    st.sampled_from(
        ["store", "branch", "upload", "commit late", "wait", "hit", "collect", "collect hard", "checkpoint"]
    ),
    max_size=40,
)


@given(STEPS, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_whatever_happens_what_is_live_is_whole_and_what_is_dead_goes(steps: list[str], rng: random.Random) -> None:
    store = ClockedStore()
    log = open_log(store)
    uploads: list[ExtentRecord] = []
    for step in steps:
        live = [extent.record for extent in log.state.in_order()]
        if step == "store" or (step == "branch" and not live):
            stored(log)
        elif step == "branch":
            stored(log, after=rng.choice(live))
        elif step == "upload":
            uploads.append(make_record(log.state.version))
            upload(store, uploads[-1])
        elif step == "commit late" and uploads:
            late = uploads.pop(rng.randrange(len(uploads)))
            upload(store, late)  # its PUTs arrive again
            verdict = log.commit([late])
            assert (late.name in log.state.extents) == (verdict == [Verdict.LIVE])
        elif step == "wait":
            store.now_s += rng.choice([60.0, HOUR_S, DAY_S])
        elif step == "hit" and live:
            log.commit([], access=[rng.choice(live).name])
        elif step == "collect":
            collect(log, max_bytes=100, ttl_s=2 * DAY_S)
        elif step == "collect hard":
            collect(log, grace_s=0, history_s=0, max_bytes=40)
            assert sum(extent.record.encoded_bytes for extent in log.state.in_order()) <= 40
        elif step == "checkpoint" and log.state.version:
            log.checkpoint()
        assert set(log.state.extents) <= extents_there(store)
        assert open_log(store).state == log.state
    for _ in range(2):
        store.now_s += 2 * HOUR_S
        log.commit([], access=list(log.state.extents)[:1], floor=0)
        stored(log)
        store.now_s += 2 * HOUR_S
        collect(log)
    assert extents_there(store) == set(log.state.extents)


def test_stopped_at_any_write_and_run_again(store: ClockedStore, log: Log) -> None:
    for _ in range(13):
        stored(log)
    log.checkpoint()
    upload(store, make_record(0))
    store.now_s += 2 * HOUR_S
    log.commit([], [next(iter(log.state.extents))], floor=2)
    log.checkpoint()
    wanted: dict[str, Any] = {"history_s": 0, "max_bytes": 100}
    whole = store.copy()
    done = open_log(whole)
    for _ in range(2):
        collect(done, **wanted)
    stops = 0
    while True:
        broken = store.copy()
        stopped = open_log(broken, attempts=1)
        writes: frozenset[Any] = frozenset({"put", "create", "delete"})
        stopped.store = FaultyStore(broken, [Fault(mode="error", verbs=writes, skip=stops)])
        try:
            collect(stopped, max_attempts=1, **wanted)
        except (Unavailable, Conflict):
            stops += 1
        else:
            break
        again = open_log(broken)
        assert set(again.state.extents) <= extents_there(broken)
        for _ in range(2):
            collect(again, **wanted)
        assert extents_there(broken) == extents_there(whole) == set(again.state.extents)
        assert versions_there(broken)[:3] == versions_there(whole)[:3]
    assert stops > 12


@pytest.mark.s3
def test_on_a_real_server(bucket_url: str) -> None:
    store = open_store(bucket_url)
    log = open_log(store)
    kept, victim = stored(log, cell_bytes=5), stored(log)
    orphan = make_record(0)
    upload(store, orphan)
    for _ in range(8):
        log.commit([make_record(log.state.version, cell_bytes=1)])
    log.commit([], [live.record.name for live in list(log.state.in_order())[2:]])
    log.checkpoint()
    with ThreadPoolExecutor(16) as executor:
        eager = GcSettings(grace_s=0, history_s=0, max_bytes=10)
        log.commit([], [victim.name])
        for _ in range(2):
            Collector(log, eager, executor=executor).run()
    there = {info.key.split("/")[4] for info in store.list(f"spaces/{SPACE_ID}/extents/")}
    assert there == {str(kept.name)}
    assert list(store.list("probe/")) == []
    assert open_log(store).state == log.state
    store.close()
