"""`Index`: futures, group commits, what happens when the store fails, read-only, hidden and pinned extents, leaders."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lmcache_s3.errors import Invalid, Unavailable, Unusable
from lmcache_s3.index.manifest import Verdict, log_key
from lmcache_s3.index.service import Index, IndexSettings
from lmcache_s3.testing.faults import Fault, FaultyStore, Verb
from lmcache_s3.testing.small import small_space
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import Buffer, ExtentName, ExtentRecord, Grid, Outcome

SPACE = small_space()
FAST = IndexSettings(poll_s=0.02)
OFF: frozenset[Verb] = frozenset({"get", "put", "create", "delete", "list"})


def make_record(born: int = 0, chunks: int = 2) -> ExtentRecord:
    hashes = secrets.token_bytes(16 * chunks)
    name = ExtentName.fresh(hashes[-16:], chunks, "fast", born)
    return ExtentRecord(name, Grid(), b"\0" * 16, 0, hashes, b"\1\0\0\0" * chunks, b"\2" * 8 * chunks, 100)


def until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


@pytest.fixture
def opened(store: CountingStore) -> Iterator[Callable[..., Index]]:
    indexes: list[Index] = []

    def make(over: ObjectStore = store, settings: IndexSettings = FAST, **more: Any) -> Index:
        indexes.append(Index.open(over, SPACE, settings=settings, **more))
        return indexes[-1]

    yield make
    for index in indexes:
        index.close(1.0)


def test_what_one_commits_the_other_finds(opened: Callable[..., Index]) -> None:
    a, b = opened(), opened()
    record = make_record(a.version, chunks=5)
    assert a.commit([record]).result(5) == [Verdict.LIVE]
    hashes = list(record.chunk_hashes())
    assert [(ref.extent, ref.position) for ref in a.match(hashes)] == [(record, i) for i in range(5)]
    until(lambda: len(b.match(hashes)) == 5)
    assert b.version == 1
    assert [live.record for live in b.extents()] == [record]
    assert b.find(hashes[3]) == b.match(hashes)[3]
    assert b.find(b"?" * 16) is None
    assert len(b.match([*hashes[:2], b"?" * 16, hashes[3]])) == 2, "a run ends at the first unknown chunk"
    assert b.match([b"?" * 16, *hashes]) == []


def test_look_ups_make_no_requests(store: CountingStore, opened: Callable[..., Index]) -> None:
    index = opened(background=False)
    record = make_record(chunks=64)
    index.commit([record]).result(0)
    hashes = list(record.chunk_hashes())
    store.counts.clear()
    for _ in range(100):
        assert len(index.match(hashes)) == 64
    assert not store.counts


def test_what_is_queued_goes_into_one_version(store: CountingStore, opened: Callable[..., Index]) -> None:
    gate = threading.Event()

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def create(self, key: str, data: Buffer) -> Outcome:
            if "/log/" in key:
                gate.wait(5)
            return store.create(key, data)

    index = opened(Slow())
    futures = [index.commit([make_record() for _ in range(3)]) for _ in range(50)]
    futures.append(index.commit([]))
    gate.set()
    assert [len(f.result(5)) for f in futures] == [3] * 50 + [0]
    stats = index.stats()
    assert stats.extents == stats.live == 150
    assert index.version <= 3
    assert stats.commits == index.version


def test_a_commit_does_not_wait_for_the_poll(opened: Callable[..., Index]) -> None:
    index = opened(settings=IndexSettings(poll_s=3600))
    assert index.commit([make_record()]).result(5) == [Verdict.LIVE]


def test_a_record_out_of_bounds_fails_alone(opened: Callable[..., Index]) -> None:
    index = opened()
    good, bad = make_record(), make_record()
    object.__setattr__(bad, "first_token", 2**63)
    broken, fine = index.commit([bad]), index.commit([good])
    with pytest.raises(Unusable):
        broken.result(5)
    assert fine.result(5) == [Verdict.LIVE]


def test_nothing_is_lost_while_the_store_is_away(
    store: CountingStore, opened: Callable[..., Index], caplog: pytest.LogCaptureFixture
) -> None:
    faulty = FaultyStore(store)
    index = opened(faulty)
    with caplog.at_level(logging.WARNING, "lmcache_s3.index"):
        faulty.faults = [Fault(mode="error", verbs=OFF)]
        futures = [index.commit([make_record()]) for _ in range(5)]
        until(lambda: sum(index.stats().errors.values()) >= 3)
        assert not any(f.done() for f in futures)
        assert index.stats().pending == 5
        assert index.stats().last_error
        faulty.faults = []
        assert [f.result(10) for f in futures] == [[Verdict.LIVE]] * 5
    assert len([r for r in caplog.records if "will retry" in r.message]) == 1, "logged once per kind"
    assert index.stats().pending == 0


def test_an_unreadable_version_leaves_the_index_serving(store: CountingStore, opened: Callable[..., Index]) -> None:
    index = opened()
    record = make_record()
    index.commit([record]).result(5)
    store.put(log_key(SPACE.id, 2), b"junk")
    until(lambda: index.stats().errors.get("format", 0) >= 2)
    assert len(index.match(list(record.chunk_hashes()))) == 2
    later = index.commit([make_record()])
    store.delete(log_key(SPACE.id, 2))
    assert later.result(10) == [Verdict.LIVE]


def test_close_drains_and_then_refuses(opened: Callable[..., Index], store: CountingStore) -> None:
    index = opened(settings=IndexSettings(poll_s=3600))
    futures = [index.commit([make_record()]) for _ in range(20)]
    index.close()
    assert [f.result(0) for f in futures] == [[Verdict.LIVE]] * 20
    with pytest.raises(Unavailable):
        index.commit([make_record()]).result(0)
    index.close()
    assert opened().stats().extents == 20


def test_close_gives_up_in_time(store: CountingStore, opened: Callable[..., Index]) -> None:
    faulty = FaultyStore(store)
    index = opened(faulty)
    faulty.faults = [Fault(mode="error", verbs=OFF)]
    future = index.commit([make_record()])
    start = time.monotonic()
    index.close(0.3)
    assert time.monotonic() - start < 3
    with pytest.raises(Unavailable, match="closed"):
        future.result(0)


def test_too_many_pending_are_refused(store: CountingStore, opened: Callable[..., Index]) -> None:
    faulty = FaultyStore(store)
    index = opened(faulty, settings=IndexSettings(poll_s=0.02, max_pending=3))
    faulty.faults = [Fault(mode="error", verbs=OFF)]
    futures = [index.commit([make_record()]) for _ in range(4)]
    with pytest.raises(Unavailable) as e:
        futures[3].result(5)
    assert e.value.kind == "full"
    faulty.faults = []
    assert [f.result(10) for f in futures[:3]] == [[Verdict.LIVE]] * 3


def test_open_fails_when_the_store_is_down(store: CountingStore) -> None:
    with pytest.raises(Unavailable):
        Index.open(FaultyStore(store, [Fault(mode="error", verbs=OFF)]), SPACE)


def test_read_only_never_writes(store: CountingStore, opened: Callable[..., Index]) -> None:
    reader = opened(settings=IndexSettings(poll_s=0.02, read_only=True))
    assert reader.version == 0, "a space that is not there yet is empty"
    writer = opened()
    writer.commit([make_record()]).result(5)
    until(lambda: reader.version == 1)
    writer.close()
    store.counts.clear()
    with pytest.raises(Invalid):
        reader.commit([make_record()]).result(0)
    with pytest.raises(Invalid):
        reader.remove([], why="test").result(0)
    with pytest.raises(Invalid):
        reader.checkpoint()
    reader.sync()
    assert set(store.counts) <= {"get", "list"}


def test_hide_and_remove(opened: Callable[..., Index]) -> None:
    a, b = opened(), opened()
    first, second = make_record(chunks=3), make_record(chunks=3)
    object.__setattr__(second, "hashes", first.hashes[:32] + second.hashes[32:])  # shares two chunks
    a.commit([first]).result(5)
    a.commit([second]).result(5)
    b.sync()
    hashes = list(first.chunk_hashes())
    b.hide(first.name)
    assert [ref.extent for ref in b.match(hashes)] == [second, second]
    assert len(a.match(hashes)) == 3, "hidden in one process only"
    b.remove([first.name], why="damaged").result(5)
    a.sync()
    assert [ref.extent for ref in a.match(hashes)] == [second, second]
    assert b.stats().hidden == 0
    assert b.stats().removed == 1
    b.remove([first.name], why="again").result(5)
    assert b.version == 3, "a removal that changes nothing creates no version"


def test_pins_are_counted(opened: Callable[..., Index]) -> None:
    index = opened(background=False)
    name = make_record().name
    with index.pin([name]), index.pin({name}):
        assert index.stats().pinned == 1
    assert index.stats().pinned == 0


def test_look_ups_see_one_version_while_commits_go_on(opened: Callable[..., Index]) -> None:
    """An extent appears whole or not at all, whatever the applier does meanwhile."""
    index, stop = opened(), threading.Event()
    seen: list[int] = []
    records = [make_record(chunks=16) for _ in range(20)]

    def look() -> None:
        while not stop.is_set():
            seen.extend({len(index.match(list(record.chunk_hashes()))) for record in records})

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for record in records:
        index.commit([record]).result(10)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(seen) <= {0, 16}
    assert index.stats().extents == 20


def test_checkpoints_serve_a_cold_start(store: CountingStore, opened: Callable[..., Index]) -> None:
    index = opened(settings=IndexSettings(poll_s=0.02, checkpoint_every=8))
    for _ in range(20):
        index.commit([make_record()]).result(5)
    index.close()
    assert index.stats().checkpoints == 2
    for version in range(1, 17):
        store.delete(log_key(SPACE.id, version))
    assert opened().stats().extents == 20


# ---- hand-overs, leaders, accesses ----

BUSY = IndexSettings(poll_s=0.02, hand_over_s=0.02, merge_s=0.02)
NOBODY_ALIVE = "01JDXB4Z5T8V6Q2W3E4R5T6Y7H"


def make_leader(index: Index) -> str:
    with index._turn:
        index._log.commit((), lead=index._log.writer)
    return index._log.writer


def test_commits_are_handed_to_the_leader(opened: Callable[..., Index]) -> None:
    leader, *writers = (opened(settings=BUSY) for _ in range(4))
    ulid = make_leader(leader)
    for writer in writers:
        writer.sync()
    futures = []
    for _ in range(10):
        futures += [index.commit([make_record(index.version)]) for index in (leader, *writers)]
        time.sleep(0.01)
    assert [f.result(10) for f in futures] == [[Verdict.LIVE]] * 40
    for writer in writers:
        stats = writer.stats()
        assert (stats.leader, stats.leads, stats.commits, stats.hand_overs, stats.pending) == (ulid, False, 0, 0, 0)
        assert stats.handed_over > 0
        assert stats.live == 10
    stats = leader.stats()
    assert (stats.leader, stats.leads, stats.handed_over, stats.junk) == (ulid, True, 0, 0)
    assert stats.merged == sum(writer.stats().handed_over for writer in writers)
    name = next(iter(leader.extents())).record.name
    removal = writers[0].remove([name], why="test")
    assert removal.result(10) is None
    assert writers[0].stats().removed == 1
    leader.close()
    assert not leader.stats().leads
    writers[0].sync()
    assert writers[0].stats().leader is None
    assert writers[0].commit([make_record()]).result(10) == [Verdict.LIVE]
    assert writers[0].stats().extents == 40


def test_close_commits_what_a_dead_leader_left(opened: Callable[..., Index]) -> None:
    index = opened(settings=BUSY)
    with index._turn:
        index._log.commit((), lead=NOBODY_ALIVE)
    futures = [index.commit([make_record()]) for _ in range(3)]
    until(lambda: index.stats().hand_overs > 0)
    futures.append(index.commit([make_record()]))
    assert not any(f.done() for f in futures)
    start = time.monotonic()
    index.close()
    assert time.monotonic() - start < 3, "nobody waits for the dead"
    assert [f.result(0) for f in futures] == [[Verdict.LIVE]] * 4
    assert opened().stats().extents == 4


def test_close_that_cannot_reach_the_store_fails_what_was_handed_over(
    store: CountingStore, opened: Callable[..., Index]
) -> None:
    faulty = FaultyStore(store)
    index = opened(faulty, settings=BUSY)
    with index._turn:
        index._log.commit((), lead=NOBODY_ALIVE)
    future = index.commit([make_record()])
    until(lambda: index.stats().hand_overs == 1)
    faulty.faults = [Fault(mode="error", verbs=OFF)]
    index.close(0.3)
    with pytest.raises(Unavailable, match="closed"):
        future.result(0)


def test_hits_are_told_to_all(opened: Callable[..., Index]) -> None:
    writer, reader = opened(), opened(settings=IndexSettings(poll_s=0.02, access_s=0.05))
    record = make_record()
    writer.commit([record]).result(5)
    reader.sync()

    def told() -> bool:
        reader.touch([record.name])  # again and again: what is younger than the interval is not worth telling
        return next(iter(writer.extents())).last_access > 1

    until(told)
    until(lambda: reader.stats().accesses == 0)


def test_a_call_too_big_for_any_version_fails_alone(opened: Callable[..., Index]) -> None:
    index = opened()
    big, good = [make_record(chunks=2**16)] * 8, make_record()
    future, fine = index.commit(big), index.commit([good])
    with pytest.raises(Unusable) as e:
        future.result(5)
    assert e.value.kind == "oversized"
    assert fine.result(5) == [Verdict.LIVE]


def test_settings_are_checked() -> None:
    for bad in ({"poll_s": 0}, {"checkpoint_every": 0}, {"max_pending": -1}, {"hand_over_s": 0}, {"merge_s": -1}):
        with pytest.raises(Invalid):
            IndexSettings(**bad)  # type: ignore[arg-type]


# ---- a real S3 server ----


@pytest.mark.s3
def test_four_writers_on_real_s3(bucket_url: str) -> None:
    """All visible, none lost, however they collide."""
    start = time.monotonic()
    indexes = [Index.open(open_store(bucket_url), SPACE, settings=IndexSettings(poll_s=0.2)) for _ in range(4)]
    print(f"opened four: {time.monotonic() - start:.1f} s")
    names: list[ExtentName] = []
    lock = threading.Lock()

    def write(index: Index) -> None:
        for _ in range(5):
            record = make_record(index.version)
            assert index.commit([record]).result(60) == [Verdict.LIVE]
            with lock:
                names.append(record.name)

    threads = [threading.Thread(target=write, args=(index,)) for index in indexes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 20
    for index in indexes:
        index.sync()
        assert {live.record.name for live in index.extents()} == set(names)
        index.close()
    print(f"all: {time.monotonic() - start:.1f} s", [index.stats().conflicts for index in indexes])
