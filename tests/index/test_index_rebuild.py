"""Rebuild: the same look-ups hit after the whole manifest was lost; the past is fenced over; lies are left out."""

from __future__ import annotations

import json
import random
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmcache_s3.errors import Invalid, Unavailable
from lmcache_s3.extent import record_from_metadata
from lmcache_s3.identity import KVGroup, Space, prefix_hashes
from lmcache_s3.index.log import IDLE_POLLS_PER_FENCE, Log, LogLimits
from lmcache_s3.index.manifest import Verdict, checkpoint_key, log_key
from lmcache_s3.index.rebuild import RebuildReport, rebuild
from lmcache_s3.testing.clocked import ClockedStore
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.filling import fill
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import ExtentName, ExtentRecord, Grid, extent_prefix, shard_key

ULID = "01JDXB4Z5T8V6Q2W3E4R5T6Y7H"
SPACE = Space("ab" * 32, "bfloat16", (KVGroup("full", 2, 2, 2, 4),), chunk_tokens=16, model="org/small")
LONG = list(range(1000, 1064))
OTHER = list(range(2000, 2032))
MILESTONE = 8


def open_log(store: ObjectStore) -> Log:
    log = Log(
        store,
        SPACE.id,
        writer=ULID,
        sleep=lambda _: None,
        rng=random.Random(7),
        nonce=lambda: secrets.token_hex(16),
        limits=LogLimits(milestone=MILESTONE, checkpoint_every=10**9),
    )
    log.open()
    return log


def run(store: ObjectStore, **more: Any) -> RebuildReport:
    return rebuild(store, SPACE, writer=ULID, nonce=secrets.token_hex(16), milestone=MILESTONE, **more)


def lose_the_manifest(store: ClockedStore) -> None:
    for key in list(store.objects):
        if "/manifest/" in key or "/segments/" in key:
            del store.objects[key]


@pytest.fixture
def store() -> ClockedStore:
    return ClockedStore()


@pytest.fixture
def records(store: ClockedStore) -> list[ExtentRecord]:
    """A prompt in three extents, and another tenant's."""
    made = [fill(store, SPACE, LONG[:n], grid=Grid(2, 1), seed=n) for n in (16, 48, 64)]
    made.append(fill(store, SPACE, OTHER, salt="tenant"))
    return [record for record in made if record is not None]


def hits(log: Log, tokens: list[int], salt: str = "") -> list[ExtentName]:
    return [ref.extent.name for ref in log.replica.match(prefix_hashes(SPACE.id, tokens, 16, salt=salt))]


def test_the_same_look_ups_hit_after_the_manifest_was_lost(store: ClockedStore, records: list[ExtentRecord]) -> None:
    log = open_log(store)
    before = (hits(log, LONG), hits(log, OTHER, "tenant"), hits(log, OTHER))
    assert [len(found) for found in before] == [4, 2, 0]
    lose_the_manifest(store)
    assert hits(open_log(store), LONG) == []
    seen: list[int] = []
    report = run(store, progress=seen.append)
    assert (report.extents, report.chunks, report.covered, report.rejected) == (4, 6, 0, [])
    assert sum(seen) == 4
    after = open_log(store)
    assert (hits(after, LONG), hits(after, OTHER, "tenant"), hits(after, OTHER)) == before
    assert {live.record for live in after.state.in_order()} == set(records), "every length and checksum as before"
    assert after.state.floor == report.version


def test_parents_come_first_and_the_order_is_always_the_same(store: ClockedStore, records: list[ExtentRecord]) -> None:
    lose_the_manifest(store)
    with ThreadPoolExecutor(8) as executor:
        run(store, executor=executor)
    first = [live.record for live in open_log(store).state.in_order()]
    assert [r.first_token for r in first] == sorted(r.first_token for r in first)
    run(store)
    assert [live.record for live in open_log(store).state.in_order()] == first
    assert set(first) == set(records)


@pytest.mark.usefixtures("records")
def test_old_replicas_are_fenced_over(store: ClockedStore) -> None:
    old, idle = open_log(store), open_log(store)
    lose_the_manifest(store)
    report = run(store)
    old.sync()
    for _ in range(IDLE_POLLS_PER_FENCE):
        idle.sync()
    fresh = open_log(store)
    assert old.commit([], [next(iter(old.state.extents))]) == []
    for replica in (old, idle):
        assert replica.state.floor == report.version
    assert old.state.version == fresh.sync().version
    assert old.state == fresh.state


