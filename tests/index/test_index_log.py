"""The manifest protocol step by step: requests made, what cannot be read, checkpoints, patience."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmcache_s3.errors import Conflict, Unavailable, Unusable
from lmcache_s3.index.log import MAX_BATCH, Log, LogLimits
from lmcache_s3.index.manifest import NOBODY, Delta, Verdict, checkpoint_key, checkpoints_prefix, encode_delta, log_key
from lmcache_s3.index.pace import Pace, Rate
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.stepped import SPACE_ID, make_record
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.types import ExtentName, Outcome

ULID = "01JDXB4Z5T8V6Q2W3E4R5T6Y7H"


@pytest.fixture
def make_log(store: CountingStore) -> Callable[..., Log]:
    def make(over: ObjectStore = store, readers: ThreadPoolExecutor | None = None, **limits: Any) -> Log:
        return Log(
            over,
            SPACE_ID,
            writer=ULID,
            sleep=slept.append,
            rng=random.Random(7),
            nonce=lambda: secrets.token_hex(16),
            limits=LogLimits(**limits),
            readers=readers,
        )

    slept: list[float] = []
    make.slept = slept  # type: ignore[attr-defined]
    return make


def test_a_lone_commit_is_one_put_and_two_gets(store: CountingStore, make_log: Callable[..., Log]) -> None:
    log = make_log()
    log.open()
    for _ in range(10):
        before = dict(store.counts)
        assert log.commit([make_record(log.state.version)]) == [Verdict.LIVE]
        made = {verb: n - before.get(verb, 0) for verb, n in store.counts.items() if n != before.get(verb, 0)}
        assert made == {"create": 1, "get": 2}


def test_requests_of_polls_and_open(store: CountingStore, make_log: Callable[..., Log]) -> None:
    writer, reader = make_log(), make_log()
    reader.open()
    assert store.counts == {"list": 1, "get": 2}  # newest checkpoint, version 1, fence
    for k in (1, 3):
        for _ in range(k):
            writer.commit([make_record()])
        store.counts.clear()
        reader.sync()
        assert store.counts == {"get": k + 2}
    store.counts.clear()
    for _ in range(64):
        reader.sync()
    assert store.counts == {"get": 64 + 2}  # the fence on each 32nd empty poll


def test_a_judged_commit_creates_nothing(store: CountingStore, make_log: Callable[..., Log]) -> None:
    log = make_log()
    record = make_record()
    log.commit([record])
    store.counts.clear()
    again = make_record(hashes=record.hashes)
    part = make_record(hashes=record.hashes[:16])
    assert log.commit([record, again, part]) == [Verdict.LIVE, Verdict.COVERED, Verdict.COVERED]
    log.commit([], [again.name])
    assert store.counts["create"] == 0


def test_one_version_never_adds_two_extents_of_the_same_chunks(make_log: Callable[..., Log]) -> None:
    log = make_log()
    record = make_record()
    twin, longer = make_record(hashes=record.hashes), make_record(hashes=record.hashes + b"x" * 16)
    assert log.commit([record, twin, longer]) == [Verdict.LIVE, Verdict.COVERED, Verdict.LIVE]
    assert [live.record for live in log.state.in_order()] == [record, longer]
    assert log.state.version == 1


def test_void_below_the_floor(make_log: Callable[..., Log]) -> None:
    log = make_log()
    for _ in range(3):
        log.commit([make_record(log.state.version)])
    stale, old = make_record(born=1), log.state
    log.commit([], floor=2)
    assert log.state.floor == 2
    assert log.commit([stale, make_record(born=2)]) == [Verdict.VOID, Verdict.LIVE]
    assert log.counters.void == 1
    assert set(old.extents) <= set(log.state.extents), "what is live stays live under a floor"


def test_a_lost_answer_is_acknowledged_after_reading_back(store: CountingStore, make_log: Callable[..., Log]) -> None:
    faulty = FaultyStore(store, [Fault(mode="lost_answer", verbs=frozenset({"create"}), times=1)])
    log = make_log(faulty)
    record = make_record()
    assert log.commit([record]) == [Verdict.LIVE]
    assert (log.counters.unknown, log.state.version, store.counts["create"]) == (1, 1, 1)


def test_a_create_that_raises_counts_as_unknown(store: CountingStore, make_log: Callable[..., Log]) -> None:
    for mode in ("error", "error_after"):
        log = make_log(FaultyStore(store, [Fault(mode=mode, verbs=frozenset({"create"}), times=1)]))
        assert log.commit([make_record()]) == [Verdict.LIVE]
        assert log.counters.unknown == 1
    assert log.state.version == 2


class Losing:
    """A store on which somebody else always wins the race."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, key: str, data: bytes) -> Outcome:
        self._inner.create(key, encode_delta(Delta(ULID, add=(make_record(),))))
        return self._inner.create(key, data)


