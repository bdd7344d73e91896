"""The simulated bucket: S3's behaviour and prices, and each misbehaviour doing what it says."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from lmcache_s3.errors import Missing, Unavailable, Unusable
from lmcache_s3.testing.simulated_s3 import S3_LATENCIES, Latency, Misbehaviour, Prices, Requests, SimulatedS3
from lmcache_s3.testing.virtual import Simulation
from lmcache_s3.types import Outcome

PREFIX = "spaces/0/manifest/log/"


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation(7) as simulation:
        yield simulation


def test_objects_come_back_and_listings_are_sorted_paged_and_consistent(sim: Simulation) -> None:
    store = SimulatedS3(sim).client("a")
    keys = [f"{PREFIX}{i:05d}" for i in range(2500)]
    for key in reversed(keys):
        store.put(key, b"0123456789")
    store.put("spaces/0/space.json", b"x")
    assert store.get(keys[3]) == b"0123456789"
    assert store.get(keys[3], 2, 4) == b"23"
    assert [info.key for info in store.list(PREFIX)] == keys
    assert store.index.list == 3
    assert [info.key for info in store.list(PREFIX, start_after=keys[10], limit=2)] == keys[11:13]
    assert next(iter(store.list("spaces/0/"))).key == keys[0]
    assert [info.key for info in store.list("spaces/0/s")] == ["spaces/0/space.json"]
    store.delete(keys[0])
    store.delete(keys[0])
    assert next(iter(store.list(PREFIX))).key == keys[1]
    with pytest.raises(Missing):
        store.get(keys[0])
    with pytest.raises(Unusable, match="fewer"):
        store.get(keys[1], 5, 11)
    with pytest.raises(Unusable, match="more than"):
        store.get(keys[1], limit_bytes=9)


def test_last_modified_is_the_stores_virtual_time_in_whole_seconds(sim: Simulation) -> None:
    s3 = SimulatedS3(sim, epoch_s=1000.0, latencies=dict.fromkeys(S3_LATENCIES, Latency(0.0, 0.0)))
    sim.sleep(86_400.7)
    s3.client("a").put("k", b"")
    assert next(iter(s3.client("b").list("k"))).modified_s == 87_400


def test_one_creator_wins_though_many_race(sim: Simulation) -> None:
    s3, outcomes = SimulatedS3(sim), []

    def create(i: int) -> None:
        outcomes.append((i, s3.client(str(i)).create(PREFIX + "1", b"%d" % i)))

    for i in range(50):
        sim.start(partial(create, i))
    sim.run_until(60.0)
    (winner,) = [i for i, outcome in outcomes if outcome is Outcome.WON]
    assert len(outcomes) == 50
    assert s3.objects[PREFIX + "1"] == b"%d" % winner


def test_requests_and_dollars_are_counted_by_verb_instance_and_kind_of_key(sim: Simulation) -> None:
    s3 = SimulatedS3(sim)
    a, b = s3.client("a"), s3.client("b")
    a.create(PREFIX + "1", b"")
    a.put("spaces/0/extents/ab/x/zarr.json", b"")
    a.get(PREFIX + "1")
    b.delete(PREFIX + "1")
    list(b.list(PREFIX))
    assert a.index == Requests(get=1, create=1)
    assert a.extents == Requests(put=1)
    assert b.index == Requests(delete=1, list=1)
    million = Requests(get=10**6, put=10**6, create=10**6, delete=10**6, list=10**6)
    assert million.dollars(Prices()) == pytest.approx(0.4 + 5 + 5 + 5)
    assert (million - a.index).create == 10**6 - 1


def test_latencies_have_the_median_and_the_tail_they_say(sim: Simulation) -> None:
    store = SimulatedS3(sim).client("a")
    store.put("k", b"")
    took = []
    for _ in range(8000):
        start = sim.clock()
        store.get("k")
        took.append(sim.clock() - start)
    assert statistics.median(took) == pytest.approx(0.020, rel=0.05)
    assert statistics.quantiles(took, n=100)[-1] == pytest.approx(0.120, rel=0.15)


def answer(call: Callable[[], object]) -> object:
    try:
        return call()
    except Unavailable as e:
        return e.kind


@pytest.mark.parametrize(
    ("kind", "created", "put", "there_at_once", "there_later"),
    [
        ("throttled", Outcome.UNKNOWN, "throttled", False, False),
        ("lost", Outcome.UNKNOWN, "timeout", True, True),
        ("late", Outcome.UNKNOWN, "timeout", False, True),
    ],
)
def test_misbehaving_writes(
    sim: Simulation, kind: str, created: object, put: object, there_at_once: bool, there_later: bool
) -> None:
    s3 = SimulatedS3(sim, misbehaviour=Misbehaviour(**{kind: 1.0}, latest_s=1e6))
    store = s3.client("a")
    assert answer(lambda: store.create("c", b"")) is created
    assert answer(lambda: store.put("p", b"")) == put
    assert s3.injected == {kind: 2}
    if there_at_once:
        assert set(s3.objects) == {"c", "p"}
    sim.run_until(3e6)
    assert (set(s3.objects) == {"c", "p"}) is there_later


def test_a_late_effect_comes_after_the_writer_gave_up_and_can_undo_a_deletion(sim: Simulation) -> None:
    s3 = SimulatedS3(sim, misbehaviour=Misbehaviour(repeated=1.0, latest_s=1e5))
    store = s3.client("a")
    store.put("k", b"old")
    s3.misbehaviour = Misbehaviour()
    store.delete("k")
    assert "k" not in s3.objects
    sim.run_until(2e5)
    assert s3.objects == {"k": b"old"}


def test_a_create_repeated_late_replaces_nothing(sim: Simulation) -> None:
    s3 = SimulatedS3(sim, misbehaviour=Misbehaviour(repeated=1.0, latest_s=1e5))
    assert s3.client("a").create("k", b"first") is Outcome.WON
    s3.misbehaviour = Misbehaviour()
    s3.client("b").put("k", b"second")
    sim.run_until(2e5)
    assert s3.objects == {"k": b"second"}


def test_reads_are_throttled_and_their_answers_lost(sim: Simulation) -> None:
    s3 = SimulatedS3(sim, misbehaviour=Misbehaviour(throttled=0.5, lost=0.5))
    store = s3.client("a")
    got = {answer(lambda: store.get("k")) for _ in range(50)} | {
        answer(lambda: list(store.list("k"))) for _ in range(50)
    }
    assert got == {"throttled", "timeout"}


def test_the_share_of_requests_that_misbehave_is_as_asked(sim: Simulation) -> None:
    s3 = SimulatedS3(sim, misbehaviour=Misbehaviour(throttled=0.01, lost=0.01))
    store = s3.client("a")
    for _ in range(20_000):
        answer(lambda: store.put("k", b""))
    assert s3.injected["throttled"] == pytest.approx(200, abs=60)
    assert s3.injected["lost"] == pytest.approx(200, abs=60)


def test_one_seed_is_one_run_and_another_seed_another() -> None:
    def run(seed: int) -> list[tuple[float, str]]:
        seen: list[tuple[float, str]] = []
        with Simulation(seed) as sim:
            s3 = SimulatedS3(sim, misbehaviour=Misbehaviour(throttled=0.1, lost=0.1, late=0.1, repeated=0.1))

            def body(name: str) -> None:
                store = s3.client(name)
                for i in range(20):
                    got = answer(partial(store.create, f"{PREFIX}{i}", name.encode()))
                    seen.append((sim.clock(), f"{name} {i} {got}"))

            for name in "abc":
                sim.start(partial(body, name))
            sim.run_until(10_000.0)
        return seen

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_client_library_tries_again_but_never_a_create(sim: Simulation) -> None:
    s3 = SimulatedS3(sim, misbehaviour=Misbehaviour(throttled=0.3), attempts=3)
    store = s3.client("a")
    answers = []
    for _ in range(200):
        answers += [
            answer(lambda: store.put("k", b"")),
            answer(lambda: store.get("k")),
            answer(lambda: list(store.list("k"))),
        ]
        answer(lambda: store.create("c", b""))
    assert store.index.create == 200
    for n in (store.index.put, store.index.get, store.index.list):
        assert n == pytest.approx(200 * (1 + 0.3 + 0.09), rel=0.12)
    assert answers.count("throttled") == pytest.approx(600 * 0.3**3, abs=12)
