"""The kept past: times that never fall, who did what, the state as of any kept version, and what is not kept."""

from __future__ import annotations

import random
import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.index.history import Versions, as_of, entries, list_versions
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import State, checkpoint_key, log_key, segments_prefix
from lmcache_s3.testing.clocked import ClockedStore
from lmcache_s3.types import ExtentName, ExtentRecord, Grid

SPACE_ID = "ab" * 32
ULID = "01JDXB4Z5T8V6Q2W3E4R5T6Y7H"


def make_record(born: int) -> ExtentRecord:
    hashes = secrets.token_bytes(32)
    name = ExtentName.fresh(hashes[-16:], 2, "fast", born)
    return ExtentRecord(name, Grid(), b"\0" * 16, 0, hashes, b"\1\0\0\0" * 2, b"\2" * 16, 100)


@pytest.fixture
def store() -> ClockedStore:
    return ClockedStore(now_s=1000.0)


@pytest.fixture
def truth(store: ClockedStore) -> dict[int, State]:
    """Ten versions, ten seconds apart: two adds, then a removal and an add each; checkpoints of 3 and 7."""
    log = Log(store, SPACE_ID, writer=ULID, sleep=lambda _: None, rng=random.Random(1), nonce=lambda: "a" * 32)
    states = {0: log.open()}
    while log.state.version < 10:
        live = list(log.state.extents)
        log.commit([make_record(log.state.version)], live[:1] if len(live) > 2 else [])
        states[log.state.version] = log.state
        if log.state.version in (3, 7):
            log.checkpoint()
        store.now_s += 10
    return states


def test_times(store: ClockedStore, truth: dict[int, State]) -> None:
    versions = list_versions(store, SPACE_ID)
    assert versions.numbers.tolist() == list(range(1, 11))
    assert versions.times_s.tolist() == [1000 + 10 * i for i in range(10)]
    assert versions.sizes.tolist() == [len(store.objects[log_key(SPACE_ID, v)][0]) for v in range(1, 11)]
    assert [versions.newest_at(t) for t in (999, 1000, 1009.9, 1010, 10**9)] == [0, 1, 1, 2, 10]
    assert [versions.time_of(v) for v in (1, 10, 11)] == [1000, 1090, None]
    assert list_versions(store, SPACE_ID, after=4, upto=6).numbers.tolist() == [5, 6]
    assert list_versions(store, "cd" * 32).newest_at(10**9) == 0


def test_a_version_is_never_younger_than_a_later_one_nor_decided_early(store: ClockedStore, truth: object) -> None:
    data, _ = store.objects[log_key(SPACE_ID, 4)]
    store.objects[log_key(SPACE_ID, 4)] = (data, 1065.0)  # as if a stalled writer had created it again
    versions = list_versions(store, SPACE_ID)
    assert versions.times_s.tolist() == [1000, 1010, 1020, 1065, 1065, 1065, 1065, 1070, 1080, 1090]
    assert versions.newest_at(1050) == 3


def test_other_objects_are_counted(store: ClockedStore, truth: object) -> None:
    for name in ("x", "9" * 20, "1" * 19, f"{7:020d}/x"):
        store.put(log_key(SPACE_ID, 1)[:-20] + name, b"")
    versions = list_versions(store, SPACE_ID)
    assert versions.numbers.tolist() == list(range(1, 11))
    assert versions.foreign == 4


def test_entries(store: ClockedStore, truth: dict[int, State]) -> None:
    versions = list_versions(store, SPACE_ID)
    store.put(log_key(SPACE_ID, 2), b"{}")
    del store.objects[log_key(SPACE_ID, 5)]
    with ThreadPoolExecutor(4) as readers:
        found = list(entries(store, SPACE_ID, versions, readers=readers))
    assert [entry.version for entry in found] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert [entry.version for entry in found if entry.problem] == [2]
    for entry in found:
        assert entry.time_s == 990 + 10 * entry.version
        if entry.delta is not None:
            assert entry.delta.writer == ULID
            assert set(entry.delta.remove) == set(truth[entry.version - 1].extents) - set(truth[entry.version].extents)


def test_as_of_every_version(store: ClockedStore, truth: dict[int, State]) -> None:
    with ThreadPoolExecutor(4) as readers:
        for version, state in truth.items():
            assert as_of(store, SPACE_ID, version) == state
            assert as_of(store, SPACE_ID, version, readers=readers) == state


def test_as_of_reads_from_the_nearest_checkpoint(store: ClockedStore, truth: dict[int, State]) -> None:
    for version in (1, 2, 3, 4):
        del store.objects[log_key(SPACE_ID, version)]
    assert as_of(store, SPACE_ID, 3) == truth[3]
    assert as_of(store, SPACE_ID, 8) == truth[8]
    for version in (1, 2, 5):
        with pytest.raises(
            Invalid, match=f"version {version} is not kept any more; the oldest that is: {3 + 4 * (version > 2)}"
        ):
            as_of(store, SPACE_ID, version)
    with pytest.raises(Invalid, match="there is no version 12, the newest is 10"):
        as_of(store, SPACE_ID, 12)


def test_a_checkpoint_collected_meanwhile_is_passed_over(store: ClockedStore, truth: dict[int, State]) -> None:
    for key in [key for key in store.objects if key.startswith(segments_prefix(SPACE_ID, 7, "a" * 32))]:
        del store.objects[key]
    assert as_of(store, SPACE_ID, 9) == truth[9]
    store.put(checkpoint_key(SPACE_ID, 3, "0" * 32).replace(".json", ".txt"), b"")
    assert as_of(store, SPACE_ID, 9) == truth[9]


def test_a_version_that_cannot_be_read_is_named(store: ClockedStore, truth: dict[int, State]) -> None:
    store.put(log_key(SPACE_ID, 9), b"\0")
    assert as_of(store, SPACE_ID, 8) == truth[8]
    with pytest.raises(Unusable, match="version 9 cannot be read"):
        as_of(store, SPACE_ID, 10)


def test_nothing_listed() -> None:
    versions = list_versions(ClockedStore(), SPACE_ID)
    assert isinstance(versions, Versions)
    assert (versions.newest_at(1e12), versions.time_of(1), len(versions.numbers)) == (0, None, 0)