def test_gives_up_with_conflict_after_growing_pauses(store: CountingStore, make_log: Any) -> None:
    log = make_log(Losing(store), max_commit_attempts=12, backoff_s=0.1, backoff_cap_s=5.0)
    record = make_record()
    with pytest.raises(Conflict):
        log.commit([record])
    assert len(make_log.slept) == 12
    assert all(0 <= pause <= min(5.0, 0.1 * 2**i) for i, pause in enumerate(make_log.slept))
    assert max(make_log.slept) > 1.0
    assert make_log().commit([record]) == [Verdict.LIVE], "trying again later is all it takes"


def test_errors_of_the_store_leave_the_replica_as_it_was(store: CountingStore, make_log: Callable[..., Log]) -> None:
    writer = make_log()
    for _ in range(3):
        writer.commit([make_record()])
    faulty = FaultyStore(store, [Fault(mode="error", verbs=frozenset({"get"}), key="log/0*3$")])
    log = make_log(faulty)
    with pytest.raises(Unavailable):
        log.sync()
    assert log.state.version == 0
    faulty.faults = []
    assert log.sync() == writer.state


# ---- what cannot be read ----


@pytest.mark.parametrize(
    "bad", [b"", b"{}", b'{"format":2}', b"\0" * 100, b" " * (17 * 2**20)], ids=["empty", "no", "newer", "nul", "huge"]
)
def test_an_unreadable_version_stops_the_replica_and_says_so(
    bad: bytes, store: CountingStore, make_log: Callable[..., Log]
) -> None:
    writer = make_log()
    for _ in range(4):
        writer.commit([make_record()])
    good = store.get(log_key(SPACE_ID, 3))
    store.put(log_key(SPACE_ID, 3), bad)
    log = make_log()
    for _ in range(2):
        with pytest.raises(Unusable, match=r"version 3 .* stays at version 2 until .*/0+3 is restored"):
            log.sync()
        assert log.state.version == 2, "what precedes it is served"
    with pytest.raises(Unusable):
        log.commit([make_record()])
    store.put(log_key(SPACE_ID, 3), good)
    assert log.sync() == writer.state, "mended by restoring the object"


def test_a_checkpoint_beyond_an_unreadable_version_helps(store: CountingStore, make_log: Callable[..., Log]) -> None:
    writer = make_log()
    for _ in range(4):
        writer.commit([make_record()])
    reader = make_log()
    store.put(log_key(SPACE_ID, 3), b"")
    writer.checkpoint()
    assert reader.sync() == writer.state


def test_open_loads_the_newest_checkpoint_and_the_rest(store: CountingStore, make_log: Callable[..., Log]) -> None:
    writer = make_log()
    for i in range(7):
        writer.commit([make_record(i)], list(writer.state.extents)[:1] if i == 3 else [])
        if i in (2, 5):
            writer.checkpoint()
    for version in range(1, 7):
        store.delete(log_key(SPACE_ID, version))
    reader = make_log()
    assert reader.open() == writer.state
    assert reader.state.version == 7


def test_junk_among_the_checkpoints_is_passed_over(store: CountingStore, make_log: Callable[..., Log]) -> None:
    writer = make_log()
    writer.commit([make_record()])
    writer.checkpoint()
    store.put(checkpoints_prefix(SPACE_ID) + "00-README", b"hello")
    store.put(checkpoints_prefix(SPACE_ID) + "0" * 20 + ".x.json", b"hello")
    store.delete(log_key(SPACE_ID, 1))
    assert make_log().open() == writer.state


def test_a_damaged_checkpoint_is_named(store: CountingStore, make_log: Callable[..., Log]) -> None:
    writer = make_log()
    writer.commit([make_record()])
    writer.checkpoint()
    segment = next(info.key for info in store.list(f"spaces/{SPACE_ID}/segments/"))
    data = store.get(segment)
    store.put(segment, data[:-1])
    with pytest.raises(Unusable, match=r"checkpoint .*\.json cannot be read"):
        make_log().open()
    store.delete(segment)
    with pytest.raises(Unusable, match="cannot be read"):
        make_log().open()
    store.put(segment, data)
    assert make_log().open() == writer.state


