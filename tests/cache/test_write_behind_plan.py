"""The plan of write-behind: what goes up together, and when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmcache_s3.write_behind import Run, WriteBehind


def h(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def plan(**changes: float) -> WriteBehind:
    values = {"extent_bytes": 40, "age_s": 10.0, "max_bytes": 1000} | changes
    return WriteBehind(
        extent_bytes=int(values["extent_bytes"]), age_s=values["age_s"], max_bytes=int(values["max_bytes"])
    )


def test_turns_of_a_chat_go_up_together_when_the_first_is_old() -> None:
    behind = plan()
    behind.add(h(0)[0], h(1), 10, 0.0)
    behind.add(h(1)[0], h(2, 3), 20, 6.0)
    assert behind.due(9.9) == []
    assert behind.next_due_s == 10.0
    assert behind.due(10.0) == [Run(h(0)[0], h(1, 2, 3), 30, 0.0)]
    assert not behind.due(99.0)
    assert behind.n_bytes == 0
    assert behind.next_due_s is None


def test_what_is_nearly_old_enough_goes_along() -> None:
    behind = plan()
    behind.add(h(0)[0], h(1), 10, 0.0)
    behind.add(h(10)[0], h(11), 10, 2.5)
    behind.add(h(20)[0], h(21), 10, 2.6)
    assert behind.due(9.9) == []
    assert [run.hashes for run in behind.due(10.0)] == [h(1), h(11)]
    assert behind.next_due_s == 12.6


def test_an_extents_worth_goes_at_once_and_what_is_left_waits() -> None:
    behind = plan()
    behind.add(h(0)[0], h(1, 2, 3), 30, 0.0)
    behind.add(h(3)[0], h(4, 5), 20, 1.0)
    assert behind.due(1.0) == [Run(h(0)[0], h(1, 2, 3, 4), 40, 0.0)]
    assert behind.flush() == [Run(h(4)[0], h(5), 10, 1.0)]


def test_chunks_larger_than_an_extent_go_one_by_one() -> None:
    behind = plan(extent_bytes=5)
    behind.add(h(0)[0], h(1, 2), 20, 0.0)
    assert behind.due(0.0) == [Run(h(0)[0], h(1), 10, 0.0), Run(h(1)[0], h(2), 10, 0.0)]


def test_a_branch_is_a_run_of_its_own() -> None:
    behind = plan()
    behind.add(h(0)[0], h(1, 2), 20, 0.0)
    behind.add(h(1)[0], h(7), 10, 1.0)
    behind.add(h(7)[0], h(8), 10, 2.0)
    assert behind.flush() == [Run(h(0)[0], h(1, 2), 20, 0.0), Run(h(1)[0], h(7, 8), 20, 1.0)]


def test_under_pressure_the_oldest_goes_first() -> None:
    behind = plan(max_bytes=25)
    for i in range(3):
        behind.add(h(10 * i)[0], h(10 * i + 1), 10, float(i))
    assert [run.hashes for run in behind.due(3.0)] == [h(1)]
    assert behind.n_bytes == 20


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9), st.floats(0, 5)), max_size=40),
    st.integers(1, 5),
    st.integers(1, 200),
)
def test_each_chunk_goes_up_once_in_order_and_in_time(
    turns: list[tuple[int, int, float]], extent_chunks: int, max_bytes: int
) -> None:
    behind = WriteBehind(extent_bytes=10 * extent_chunks, age_s=10.0, max_bytes=max_bytes)
    now, number = 0.0, 100
    tails = dict.fromkeys(range(7), h(0)[0])
    came: dict[bytes, float] = {}
    chain: dict[bytes, bytes] = {}
    gone: list[Run] = []
    for chat, n, pause in turns:
        now += pause
        hashes = h(*range(number, number + n))
        number += n
        for parent, one in zip([tails[chat], *hashes], hashes, strict=False):
            chain[one] = parent
        came |= dict.fromkeys(hashes, now)
        behind.add(tails[chat], hashes, 10 * n, now)
        tails[chat] = hashes[-1]
        due = behind.due(now)
        assert behind.n_bytes <= max_bytes
        gone += due
        up = {one for run in gone for one in run.hashes}
        assert all(now - when < 10.0 for one, when in came.items() if one not in up)
    gone += behind.flush()
    assert sorted(one for run in gone for one in run.hashes) == sorted(came)
    assert sum(run.n_bytes for run in gone) == 10 * len(came)
    for run in gone:
        assert 0 < len(run.hashes) <= extent_chunks
        for parent, one in zip([run.parent, *run.hashes], run.hashes, strict=False):
            assert chain[one] == parent
