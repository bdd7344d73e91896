"""A second reader of `cachegen` cells, written from FORMAT.md with nothing but struct, NumPy and ml_dtypes.

What it reads must be what the codec reads: the document describes the bytes.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.testing.extents import random_bits
from lmcache_s3.types import KVDtype

TRUE = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, dtype: str, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        array = np.frombuffer(self.data, dtype, count, self.at).reshape(shape)
        self.at += array.nbytes
        return array


def ratios(name: str) -> list[int]:
    """The format's own lists."""
    text = (Path(__file__).parents[2] / "FORMAT.md").read_text().split("### 7.1")[1]
    found = re.search(rf"^{name} +([\d\s]+)", text, re.MULTILINE)
    assert found
    return [int(number) for number in found[1].split()]


def table_of(number: int) -> tuple[int, list[tuple[tuple[int, ...], int]]]:
    """(values a symbol, [(values, frequency)])."""
    family, width = divmod(number, 37)
    reach = 16 if width < 24 else 127

    def p(name: str, square: bool) -> list[int]:
        r = ratios(name)[width]
        w, d = [2**30], 2**14 * r
        for _ in range(reach):
            w.append(w[-1] * d // 2**30)
            d = d * r * r // 2**32 if square else d
        return [2**24 * x // (w[0] + 2 * sum(w[1:])) for x in w]

    g, e = p("gaussian", True), p("geometric", False)
    chosen = [g, [(x + y) // 2 for x, y in zip(g, e, strict=True)], e][family]
    span = range(-reach, reach + 1)
    weight: dict[tuple[int, ...], int]
    if width < 24:
        unit, weight = 2**36, {(a, b): chosen[abs(a)] * chosen[abs(b)] for a in span for b in span}
    else:
        unit, weight = 2**12, {(a,): chosen[abs(a)] for a in span}
    f: dict[tuple[int, ...], int] = {v: (x + unit // 2) // unit for v, x in weight.items() if x + unit // 2 >= unit}
    escape = max(1, (4096 * unit - sum(weight[v] for v in f) + unit // 2) // unit)
    f[(0, 0)[: 2 if width < 24 else 1]] += 4096 - escape - sum(f.values())
    return 2 if width < 24 else 1, [((), escape), *f.items()]


class Stream:
    def __init__(self, states: list[int], words: list[int], escapes: list[int]) -> None:
        self.states, self.words, self.escapes = states, iter(words), iter(escapes)

    def run(self, number: int, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        width, symbols = table_of(number)
        slots = [(v, f, i) for v, f in symbols for i in range(f)]
        values: list[int] = []
        for i in range(-(-count // width)):
            state = self.states[i % 32]
            these, f, offset = slots[state % 4096]
            state = f * (state // 4096) + offset
            self.states[i % 32] = state if state >= 2**16 else state * 2**16 + next(self.words)
            values += these or [next(self.escapes) for _ in range(width)]
        return np.array(values[:count]).reshape(shape)


def second_reader(cell: bytes, shape: tuple[int, int, int, int, int], kv_dtype: str) -> np.ndarray:
    kv, layers, tokens, heads, channels = shape
    true = np.dtype(TRUE[kv_dtype])
    payload = Reader(cell[56:])
    version, mode, exact, dtype, n_words, n_escapes = struct.unpack_from("<BBBBII", payload.data)
    payload.at = 12
    assert (version, dtype) == (1, 1 + ["bfloat16", "float16", "float32", "float8_e4m3fn"].index(kv_dtype))
    if mode == 0:
        return payload.take(f"u{true.itemsize}", *shape).view(true)
    coded, rows = tokens - exact, kv * layers
    out = np.empty(shape, true)
    out[:, :, :exact] = payload.take(f"u{true.itemsize}", kv, layers, exact, heads, channels).view(true)
    word_counts, escape_counts = payload.take("<u4", rows), payload.take("<u4", rows)
    bases, tables, states = payload.take("<u2", rows), payload.take("u1", rows, 3), payload.take("<u4", rows, 32)
    words = np.split(payload.take("<u2", n_words), np.cumsum(word_counts))
    escapes = np.split(payload.take("i1", n_escapes), np.cumsum(escape_counts))
    assert payload.at == len(payload.data)
    largest = np.float32(ml_dtypes.finfo(true).max)  # type: ignore[no-untyped-call]
    n = channels & -channels
    for row in range(rows):
        plane, layer = divmod(row, layers)
        stream = Stream(states[row].tolist(), words[row].tolist(), escapes[row].tolist())
        code = stream.run(tables[row, 0], *((coded, heads, 1) if plane else (heads, channels)))
        step = ((code + bases[row]) << 21).astype(np.uint32).view(np.float32)
        mean = 0 if plane else stream.run(tables[row, 1], heads, channels) / 2
        y = (stream.run(tables[row, 2], coded, heads, channels) + mean).astype(np.float32) * step
        h = n // 2
        while h:
            y = y.reshape(-1, 2, h)
            y = np.stack((y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]), axis=1)
            h //= 2
        out[plane, layer, exact:] = np.clip(y, -largest, largest).astype(true).reshape(coded, heads, channels)
        assert set(stream.states) == {2**16}
        assert not [*stream.words, *stream.escapes]
    return out


@pytest.mark.parametrize("first_token", [0, 64])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(2, 3, 40, 2, 8), (1, 2, 33, 1, 12), (2, 1, 2, 1, 1)], ids=str)
def test_it_reads_what_the_codec_reads(
    shape: tuple[int, int, int, int, int], kv_dtype: KVDtype, first_token: int
) -> None:
    codec, spec, position = (
        make_codec("cachegen"),
        CellSpec(shape, kv_dtype),
        CellPosition(bytes(16), first_token, 0, 0),
    )
    bits = random_bits(shape, kv_dtype, np.random.default_rng(0))
    bits[:, :, -1, :, -1] = random_bits((*shape[:2], shape[3]), "float32", np.random.default_rng(1)).astype(bits.dtype)
    data = codec.encode(bits, spec, position)
    out = np.empty_like(bits)
    codec.decode(data, spec, position, out)
    assert second_reader(data, shape, kv_dtype).tobytes() == out.tobytes()