@pytest.mark.usefixtures("records")
def test_a_writer_with_an_upload_from_before_is_void(store: ClockedStore) -> None:
    writer = open_log(store)
    template = next(iter(writer.state.in_order())).record
    fresh = secrets.token_bytes(16)
    name = ExtentName.fresh(fresh, 1, "fast", writer.state.version)
    record = ExtentRecord(name, Grid(), template.parent, 0, fresh, template.lengths[:4], template.sums[:8], 1)
    lose_the_manifest(store)
    run(store)
    assert writer.commit([record]) == [Verdict.VOID]
    named_since = ExtentName.fresh(fresh, 1, "fast", writer.state.version)
    assert writer.commit([ExtentRecord(named_since, *_rest(record))]) == [Verdict.LIVE]


def _rest(record: ExtentRecord) -> tuple[Any, ...]:
    return tuple(getattr(record, name) for name in record.__slots__ if name != "name")


def test_a_whole_upload_that_was_never_committed_becomes_live(store: ClockedStore, records: list[ExtentRecord]) -> None:
    writer = open_log(store)
    lose_the_manifest(store)
    run(store)
    assert writer.commit([records[0]]) == [Verdict.LIVE]


def test_a_log_that_lost_its_newest_versions(store: ClockedStore, records: list[ExtentRecord]) -> None:
    log = open_log(store)
    for k in range(12):
        log.commit([], floor=k)
    tip = log.state.version
    for version in (2, 3):
        del store.objects[log_key(SPACE.id, version)]
    report = run(store)
    assert report.tip == tip
    assert report.version > tip
    assert (report.version + 1) % MILESTONE == 0
    assert {r.name for r in records} == set(open_log(store).state.extents)


def test_what_a_collector_may_be_deleting_stays_dead(store: ClockedStore, records: list[ExtentRecord]) -> None:
    log = open_log(store)
    leaf, tenant = records[2], records[3]
    log.commit([], [leaf.name, tenant.name], floor=tenant.name.born)
    assert leaf.name.born < log.state.floor <= tenant.name.born
    report = run(store)
    assert (report.readable, report.dead, report.extents) == (log.state.version, 1, 3)
    after = set(open_log(store).state.extents)
    assert leaf.name not in after, "a DELETE of it may be under way"
    assert tenant.name in after, "nobody may delete it"
    lose_the_manifest(store)
    assert run(store).extents == 4, "nobody knows any more that it was removed"


def test_a_replica_ahead_of_all_commits_is_fenced_by_what_it_uploads(store: ClockedStore) -> None:
    fill(store, SPACE, LONG)
    name = ExtentName.fresh(b"\1" * 16, 1, "fast", 100)
    store.put(extent_prefix(SPACE.id, name) + "/c/0/0/0/0/0", b"part of an upload under way")
    report = run(store)
    assert report.tip == 100
    assert report.version > 100 + MILESTONE


def test_the_past_goes_on_until_the_checkpoint_is_there(store: ClockedStore, records: list[ExtentRecord]) -> None:
    """Stopped between milestones and checkpoint: the old history runs through the milestones."""
    writer = open_log(store)
    with pytest.raises(Unavailable):
        run(FaultyStore(store, [Fault(mode="error", verbs=frozenset({"put"}))]))
    for _ in range(3 * MILESTONE):
        record = fill_none(writer)
        assert writer.commit([record]) == [Verdict.LIVE]
    live = set(writer.state.extents)
    assert {r.name for r in records} < live
    assert open_log(store).state == writer.state
    assert run(store).version > writer.state.version


def fill_none(log: Log) -> ExtentRecord:
    """A record without objects: a rebuild will not find it."""
    fresh = secrets.token_bytes(16)
    name = ExtentName.fresh(fresh, 1, "fast", log.state.version)
    return ExtentRecord(name, Grid(), b"\0" * 16, 0, fresh, b"\1\0\0\0", b"\2" * 8, 1)


def test_a_dry_run_changes_nothing_and_says_the_same(store: ClockedStore, records: list[ExtentRecord]) -> None:
    lose_the_manifest(store)
    before = dict(store.objects)
    plan = run(store, dry_run=True)
    assert store.objects == before
    done = run(store)
    assert (plan.version, plan.extents, plan.encoded_bytes) == (done.version, done.extents, done.encoded_bytes)
    assert plan.milestones == done.milestones == len([key for key in store.objects if "/manifest/log/" in key])
    assert plan.encoded_bytes == sum(r.encoded_bytes for r in records)


