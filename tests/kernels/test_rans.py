"""The fast rANS coder against the readable one, bit for bit, and against streams that are not whole."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_s3.kernels import rans, rans_reference
from lmcache_s3.kernels.rans_tables import ESCAPE, SYMBOLS, TABLES, TOTAL, all_tables, frequencies, log2_fixed

TABLES_SHA256 = "a88eefab025e453010906f6070db17632fc98c75ee9bfa6350c6ca21f4a277f0"


def make(channels: int, tokens: int, seed: int) -> np.ndarray:
    """Symbols of channels of very different widths."""
    rng = np.random.default_rng(seed)
    q = np.rint(rng.standard_normal((channels, tokens)) * np.exp(2 * rng.standard_normal((channels, 1))))
    return np.where(np.abs(q) > 31, ESCAPE, q + 31).astype(np.uint8)


@settings(max_examples=15, deadline=None)
@given(channels=st.integers(1, 4), tokens=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_both_forms_give_the_same_bits(channels: int, tokens: int, seed: int) -> None:
    symbols = make(channels, tokens, seed)
    tables = rans.choose_tables(symbols)
    assert tables.tolist() == [rans_reference.choose_table(row.tolist()) for row in symbols]
    states, words = rans.encode(symbols, tables)
    assert (states.tolist(), words.tolist()) == rans_reference.encode(symbols.tolist(), tables.tolist())
    out = np.empty_like(symbols)
    assert rans.decode(states, words, tables, out)
    assert (out == symbols).all()
    assert rans_reference.decode(states.tolist(), words.tolist(), tables.tolist(), tokens) == symbols.tolist()


@settings(max_examples=60, deadline=None)
@given(tables=st.lists(st.integers(0, TABLES - 1), min_size=1, max_size=8), seed=st.integers(0, 2**32 - 1))
def test_every_symbol_in_every_table_survives(tables: list[int], seed: int) -> None:
    symbols = np.random.default_rng(seed).integers(0, SYMBOLS, (len(tables), 65), np.uint8)
    chosen = np.array(tables, np.uint8)
    states, words = rans.encode(symbols, chosen)
    out = np.empty_like(symbols)
    assert rans.decode(states, words, chosen, out)
    assert (out == symbols).all()


def test_it_comes_within_three_percent_of_the_entropy() -> None:
    rng = np.random.default_rng(0)
    q = np.clip(np.rint(rng.standard_normal((64, 4096)) * 2), -31, 31)
    symbols = (q + 31).astype(np.uint8)
    share = np.bincount(symbols.ravel(), minlength=SYMBOLS) / symbols.size
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    _, words = rans.encode(symbols, rans.choose_tables(symbols))
    assert entropy <= 16 * len(words) / symbols.size <= 1.03 * entropy


def test_tables_are_whole_and_known() -> None:
    frequency, start, slots, _ = all_tables()
    assert (frequency.sum(axis=1) == TOTAL).all()
    assert frequency.min() == 1
    assert frequency.max() < TOTAL, "a sure symbol would overflow the coder's state"
    for table in range(TABLES):
        row = frequency[table, : SYMBOLS - 1]
        assert (row == row[::-1]).all(), "a table favours no sign"
        assert (slots[table] == np.repeat(np.arange(SYMBOLS), frequency[table])).all()
        assert (start[table] == rans_reference.starts(frequencies(table))).all()
    # Part of the format: changing these makes stored cells unreadable.
    assert frequencies(0)[28:35] == [1, 1, 44, 3947, 44, 1, 1]
    assert frequencies(31)[29:34] == [134, 135, 169, 135, 134]
    assert hashlib.sha256(frequency.astype("<u2").tobytes()).hexdigest() == TABLES_SHA256


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4095, 4096])
def test_fixed_point_logarithm(n: int) -> None:
    assert log2_fixed(n) == int(np.floor(256 * np.log2(n)))


def test_a_changed_stream_is_refused_or_at_least_bounded() -> None:
    symbols = make(8, 64, 1)
    tables = rans.choose_tables(symbols)
    states, words = rans.encode(symbols, tables)
    out = np.empty_like(symbols)
    assert not rans.decode(states, words[:-1], tables, out)
    assert not rans.decode(states, np.append(words, np.uint16(0)), tables, out)
    assert not rans.decode(states[:-1], words, tables, out)
    assert not rans.decode(states, words, np.full_like(tables, TABLES), out)
    assert not rans.decode(states, words, tables[:-1], out)
    rng = np.random.default_rng(2)
    accepted = 0
    for _ in range(2000):
        changed = words.copy()
        changed[rng.integers(len(words))] ^= np.uint16(1 << rng.integers(16))
        if rans.decode(states, changed, tables, out):
            accepted += 1
            assert out.max() < SYMBOLS
    assert accepted < 20, "the end state shows nearly every changed word"
    for _ in range(500):
        noise = rng.integers(0, 2**32, 32, np.uint32)
        with pytest.raises(ValueError, match=r"stream|words"):
            rans_reference.decode(noise.tolist(), [], [0], 64)
        assert not rans.decode(noise, words[:0], tables[:1], out[:1])


def test_the_vector_of_the_format() -> None:
    """FORMAT.md, "Test vectors"."""
    symbols = np.array([[7 * i % 63 for i in range(64)]], np.uint8)
    states, words = rans.encode(symbols, np.array([24], np.uint8))
    assert len(words) == 32
    assert words[:6].tolist() == [0xCFD1, 0x0FEA, 0x0FF1, 0x0FF8, 0x0000, 0x0007]
    assert states[[0, 1, 2, 3, 31]].tolist() == [0x0006B000, 0x01000007, 0x0100000E, 0x01000015, 0x0001908D]
