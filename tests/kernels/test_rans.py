"""The static tables, and the readable coder. (`test_cachegen_rows.py` compares the fast one with it.)"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from lmcache_s3.kernels import rans_reference as rans
from lmcache_s3.kernels.rans_tables import TABLES, TOTAL, all_tables, codes_pairs, log2_fixed, symbols_of

TABLES_SHA256 = "f4bc9a687b80f08631a056368c08ce25cecef1d70e2324212f2aab5f3ee34f2b"


def test_tables_are_whole_and_known() -> None:
    summary = hashlib.sha256()
    for table in range(TABLES):
        values, frequencies = symbols_of(table)
        assert sum(frequencies) == TOTAL
        assert min(frequencies) >= 1
        assert len(values) == len(frequencies) <= 256
        assert max(frequencies) < TOTAL, "a sure symbol would overflow the coder's state"
        by_value = dict(zip(values, frequencies, strict=True))
        assert all(by_value[tuple(-v for v in these)] == n for these, n in by_value.items()), "no sign is favoured"
        summary.update(repr((values, frequencies)).encode())
    # Part of the format: changing these makes stored cells unreadable.
    assert summary.hexdigest() == TABLES_SHA256


def test_the_kernels_tables_are_these() -> None:
    tables = all_tables()
    for table in (0, 20, 23, 24, 40, TABLES - 1):
        values, frequencies = symbols_of(table)
        assert tables.pairs[table] == codes_pairs(table)
        assert (tables.slots[table] >> 24).tolist() == [s for s, n in enumerate(frequencies) for _ in range(n)]
        assert tables.starts[table, : len(values)].tolist() == rans.starts(frequencies)
        for symbol, these in enumerate(values[1:], 1):
            packed = sum((v & 0xFF) << (8 * i) for i, v in enumerate(these))
            assert tables.values[table, symbol] == packed
    f = tables.frequencies.astype(object)
    assert (tables.reciprocals.astype(object) * f >= 2**44).all()
    assert ((tables.reciprocals.astype(object) - 1) * f < 2**44).all()


@pytest.mark.parametrize("table", [0, 18, 30, 55, 110])
def test_every_value_in_every_table_survives(table: int) -> None:
    values = np.random.default_rng(table).integers(-127, 128, 65).tolist()
    stream = rans.encode([(values, table), (values[:7], 3)])
    decoder = rans.Decoder(stream)
    assert decoder.run(table, 65) == values
    assert decoder.run(3, 7) == values[:7]
    decoder.finish()
    with pytest.raises(ValueError, match="end"):
        rans.Decoder(stream).finish()


def test_it_comes_within_two_percent_of_the_entropy() -> None:
    rng = np.random.default_rng(0)
    values = np.rint(rng.standard_normal(8192) * 1.25).astype(int)
    share = np.unique(values, return_counts=True)[1] / values.size
    entropy = -(share * np.log2(share)).sum()
    stream = rans.encode([(values.tolist(), rans.choose_table(np.abs(values).tolist()))])
    assert entropy <= (16 * len(stream.words) + 8 * len(stream.escapes)) / values.size + 8 * 32 / values.size
    assert 16 * len(stream.words) + 8 * len(stream.escapes) <= 1.02 * entropy * values.size


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4095, 4096])
def test_fixed_point_logarithm(n: int) -> None:
    assert log2_fixed(n) == int(np.floor(256 * np.log2(n)))


def test_the_vector_of_the_format() -> None:
    """FORMAT.md, "Test vectors"."""
    stream = rans.encode([([7 * i % 11 - 5 for i in range(128)], 20)])
    assert stream.escapes == []
    assert len(stream.words) == 27
    assert stream.words[:6] == [0x0F5A, 0x0008, 0x0288, 0x1FED, 0x0029, 0x0289]
    assert [stream.states[i] for i in (0, 1, 2, 3, 31)] == [0x00080008, 0x01000288, 0x00080A1E, 0xE3A03FE9, 0x001C75F0]
