"""The disk tier's journal: what was appended is read again; bytes that nobody wrote are passed over."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from lmcache_s3.testing.cells import make_cells
from lmcache_s3.tiers.journal import (
    Contents,
    Held,
    Place,
    can_hold,
    decode,
    encode_cell,
    encode_gone,
    encode_held,
    encode_used,
)
from lmcache_s3.tiers.places import parent_of, place_of
from lmcache_s3.types import CellRef, Grid


def some_cells(n: int, seed: int = 0) -> list[CellRef]:
    rng = random.Random(seed)
    cells = [
        cell for _ in range(n) for cell, _ in make_cells(rng, [rng.randrange(1, 300), 5], grid=Grid(2, 3), shard=4)
    ]
    codecs = ("fast", "lossless", "x" * 64)
    return [
        replace(cell, extent=replace(cell.extent, codec=rng.choice(codecs)), first_token=rng.randrange(1 << 40))
        for cell in cells
    ]


def placed(cells: list[CellRef]) -> list[tuple[CellRef, Place]]:
    return [(cell, Place(i + 3, 4096 * i, cell.length)) for i, cell in enumerate(cells)]


def held(cells: list[CellRef]) -> list[Held]:
    return [
        Held(i, i / 7, cell.extent.codec, encode_cell(cell, place), place)
        for i, (cell, place) in enumerate(placed(cells))
    ]


def ids(contents: Contents) -> list[int]:
    return list(contents.held)


def test_what_was_appended_is_read_again() -> None:
    cells = some_cells(1_500)
    contents = decode(encode_held(held(cells)))
    assert (ids(contents), contents.torn, contents.next_id) == (list(range(3_000)), False, 3_000)
    for i, cell in enumerate(cells):
        one, known = contents.held[i]
        assert (one.id, one.used_s, one.place) == (i, i / 7, (i + 3, 4096 * i, cell.length))
        assert known == (
            cell.extent,
            place_of(cell),
            parent_of(cell),
            cell.first_token,
            cell.position,
        )
    again = decode(encode_held([one for one, _ in contents.held.values()]))
    assert [known for _, known in again.held.values()] == [known for _, known in contents.held.values()]


def test_a_parent_that_is_not_known_stays_unknown() -> None:
    [cell] = [replace(cell, parent=b"") for cell in some_cells(1)[:1]]
    assert decode(encode_held(held([cell]))).held[0][1].parent is None


def test_uses_and_departures() -> None:
    frames = [encode_held(held(some_cells(5))), encode_used([1, 4, 99], 50.0), encode_gone([0, 4])]
    contents = decode(b"".join([*frames, encode_used([1, 2], 60.0), encode_gone([20])]))
    assert ids(contents) == [1, 2, 3, 5, 6, 7, 8, 9]
    assert [contents.held[i][0].used_s for i in (1, 2, 3)] == [60.0, 60.0, 3 / 7]
    assert contents.next_id == 21, "the number of what went is not given again"


def test_numbers_that_no_record_holds() -> None:
    [cell] = some_cells(1)[:1]
    assert can_hold(cell)
    for bad in (
        replace(cell, extent=replace(cell.extent, born=1 << 64)),
        replace(cell, first_token=1 << 64),
        replace(cell, length=1 << 32),
        replace(cell, prefix_hash=b"x" * 15),
    ):
        assert not can_hold(bad)


@given(st.binary(max_size=400), st.integers(0, 10), st.integers(0, 2**32))
def test_bytes_that_nobody_wrote_are_passed_over(junk: bytes, where: int, seed: int) -> None:
    frames = [encode_held(held(some_cells(2, seed))), encode_used([1], 5.0), encode_gone([2])]
    at = where % 4
    contents = decode(b"".join([*frames[:at], junk, *frames[at:]]))
    assert ids(contents) == [0, 1, 3]
    assert contents.torn == bool(junk)


@given(st.data())
def test_any_damage_leaves_a_subset(data: st.DataObject) -> None:
    cells = some_cells(3)
    good = decode(encode_held(held(cells))).held
    whole = b"".join(encode_held([one]) for one in held(cells))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    for id_, (_, known) in decode(bytes(damaged)).held.items():
        assert known == good[id_][1]