def test_stopped_at_any_write_and_run_again(store: ClockedStore, records: list[ExtentRecord]) -> None:
    lose_the_manifest(store)
    writes = 0
    while True:
        broken = store.copy()
        try:
            run(FaultyStore(broken, [Fault(mode="error", verbs=frozenset({"put", "create"}), skip=writes)]))
        except Unavailable:
            writes += 1
        else:
            break
        run(broken)
        assert {r.name for r in records} == set(open_log(broken).state.extents)
    assert writes > 5


def test_covered_uploads_are_left_to_the_collector(store: ClockedStore) -> None:
    fill(store, SPACE, LONG[:32], seed=1)
    lose_the_manifest(store)
    longer = fill(store, SPACE, LONG, seed=2)  # as if it had not seen the first
    assert longer is not None
    lose_the_manifest(store)
    report = run(store)
    assert (report.extents, report.covered) == (1, 1)
    assert set(open_log(store).state.extents) == {longer.name}


# ---- what is there is not believed ----


def test_what_is_not_whole_is_left_out(store: ClockedStore, records: list[ExtentRecord]) -> None:
    no_metadata, short, no_shard, alien = records
    del store.objects[extent_prefix(SPACE.id, no_metadata.name) + "/zarr.json"]
    key = shard_key(SPACE.id, short.name, short.grid, 1)
    store.put(key, store.get(key)[:-1])
    del store.objects[shard_key(SPACE.id, no_shard.name, no_shard.grid, 0)]
    key = extent_prefix(SPACE.id, alien.name) + "/zarr.json"
    document = json.loads(store.get(key))
    document["attributes"]["lmcache_s3"]["space_id"] = "cd" * 32
    store.put(key, json.dumps(document).encode())
    store.put(f"spaces/{SPACE.id}/extents/00/readme", b"?")
    report = run(store)
    assert report.extents == 0
    why = {r.extent: r.why for r in report.rejected}
    assert "never ended" in why[str(no_metadata.name)]
    assert "shard 1 has" in why[str(short.name)]
    assert "shard 0 has no bytes" in why[str(no_shard.name)]
    assert "lies in space" in why[str(alien.name)]
    assert len(why) == 5


def test_an_extent_of_another_shape_is_left_out(store: ClockedStore, records: list[ExtentRecord]) -> None:
    wider = Space("ab" * 32, "bfloat16", (KVGroup("full", 2, 2, 2, 8),), chunk_tokens=16, model="org/small")
    other = ClockedStore()
    record = fill(other, wider, LONG)
    assert record is not None
    for key, (data, _) in other.objects.items():
        if "/extents/" in key:
            store.put(key.replace(wider.id, SPACE.id), data.replace(wider.id.encode(), SPACE.id.encode()))
    assert record_from_metadata(store.get(extent_prefix(SPACE.id, record.name) + "/zarr.json"), space_id=SPACE.id)
    report = run(store)
    assert [r.why for r in report.rejected] == ["an array of another shape than the space's"]
    assert report.extents == len(records)


@pytest.mark.usefixtures("records")
@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (log_key(SPACE.id, 2**60), "a version of the log claims"),
        (checkpoint_key(SPACE.id, 2**60, "0" * 32), "a checkpoint claims"),
        (f"spaces/{SPACE.id}/segments/{2**60:020d}.{'0' * 32}/00000.entries.parquet", "a segment claims"),
    ],
)
def test_a_version_that_cannot_be_is_named_and_nothing_is_written(store: ClockedStore, key: str, expected: str) -> None:
    store.put(key, b"x")
    before = dict(store.objects)
    with pytest.raises(Invalid, match=expected):
        run(store)
    assert store.objects == before


def test_a_store_that_does_not_answer_stops_it_before_anything_is_written(
    store: ClockedStore, records: list[ExtentRecord]
) -> None:
    before = dict(store.objects)
    key = extent_prefix(SPACE.id, records[2].name) + "/zarr.json"
    with pytest.raises(Unavailable):
        run(FaultyStore(store, [Fault(mode="error", verbs=frozenset({"get"}), key=key)]))
    assert store.objects == before
