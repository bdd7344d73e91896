"""The fast coder of columns against the readable one, bit for bit, and against streams that are not whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_s3.kernels import column_rans as fast
from lmcache_s3.kernels import column_rans_reference as reference
from lmcache_s3.kernels.column_tables import assign, assign_reference, costs, make_tables


def encoded(matrices: list[np.ndarray], chosen: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    states, words = (
        np.full(fast.LANES, fast.IDLE, np.uint32),
        np.zeros(sum(m.size for m in matrices) + fast.LANES, np.uint16),
    )
    place, tables = len(words), fast.encoding_tables(frequencies)
    for matrix in reversed(matrices):
        place = fast.encode(matrix, chosen, tables, states, words, place)
    return states, words[place:]


def decoded(
    states: np.ndarray, words: np.ndarray, chosen: np.ndarray, frequencies: np.ndarray, shapes: list[tuple[int, int]]
) -> list[np.ndarray] | None:
    states, place, out = states.copy(), 0, []
    padded = np.concatenate((words, np.zeros(fast.LANES, np.uint16)))
    for shape in shapes:
        out.append(np.empty(shape, np.uint8))
        place = fast.decode(states, padded, place, chosen, fast.decoding_tables(frequencies), out[-1])
        if place < 0:
            return None
    return out if place == len(words) and (states == fast.IDLE).all() else None


def made(rows: int, columns: int, seed: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Two matrices, tables of very different kinds, and one of them for each column."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((5, 65), np.int64)
    for table in range(5):
        counts[table, rng.integers(0, 65, rng.integers(1, 65))] = rng.integers(1, 10 ** rng.integers(1, 7))
    frequencies = fast.normalised(counts)
    chosen = rng.integers(0, 5, columns).astype(np.uint8)
    matrices = [
        np.stack([rng.choice(np.flatnonzero(frequencies[table]), rows) for table in chosen], axis=1).astype(np.uint8)
        for _ in range(2)
    ]
    return matrices, chosen, frequencies


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_both_forms_give_the_same_bits(rows: int, columns: int, seed: int) -> None:
    matrices, chosen, frequencies = made(rows, columns, seed)
    states, words = encoded(matrices, chosen, frequencies)
    writer = reference.Writer()
    for matrix in reversed(matrices):
        writer.put(matrix.tolist(), chosen.tolist(), frequencies.tolist())
    assert (states.tolist(), words.tolist()) == (writer.states, writer.words[::-1])
    back = decoded(states, words, chosen, frequencies, [(rows, columns)] * 2)
    assert back is not None
    assert [m.tolist() for m in back] == [m.tolist() for m in matrices]
    reader = reference.Reader(states.tolist(), words.tolist())
    for matrix in matrices:
        assert reader.take(rows, chosen.tolist(), frequencies.tolist()) == matrix.tolist()
    reader.finish()


def test_a_changed_stream_is_refused_or_at_least_bounded() -> None:
    matrices, chosen, frequencies = made(40, 50, 1)
    shapes = [(40, 50)] * 2
    states, words = encoded(matrices, chosen, frequencies)
    assert decoded(states, words[:-1], chosen, frequencies, shapes) is None
    assert decoded(states, np.append(words, np.uint16(0)), chosen, frequencies, shapes) is None
    assert decoded(states, words[:0], chosen, frequencies, shapes) is None
    rng = np.random.default_rng(2)
    for _ in range(500):
        noise = rng.integers(0, 2**32, fast.LANES, np.uint32)
        assert decoded(noise, words[: rng.integers(len(words))], chosen, frequencies, shapes) is None
    reader = reference.Reader(states.tolist(), [])
    with pytest.raises(ValueError, match="words"):
        reader.take(40, chosen.tolist(), frequencies.tolist())
    with pytest.raises(ValueError, match="stream"):
        reference.Reader(states.tolist(), words.tolist()).finish()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**33), min_size=2, max_size=65))
def test_normalised_frequencies_can_code_what_was_counted(counts: list[int]) -> None:
    (frequencies,) = fast.normalised(np.array([counts]))
    assert frequencies.sum(dtype=int) == fast.TOTAL
    assert frequencies.max() < fast.TOTAL
    assert all(f > 0 for f, n in zip(frequencies, counts, strict=True) if n)


def test_columns_get_the_cheapest_table() -> None:
    rng = np.random.default_rng(3)
    counts = rng.poisson(np.exp(3 * rng.standard_normal((200, 65)))).astype(np.uint32)
    frequencies = make_tables(counts, np.arange(200) % 9, 7)
    assert len(frequencies) <= 7
    cost = costs(frequencies)
    ours, theirs = np.zeros(frequencies.shape, np.int64), np.zeros(frequencies.shape, np.int64)
    chosen, expected = np.empty(200, np.uint8), np.empty(200, np.uint8)
    assign(counts, cost, ours, chosen)
    assign_reference(counts, cost, theirs, expected)
    assert (chosen == expected).all()
    assert (ours == theirs).all()
