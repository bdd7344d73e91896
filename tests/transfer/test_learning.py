"""What a transfer learns of a store: how many requests at once, how large, what a request costs, when to ask again."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_s3.concurrency import Concurrency, ladder
from lmcache_s3.errors import Invalid
from lmcache_s3.hedging import Hedging
from lmcache_s3.link import Link
from lmcache_s3.range_planning import Span, parts, spans

MIB = 1 << 20


def settle(concurrency: Concurrency, seconds_of: object, requests: int = 600) -> list[int]:
    """Levels over time in a store where a request of 1 MiB takes `seconds_of(level)`."""
    levels = []
    for _ in range(requests):
        level = concurrency.limit
        concurrency.done(MIB, seconds_of(level), level)  # type: ignore[operator]
        levels.append(level)
    return levels


def test_the_ladder_rises_to_the_limit() -> None:
    assert ladder(1) == [1]
    assert ladder(9) == [1, 2, 3, 4, 6, 8, 9]
    assert ladder(32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    with pytest.raises(Invalid):
        Concurrency(0)


def test_a_store_that_scales_gets_all_that_is_allowed() -> None:
    levels = settle(Concurrency(32), lambda _: 0.05)
    assert levels[0] == 4
    assert levels[-1] == 32
    assert levels.index(32) < 150


def test_a_full_link_gets_no_more_than_fills_it() -> None:
    # 10 ms of latency, then 200 MB/s shared by all: two requests fill it.
    levels = settle(Concurrency(32), lambda level: max(0.01 + MIB / 200e6, level * MIB / 200e6), 2000)
    late = levels[300:]
    assert max(late) <= 6
    assert min(late) >= 2


def test_a_link_that_becomes_wider_is_noticed() -> None:
    concurrency = Concurrency(16)
    settle(concurrency, lambda level: level * 0.01)
    assert concurrency.limit <= 3
    assert max(settle(concurrency, lambda _: 0.01, 1500)) == 16


def test_stragglers_and_idle_times_do_not_count() -> None:
    concurrency = Concurrency(32)
    for i in range(600):
        concurrency.done(MIB, 2.0 if i % 20 == 0 else 0.05, concurrency.limit)
    assert concurrency.limit == 32
    for _ in range(100):
        concurrency.done(MIB, 9.0, 3)
    assert concurrency.limit == 32


def test_a_store_that_throttles_is_spared_at_once() -> None:
    concurrency = Concurrency(32, start=16)
    concurrency.refused()
    assert concurrency.limit == 8
    for _ in range(9):
        concurrency.refused()
    assert concurrency.limit == 1


def test_a_request_that_takes_unusually_long_is_asked_again() -> None:
    hedging = Hedging()
    assert hedging.after_s(MIB) is None
    for i in range(100):
        hedging.answered(MIB, 0.01 if i % 50 else 2.0)
    after_s = hedging.after_s(MIB)
    assert after_s is not None
    assert 0.01 < after_s < 0.05
    assert hedging.after_s(64 * MIB) is None, "another size takes another time"


def test_second_requests_are_few() -> None:
    hedging = Hedging()
    allowed = 0
    for _ in range(2000):
        hedging.asked()
        allowed += hedging.may_ask_again()
    assert 100 <= allowed <= 105


@given(st.floats(0.001, 0.2), st.floats(10e6, 2e9))
def test_a_link_tells_latency_from_bandwidth(latency_s: float, bytes_per_s: float) -> None:
    link = Link()
    for i in range(60):
        n_bytes = (1 + i % 8) * MIB
        link.seen(n_bytes, latency_s + n_bytes / bytes_per_s)
    assert link.latency_s == pytest.approx(latency_s, rel=0.05, abs=1e-4)
    assert link.bytes_per_s == pytest.approx(bytes_per_s, rel=0.05)
    assert link.gap_bytes == pytest.approx(latency_s * bytes_per_s, rel=0.1, abs=2e5)


def test_requests_of_one_size_leave_the_latency_as_it_was() -> None:
    link = Link()
    before = link.latency_s
    for _ in range(50):
        link.seen(8 * MIB, 0.05)
    assert link.latency_s == before
    assert link.bytes_per_s == pytest.approx(8 * MIB / 0.04)


def test_a_load_is_cut_into_several_pieces_but_not_into_crumbs() -> None:
    link = Link()
    assert link.piece_bytes(80 * MIB, 16 * MIB) == 10 * MIB
    assert link.piece_bytes(8000 * MIB, 16 * MIB) == 16 * MIB
    assert link.piece_bytes(MIB, 16 * MIB) == 2 * MIB
    for i in range(60):
        link.seen(MIB + i % 8 * MIB, 0.5 + i % 8 * 0.01)
    assert link.piece_bytes(MIB, 32 * MIB) == pytest.approx(12 * MIB, rel=0.2)
    assert link.piece_bytes(MIB, 1) == 1


@st.composite
def places(draw: st.DrawFn) -> list[tuple[int, int]]:
    out, offset = [], draw(st.integers(0, 10))
    for length, gap in draw(st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0, 0, 0, 3, 30])), max_size=20)):
        out.append((offset, length))
        offset += length + gap
    return out


@given(places(), st.integers(1, 200), st.integers(0, 40))
def test_spans_hold_every_cell_once_and_keep_to_their_bounds(
    cells: list[tuple[int, int]], most_bytes: int, gap_bytes: int
) -> None:
    found = list(spans(cells, most_bytes=most_bytes, gap_bytes=gap_bytes)) if cells else []
    assert [i for span in found for i in range(span.first, span.stop)] == list(range(len(cells)))
    for span in found:
        inside = cells[span.first : span.stop]
        assert span.start == inside[0][0]
        assert span.start + span.n_bytes == sum(inside[-1])
        assert span.n_bytes <= most_bytes or len(inside) == 1
        assert all(b[0] - sum(a) <= gap_bytes for a, b in itertools.pairwise(inside))


def test_the_first_nine_of_sixteen_are_one_range() -> None:
    cells = [(i * 100, 100) for i in range(9)]
    assert list(spans(cells, most_bytes=10_000, gap_bytes=0)) == [Span(0, 9, 0, 900)]


@given(st.integers(1, 10_000), st.integers(1, 3_000))
def test_parts_cover_all_and_are_alike(n_bytes: int, most_bytes: int) -> None:
    found = parts(n_bytes, most_bytes)
    assert [i for part in found for i in part] == list(range(n_bytes))
    assert max(map(len, found)) <= most_bytes + most_bytes // 8 + 1
    assert max(map(len, found)) - min(map(len, found)) <= 1
