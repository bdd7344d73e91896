"""Who fetches and who waits: each that waits comes back once, and loads do not wait for prefetches."""

from __future__ import annotations

import random

import pytest

from lmcache_s3.in_flight import InFlight


def test_the_first_fetches_and_the_others_come_back_with_what_landed() -> None:
    flights: InFlight[str] = InFlight()
    assert flights.fetch_or_wait("a", 1, "a1", prefetch=False)
    assert not flights.fetch_or_wait("b", 1, "b1", prefetch=False)
    assert not flights.fetch_or_wait("c", 1, "c1", prefetch=True)
    assert flights.landed("b", 1, prefetch=False) == []
    assert flights.landed("a", 1, prefetch=False) == ["b1", "c1"]
    assert flights.landed("a", 1, prefetch=False) == []
    assert flights.fetch_or_wait("b", 1, "b1", prefetch=False)


def test_a_load_does_not_wait_for_a_prefetch() -> None:
    flights: InFlight[str] = InFlight()
    assert flights.fetch_or_wait("p", 1, "p1", prefetch=True)
    assert not flights.fetch_or_wait("q", 1, "q1", prefetch=True)
    assert not flights.for_loads([1])
    assert flights.fetch_or_wait("a", 1, "a1", prefetch=False)
    assert flights.for_loads([1])
    assert not flights.for_loads([1, 2])
    assert not flights.fetch_or_wait("r", 1, "r1", prefetch=True)
    assert flights.landed("p", 1, prefetch=True) == ["q1"]
    assert flights.landed("a", 1, prefetch=False) == ["r1"]


def test_who_gives_up_sets_all_free_who_wait_for_it() -> None:
    flights: InFlight[str] = InFlight()
    for cell in (3, 1, 2):
        assert flights.fetch_or_wait("a", cell, "", prefetch=False)
        assert not flights.fetch_or_wait("b", cell, f"b{cell}", prefetch=False)
    assert flights.landed("a", 1, prefetch=False) == ["b1"]
    assert flights.gave_up("a") == ["b3", "b2"]
    assert flights.gave_up("a") == []
    assert len(flights) == 0


@pytest.mark.parametrize("seed", range(20))
def test_whoever_waits_comes_back_once(seed: int) -> None:
    rng = random.Random(seed)
    flights: InFlight[int] = InFlight()
    fetching: dict[tuple[int, bool], int] = {}
    noted: list[int] = []
    back: list[int] = []
    for i in range(2000):
        owner, cell, prefetch = rng.randrange(5), rng.randrange(8), rng.random() < 0.4
        deed = rng.random()
        if deed < 0.6:
            ours = flights.fetch_or_wait(owner, cell, i, prefetch=prefetch)
            assert ours == ((cell, False) not in fetching and not (prefetch and (cell, True) in fetching))
            if ours:
                fetching[cell, prefetch] = owner
            else:
                noted.append(i)
        elif deed < 0.95:
            back += flights.landed(owner, cell, prefetch=prefetch)
            if fetching.get((cell, prefetch)) == owner:
                del fetching[cell, prefetch]
        else:
            back += flights.gave_up(owner)
            fetching = {key: who for key, who in fetching.items() if who != owner}
        assert len(flights) == len(fetching)
    for owner in range(5):
        back += flights.gave_up(owner)
    assert sorted(back) == noted
    assert len(flights) == 0