def test_a_checkpoint_that_is_collected_while_it_is_loaded(store: CountingStore, make_log: Callable[..., Log]) -> None:
    """LIST names a checkpoint whose segments are gone a moment later: there is a newer one by then."""
    writer = make_log()
    writer.commit([make_record()])
    writer.checkpoint()
    old = next(info.key for info in store.list(checkpoints_prefix(SPACE_ID)))

    class Collected(Losing):
        def get(self, key: str, *args: Any, **kwargs: Any) -> bytes:
            if key == old:
                writer.commit([make_record()])
                writer.checkpoint()
                for info in list(store.list(f"spaces/{SPACE_ID}/segments/{1:020d}")):
                    store.delete(info.key)
                out = store.get(key)
                store.delete(key)
                return out
            return store.get(key, *args, **kwargs)

    assert make_log(Collected(store)).open() == writer.state


# ---- checkpoints and catching up ----


def checkpoints(store: CountingStore) -> list[int]:
    prefix = checkpoints_prefix(SPACE_ID)
    return sorted(10**20 - 1 - int(info.key.removeprefix(prefix)[:20]) for info in store.list(prefix))


def test_the_creator_of_each_nth_version_writes_a_checkpoint(
    store: CountingStore, make_log: Callable[..., Log]
) -> None:
    a, b = make_log(checkpoint_every=4), make_log(checkpoint_every=4)
    for i in range(17):
        log = (a, b)[i % 2]
        log.commit([make_record()])
        log.checkpoint_if_due()
        a.sync()
        a.checkpoint_if_due()  # not its creator: nothing to do
    assert checkpoints(store) == [4, 8, 12, 16]
    assert a.counters.checkpoints == 0


def test_it_died_so_the_next_committer_writes_it(store: CountingStore, make_log: Callable[..., Log]) -> None:
    died, log = make_log(checkpoint_every=16), make_log(checkpoint_every=16)
    for _ in range(16):
        died.commit([make_record()])  # and never asks
    for _ in range(4):
        log.commit([make_record()])
        log.checkpoint_if_due()
    assert checkpoints(store) == [19]


