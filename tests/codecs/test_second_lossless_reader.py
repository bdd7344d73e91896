"""A second reader of `lossless` cells, written from FORMAT.md in pure Python: what it reads is what the codec reads."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pytest

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.testing.codec import DTYPES
from lmcache_s3.testing.extents import any_bits, random_bits
from lmcache_s3.types import KVDtype

EXPONENT_MANTISSA = ((8, 7), (5, 10), (8, 23), (4, 3), (5, 2))


def read_tables(data: bytes, at: int, count: int) -> tuple[list[list[int]], int]:
    flat: list[int] = []
    while len(flat) < 65 * count:
        if data[at] == 0:
            flat += [0] * data[at + 1]
        elif data[at] < 240:
            flat.append(data[at])
        else:
            flat.append((data[at] - 240) * 256 + data[at + 1])
        at += 1 if 0 < data[at] < 240 else 2
    tables = [flat[65 * t : 65 * t + 65] for t in range(count)]
    assert len(flat) == 65 * count
    assert all(sum(table) == 4096 and max(table) < 4096 for table in tables)
    return tables, at


class Stream:
    def __init__(self, states: list[int], words: list[int], tables: list[list[int]]) -> None:
        self.states, self.words = states, iter(words)
        self.slots = [[(s, f, i) for s, f in enumerate(table) for i in range(f)] for table in tables]

    def matrix(self, rows: int, tables: list[int]) -> list[list[int]]:
        n = len(tables)
        return [[self.symbol((row * n + c) % 64, table) for c, table in enumerate(tables)] for row in range(rows)]

    def symbol(self, lane: int, table: int) -> int:
        symbol, frequency, rest = self.slots[table][self.states[lane] % 4096]
        state = frequency * (self.states[lane] // 4096) + rest
        self.states[lane] = state if state >= 1 << 16 else state << 16 | next(self.words)
        return symbol


def raw_bits(data: bytes, count: int, bits: int) -> list[int]:
    numbers, at, first = [0] * count, 0, 0
    for field in (*[8] * (bits // 8), 4, 2, 1):
        if bits - first < field:
            continue
        m = -(-count * field // 8)
        for k in range(count):
            numbers[k] |= (data[at + k % m] >> (field * (k // m))) % (1 << field) << first
        at, first = at + m, first + field
    assert at == len(data)
    return numbers


def second_reader(cell: bytes, shape: tuple[int, int, int, int, int]) -> list[int]:
    """The cell's numbers as integers, in C order."""
    planes, tokens, columns = shape[0] * shape[1], shape[2], shape[3] * shape[4]
    data = cell[56:]
    version, mode, dtype, count, n_words, n_escapes = struct.unpack_from("<BBBBII", data)
    assert version == 1
    exponent, mantissa = EXPONENT_MANTISSA[dtype - 1]
    width = (1 + exponent + mantissa) // 8
    if mode == 0:
        return [int.from_bytes(data[i : i + width], "little") for i in range(12, len(data), width)]
    tables, at = read_tables(data, 12, count)
    plane_bases = data[at : at + planes]
    states = list(struct.unpack_from("<64I", data, at + planes))
    words = list(struct.unpack_from(f"<{n_words}H", data, at := at + planes + 256))
    escapes: Iterator[int] = iter(struct.unpack_from(f"<{n_escapes}H", data, at := at + 2 * n_words))
    at += 2 * n_escapes
    stream = Stream(states, words, tables)
    chosen = stream.matrix(planes, [count - 2] * columns)
    distances = stream.matrix(planes, [count - 1] * columns)
    size, out = (len(data) - at) // planes, []
    for plane in range(planes):
        symbols = [s for row in stream.matrix(tokens, chosen[plane]) for s in row]
        raw = raw_bits(data[at + plane * size : at + (plane + 1) * size], tokens * columns, mantissa - 1)
        for i, symbol in enumerate(symbols):
            base = plane_bases[plane] + distances[plane][i % columns]
            upper = (symbol // 32 << (exponent + 1)) + base * 2 + symbol % 32 if symbol < 64 else next(escapes)
            out.append((upper << (mantissa - 1)) + raw[i])
    assert stream.states == [1 << 16] * 64
    assert [*stream.words, *escapes] == []
    return out


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 40, 2, 16), (1, 2, 33, 1, 70), (2, 1, 2, 1, 1)], ids=str)
def test_it_reads_what_the_codec_reads(shape: tuple[int, int, int, int, int], kv_dtype: KVDtype) -> None:
    bits = random_bits(shape, kv_dtype, np.random.default_rng(0))
    bits[:, :, -1] = any_bits((*shape[:2], *shape[3:]), kv_dtype, np.random.default_rng(1))
    data = make_codec("lossless").encode(bits, CellSpec(shape, kv_dtype), CellPosition(bytes(16), 0, 0, 0))
    whole = bits.view(f"u{bits.itemsize}").reshape(-1).tolist()
    assert second_reader(data, shape) == whole
    assert data[57] == (shape[2] > 2), "small cells are raw"
