"""States on shared tables: snapshots stay what they were while the table grows, is compacted, and is read by others."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from lmcache_s3.errors import Unusable
from lmcache_s3.index import manifest, table
from lmcache_s3.index.columns import AT_ROOT, NO_PARENT, columns_of
from lmcache_s3.index.manifest import (
    EMPTY,
    Delta,
    State,
    Verdict,
    apply,
    judged,
    unjudged,
)
from lmcache_s3.index.replica import Replica
from lmcache_s3.kernels import hash_build
from lmcache_s3.types import ExtentName, ExtentRecord, Grid

ULID = "01JDXB4Z5T8V6Q2W3E4R5T6Y7H"


def record(rng: random.Random, *, hashes: list[bytes] | None = None, parent: bytes = b"", n: int = 4) -> ExtentRecord:
    hashes = hashes or [rng.randbytes(16) for _ in range(n)]
    n = len(hashes)
    name = ExtentName(hashes[-1], n, "fast", 0, rng.randbytes(16).hex())
    joined = b"".join(hashes)
    first = 4 if parent else 0
    return ExtentRecord(name, Grid(), parent or bytes(16), first, joined, rng.randbytes(4 * n), rng.randbytes(8 * n), 1)


def add(state: State, *records: ExtentRecord) -> State:
    return apply(state, Delta(ULID, add=records))


def remove(state: State, *records: ExtentRecord) -> State:
    return apply(state, Delta(ULID, remove=tuple(one.name for one in records)))


def content(state: State) -> dict[bytes, list[ExtentRecord]]:
    return {h: [ref.extent for ref in refs] for h, refs in state.chunks.items()}


@pytest.mark.parametrize("spare", [0, 2**16])
def test_every_state_of_a_long_history_stays_what_it_was(spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Growth (many doublings) and compaction (spare 0: nearly at each removal) against a list of records."""
    monkeypatch.setattr(manifest, "_SPARE_ROWS", spare)
    rng = random.Random(spare)
    state, live, accessed = EMPTY, list[ExtentRecord](), dict[ExtentName, int]()
    kept: list[tuple[State, list[ExtentRecord], dict[ExtentName, int]]] = []
    for version in range(1, 120):
        fresh = [record(rng, n=rng.randrange(1, 9)) for _ in range(rng.randrange(4))]
        gone = rng.sample(live, min(len(live), rng.randrange(3)))
        hit = rng.sample(live, min(len(live), 1))
        names = tuple(one.name for one in gone)
        state = apply(state, Delta(ULID, add=tuple(fresh), remove=names, access=tuple(one.name for one in hit)))
        live = [one for one in live if one not in gone] + fresh
        accessed = accessed | {one.name: version for one in fresh + hit}
        if version % 10 == 0:
            kept.append((state, list(live), dict(accessed)))
    tables = {id(state.table) for state, _, _ in kept}
    assert (len(tables) > 1) == (spare == 0)
    for state, live, accessed in kept:
        assert [one.record for one in state.in_order()] == live
        assert [one.last_access for one in state.in_order()] == [accessed[one.name] for one in live]
        assert (state.n_extents, state.n_chunks) == (len(live), sum(one.n_chunks for one in live))
        for one in live:
            assert [ref.extent for ref in state.chunks[one.hashes[:16]]] == [one]


def test_two_futures_of_one_state() -> None:
    rng = random.Random(0)
    one, two, three = record(rng), record(rng), record(rng)
    start = add(EMPTY, one)
    left, right = add(start, two), add(remove(start, one), three)
    assert content(start) == {h: [one] for h in one.chunk_hashes()}
    assert [live.record for live in left.in_order()] == [one, two]
    assert [live.record for live in right.in_order()] == [three]
    assert left != right
    assert left == add(add(EMPTY, one), two)


def test_the_oldest_live_extent_answers() -> None:
    rng = random.Random(0)
    first = record(rng)
    second = record(rng, hashes=list(first.chunk_hashes()))
    both = add(add(EMPTY, first), second)
    replica = Replica()
    replica.publish(both)
    hashes = list(first.chunk_hashes())
    assert [ref.extent for ref in replica.match(hashes)] == [first] * 4
    replica.hide(first.name)
    assert [ref.extent for ref in replica.match(hashes)] == [second] * 4
    replica.show(first.name)
    matched = replica.match(hashes)
    replica.publish(remove(both, first))
    assert [ref.extent for ref in replica.match(hashes)] == [second] * 4
    assert [ref.extent for ref in matched] == [first] * 4, "found in an older state"
    assert [ref.position for ref in matched[1:3]] == [1, 2]
    assert list(columns_of(both).covered) == [False, True]
    assert judged(both, record(rng, hashes=hashes)) is Verdict.COVERED


def test_what_is_worth_a_version() -> None:
    rng = random.Random(0)
    there = record(rng)
    state = add(EMPTY, there)
    again = record(rng, hashes=list(there.chunk_hashes()))
    longer = record(rng, hashes=[*there.chunk_hashes(), rng.randbytes(16)])
    part = record(rng, hashes=[list(longer.chunk_hashes())[-1]])
    assert unjudged(state, [there, again, longer, part]) == (longer,)
    assert unjudged(state, [again], [there.name]) == (again,), "it replaces what goes"
    assert unjudged(add(state, again), [record(rng, hashes=list(there.chunk_hashes()))], [there.name]) == ()