def test_long_versions_ask_for_a_checkpoint(
    store: CountingStore, make_log: Callable[..., Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_s3.index.log.CHECKPOINT_MIN_BYTES", 3000)
    log = make_log()
    for _ in range(6):
        log.commit([make_record(chunks=32)])
        log.checkpoint_if_due()
    assert checkpoints(store) == [2, 4, 6]


def test_a_failing_checkpoint_leaves_no_index(store: CountingStore, make_log: Callable[..., Log]) -> None:
    log = make_log(FaultyStore(store, [Fault(mode="error", verbs=frozenset({"put"}), skip=1)]), checkpoint_every=1)
    log.commit([make_record()])
    with pytest.raises(Unavailable):
        log.checkpoint_if_due()
    assert checkpoints(store) == []
    assert log.commit([make_record()]) == [Verdict.LIVE]


def test_catching_up_reads_ahead_and_in_bounded_batches(store: CountingStore, make_log: Callable[..., Log]) -> None:
    n = MAX_BATCH + 100
    for version in range(1, n + 1):
        store.put(log_key(SPACE_ID, version), encode_delta(Delta(ULID, add=(make_record(chunks=1),))))
    store.counts.clear()
    with ThreadPoolExecutor(8) as readers:
        fast = make_log(readers=readers, read_ahead=8)
        assert fast.sync().version == n
    assert store.counts["get"] <= n + 2 * 8 + 2
    slow = make_log()
    assert slow.sync() == fast.state


def test_read_ahead_never_jumps_a_gap(store: CountingStore, make_log: Callable[..., Log]) -> None:
    for version in [*range(1, 8), 9, 10]:
        store.put(log_key(SPACE_ID, version), encode_delta(Delta(ULID, add=(make_record(),))))
    with ThreadPoolExecutor(8) as readers:
        assert make_log(readers=readers).sync().version == 7


def test_checkpoint_keys_name_the_state(store: CountingStore, make_log: Callable[..., Log]) -> None:
    log = make_log()
    log.commit([make_record()])
    log.checkpoint()
    (key,) = [info.key for info in store.list(checkpoints_prefix(SPACE_ID))]
    assert key == checkpoint_key(SPACE_ID, 1, key.split(".")[-2])


def test_what_replaces_a_removed_extent_may_come_in_the_same_version(
    store: CountingStore, make_log: Callable[..., Log]
) -> None:
    log = make_log(store)
    damaged = make_record(chunks=2)
    assert log.commit([damaged]) == [Verdict.LIVE]
    anew = make_record(chunks=2)
    object.__setattr__(anew, "hashes", damaged.hashes)
    object.__setattr__(anew, "name", ExtentName.fresh(damaged.hashes[-16:], 2, "fast", 1))
    assert log.commit([anew], remove=[damaged.name]) == [Verdict.LIVE]
    assert log.state.version == 2
    assert [ref.extent.name for ref in log.replica.match(list(damaged.chunk_hashes()))] == [anew.name] * 2


# ---- lead, access, pace ----


def test_what_the_state_says_already_needs_no_version(store: CountingStore, make_log: Callable[..., Log]) -> None:
    log = make_log()
    record, absent = make_record(), make_record()
    log.commit([record])
    for _ in range(3):
        log.commit([record], [absent.name], lead=ULID, access=[absent.name])
    assert (log.state.version, log.state.lead) == (2, ULID)
    log.commit([], floor=1)
    log.commit([], floor=1, lead=ULID)
    assert (log.state.version, log.state.floor) == (3, 1)
    log.commit([], lead=NOBODY)
    log.commit([], lead=NOBODY)
    assert (log.state.version, log.state.lead) == (4, None)
    log.commit([make_record(4)], access=[record.name, absent.name])
    assert (log.state.version, log.state.extents[record.name].last_access) == (5, 5), "in one version"
    log.commit([], [record.name], access=[record.name])
    assert (log.state.version, len(log.state.extents)) == (6, 1)


def test_everything_in_one_version(make_log: Callable[..., Log]) -> None:
    log, reader = make_log(), make_log()
    old, hit, new = make_record(), make_record(), make_record(1)
    log.commit([old, hit])
    assert log.commit([new], [old.name], floor=1, lead=ULID, access=[hit.name]) == [Verdict.LIVE]
    state = reader.sync()
    assert (state.version, state.floor, state.lead) == (2, 1, ULID)
    assert set(state.extents) == {hit.name, new.name}
    assert state.extents[hit.name].last_access == 2
    assert state == log.state


class LosingAtFirst(Losing):
    """Others win the first `losses` races of each commit."""

    losses = 0

    def create(self, key: str, data: bytes) -> Outcome:
        if self.losses:
            self.losses -= 1
            return super().create(key, data)
        return self._inner.create(key, data)


def test_the_pace_adapts_to_contention(store: CountingStore, make_log: Any) -> None:
    losing = LosingAtFirst(store)
    log = make_log(losing, backoff_s=0.1, backoff_cap_s=5.0)
    log.commit([make_record()])
    assert log.pace.group_wait_s() == 0.0, "alone, nobody waits"
    spans = []
    for _ in range(6):
        losing.losses = 2
        log.commit([make_record()])
        spans.append(log.pace.span_s)
    assert spans == sorted(spans), "what was learned is kept from one commit to the next"
    assert spans[-1] >= 1.0
    assert log.counters.contention == pytest.approx(12 / 19)
    assert 0 < max(log.pace.group_wait_s() for _ in range(20)) <= log.pace.group_cap_s
    for _ in range(10):
        log.commit([make_record()])
    assert log.pace.span_s == log.pace.group_wait_s() == 0.0


def test_full_jitter() -> None:
    pace = Pace(random.Random(3), base_s=0.1, cap_s=5.0)
    for _ in range(10):
        pace.lost()
    assert pace.span_s == 5.0
    waits = [pace.backoff_s() for _ in range(200)]
    assert min(waits) < 0.25
    assert max(waits) > 4.75
    assert max(pace.group_wait_s() for _ in range(200)) <= 1.0


def test_versions_per_second_over_the_last_ten() -> None:
    now = [0.0]
    rate = Rate(lambda: now[0])
    assert rate.per_s() == 0.0
    version = 1_000_000
    for _ in range(9):
        version += 3
        rate.seen(version)
        now[0] += 1.0
    assert rate.per_s() == pytest.approx(2.4), "over the whole window, though watched for less of it"
    for _ in range(30):
        version += 3
        rate.seen(version)
        now[0] += 1.0
    assert rate.per_s() == pytest.approx(3.0)
    now[0] += 600.0
    version += 600
    rate.seen(version)
    assert rate.per_s() == pytest.approx(1.0, abs=0.1), "a long pause is no burst"
    for _ in range(12_000):
        now[0] += 0.001
        rate.seen(version)
    assert rate._seen is not None
    assert len(rate._seen) < 80
    assert rate.per_s() == 0.0
