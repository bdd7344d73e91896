"""The fused passes over rows against the readable ones, bit for bit, and against streams that are not whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_s3.kernels import cachegen_reference as reference
from lmcache_s3.kernels import cachegen_rows
from lmcache_s3.kernels.cachegen_rows import NOT_WHOLE, WHOLE, Rows
from lmcache_s3.kernels.rans_reference import Stream


def cell_of(shape: tuple[int, ...], seed: int, exponent: int = 0) -> np.ndarray:
    """Heavy-tailed values with offsets, some channels constant."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, shape) * np.exp(rng.standard_normal((*shape[:2], 1, *shape[3:]))) + rng.standard_normal(
        shape[3:]
    )
    values[..., 0] = rng.standard_normal()
    return np.asarray(np.clip(values * 10.0**exponent, -3e38, 3e38), np.float32)


def encoded(cell: np.ndarray, step: float) -> Rows | None:
    rows = cachegen_rows.room_for_rows(cell.shape[0] * cell.shape[1], cell.size * 2 + 64, cell.size * 4 + 64)
    wanted = np.full(len(rows.bases), step)
    return rows if cachegen_rows.encode(rows, wanted, cell, "float32") else None


def one(rows: Rows, row: int) -> reference.Row:
    words = rows.words[rows.word_ends[row] : rows.word_ends[row + 1]].tolist()
    escapes = rows.escapes[rows.escape_ends[row] : rows.escape_ends[row + 1]].tolist()
    a, b, c = rows.chosen[row].tolist()
    return reference.Row(int(rows.bases[row]), (a, b, c), Stream(rows.states[row].tolist(), words, escapes))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 2), st.integers(1, 2), st.integers(1, 30), st.integers(1, 3), st.sampled_from([1, 3, 8, 12, 32])
    ),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.sampled_from([-44, -20, 0, 5, 20, 38]),
    step=st.sampled_from([0.05, 0.4, 0.8, 1.9]),
)
def test_both_forms_give_the_same_bits(
    shape: tuple[int, int, int, int, int], seed: int, exponent: int, step: float
) -> None:
    cell = cell_of(shape, seed, exponent)
    rows = encoded(cell, step)
    slow = [
        reference.encode_row(cell[row // shape[1], row % shape[1]], step, per_token=row >= shape[1])
        for row in range(shape[0] * shape[1])
    ]
    if rows is None:
        assert None in slow
        return
    assert [one(rows, row) for row in range(len(slow))] == slow
    out = np.empty_like(cell)
    assert cachegen_rows.decode(rows, range(len(slow)), shape[1], out, "float32") == WHOLE
    for row, expected in enumerate(slow):
        assert expected is not None
        plane, layer = divmod(row, shape[1])
        wanted = reference.decode_row(expected, shape[2:], per_token=plane == 1)
        assert out[plane, layer].tobytes() == wanted.tobytes()


@pytest.mark.parametrize("at", ["words", "escapes"])
def test_a_stream_that_was_cut_or_lengthened_is_refused(at: str) -> None:
    cell = cell_of((1, 1, 64, 1, 32), 1)
    rows = encoded(cell, 0.8)
    assert rows is not None
    out = np.empty_like(cell)
    for change in (-1, 1):
        ends = getattr(rows, f"{at[:-1]}_ends").copy() if at == "words" else rows.escape_ends.copy()
        ends[1] += change
        changed = rows._replace(word_ends=ends) if at == "words" else rows._replace(escape_ends=ends)
        if at == "escapes" and change < 0 and ends[1] < 0:
            continue
        assert cachegen_rows.decode(changed, range(1), 1, out, "float32") == NOT_WHOLE


def test_changed_words_are_refused_or_bounded() -> None:
    cell = cell_of((1, 1, 64, 1, 32), 2)
    rows = encoded(cell, 0.8)
    assert rows is not None
    out = np.empty_like(cell)
    rng = np.random.default_rng(3)
    accepted = 0
    for _ in range(1000):
        words = rows.words.copy()
        words[rng.integers(rows.word_ends[1])] ^= np.uint16(1 << rng.integers(16))
        accepted += cachegen_rows.decode(rows._replace(words=words), range(1), 1, out, "float32") == WHOLE
    assert accepted < 10, "the end state shows nearly every changed word"