def test_parents_and_roots() -> None:
    rng = random.Random(0)
    first = record(rng)
    child = record(rng, parent=first.name.last_hash)
    orphan = record(rng, parent=rng.randbytes(16))
    columns = columns_of(add(EMPTY, child, first, orphan))
    assert columns.parent_row.tolist() == [1, AT_ROOT, NO_PARENT]
    assert [columns.name(row) for row in range(3)] == [child.name, first.name, orphan.name]
    assert columns.root[1].tobytes() == first.parent
    assert columns.encoded_bytes[0] == child.encoded_bytes


def test_many_extents_of_one_hash_or_one_nonce() -> None:
    """Nobody honest does that; it must only stay right."""
    rng = random.Random(0)
    shared = rng.randbytes(16)
    records = [record(rng, hashes=[rng.randbytes(16), shared]) for _ in range(20)]
    same_nonce = [
        ExtentRecord(
            ExtentName(one.name.last_hash, 1, one.name.codec, i, "0" * 32), Grid(), bytes(16), 0, one.hashes[-16:],
            one.lengths[:4], one.sums[:8], 1,
        )
        for i, one in enumerate(records)
    ]  # fmt: skip
    state = add(EMPTY, *records, *same_nonce)
    assert [ref.extent for ref in state.chunks[shared]] == records + same_nonce
    assert all(state.extents[one.name].record == one for one in records + same_nonce)
    assert remove(state, records[0]).chunks[shared][0].extent == records[1]


@pytest.mark.parametrize("region_bits", [0, 1, 3, 16])
@pytest.mark.parametrize("rows_at_once", [7, 2**20])
@pytest.mark.parametrize("workers", [0, 4])
def test_rows_made_findable_at_once_are_those_inserted_one_by_one(
    region_bits: int, rows_at_once: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regions of a slot or a few, so that most rows overflow them; many rows of one hash, and of one home."""
    monkeypatch.setattr(hash_build, "REGION_BITS", region_bits)
    monkeypatch.setattr(table, "_ROWS_AT_ONCE", rows_at_once)
    rng = random.Random(region_bits)
    pool = [rng.randbytes(16) for _ in range(40)]
    pool += [pool[0][:8] + rng.randbytes(8) for _ in range(5)]
    state = EMPTY
    for _ in range(60):
        state = add(state, record(rng, hashes=rng.sample(pool, rng.randrange(1, 6))))
    state = remove(state, *[live.record for live in list(state.in_order())[::5]])
    slots = np.zeros_like(state.arrays.slots)
    fresh = replace(state, arrays=replace(state.arrays, slots=slots))
    monkeypatch.setattr(state.table, "arrays", fresh.arrays)
    with ThreadPoolExecutor(max(1, workers)) as executor:
        state.table.index_all(executor.map if workers else map)
    for one in pool:
        assert fresh.rows_of(one).tolist() == state.rows_of(one).tolist()
    assert (np.sort(slots) == np.sort(state.arrays.slots)).all()


@pytest.mark.parametrize("region_bits", [0, 16])
def test_a_hash_twice_in_an_extent_is_found_when_rows_are_made_findable(
    region_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_build, "REGION_BITS", region_bits)
    rng = random.Random(0)
    state = add(EMPTY, record(rng), record(rng))
    a = state.arrays
    a.rows.hashes[6] = a.rows.hashes[4]
    a.slots[:] = 0
    with pytest.raises(Unusable, match=f"{state.table.name(a, 1)}: a prefix hash occurs twice"):
        state.table.index_all()


def test_an_extent_that_holds_a_hash_twice_spoils_nothing() -> None:
    rng = random.Random(0)
    good = record(rng)
    state = add(EMPTY, good)
    twice = record(rng, hashes=[b"a" * 16, b"a" * 16])
    with pytest.raises(Unusable, match="twice"):
        add(state, twice)
    assert content(state) == {h: [good] for h in good.chunk_hashes()}
    other = record(rng)
    assert [live.record for live in add(state, other).in_order()] == [good, other]


def test_look_ups_while_versions_are_applied_see_whole_versions() -> None:
    """Each version replaces the one extent of a prompt by another: a look-up finds all of one, never a mixture."""
    rng = random.Random(0)
    hashes = [rng.randbytes(16) for _ in range(64)]
    replica, state, last = Replica(), EMPTY, None
    done, wrong, looked = threading.Event(), list[str](), [0]

    def look() -> None:
        while not done.is_set():
            version = replica.state.version
            found = {ref.extent.name for ref in replica.match(hashes)}
            looked[0] += 1
            if len(found) > 1 or (not found and version):
                wrong.append(f"{len(found)} extents")
            time.sleep(0.0001)  # a look-up in an endless loop would keep the GIL from the other thread

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for version in range(1, 400):
            fresh = record(rng, hashes=hashes)
            state = apply(state, Delta(ULID, add=(fresh,), remove=(last.name,) if last else ()))
            replica.publish(state)
            last = fresh
            assert state.version == version
    finally:
        done.set()
        thread.join()
    assert not wrong
    assert looked[0] > 20


def test_columns_of_nothing() -> None:
    columns = columns_of(EMPTY)
    assert len(columns) == 0
    assert columns.encoded_bytes.dtype == np.int64
