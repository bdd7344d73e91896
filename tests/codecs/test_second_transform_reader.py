"""A second reader of `transform` cells, written from FORMAT.md in Python and NumPy, reads what the codec reads."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.testing.calibrations import made_calibration
from lmcache_s3.testing.extents import random_bits
from lmcache_s3.types import KVDtype
from tests.codecs.test_second_reader import Reader, Stream

DTYPES: tuple[KVDtype, ...] = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")
TRUE = (ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I16": "<i2", "U8": "u1"}


def read_file(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    described = json.loads(header.pop("__metadata__")["lmcache_s3"])
    tensors = {}
    for name, one in header.items():
        begin, end = one["data_offsets"]
        tensors[name] = np.frombuffer(data[8 + length + begin : 8 + length + end], KINDS[one["dtype"]])
        tensors[name] = tensors[name].reshape(one["shape"])
    return described, tensors


def series(square: float, denominators: range) -> float:
    total, sign = 0.0, -1.0 if len(denominators) % 2 else 1.0
    for n in reversed(denominators):
        total = total * square + sign / math.factorial(n)
        sign = -sign
    return total * square


def cosine_and_sine(turns: float, position: int) -> tuple[np.float32, np.float32]:
    turn = turns * position
    turn -= round(turn)
    quarters = round(turn * 4)
    angle = (turn - quarters * 0.25) * 6.283185307179586
    square = angle * angle
    sine = angle + angle * series(square, range(3, 14, 2))
    cosine = 1 + series(square, range(2, 15, 2))
    quadrants = ((cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine))
    return np.float32(quadrants[quarters % 4][0]), np.float32(quadrants[quarters % 4][1])


def count(payload: Reader) -> int:
    number, shift = 0, 0
    while True:
        byte = int(payload.take("u1", 1)[0])
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number


def second_reader(cell: bytes, shape: tuple[int, ...], file: bytes) -> np.ndarray:
    tokens, channels = shape[2], shape[4]
    first_token, first_layer, layers, first_head, heads = struct.unpack_from("<QHHHH", cell, 28)
    payload = Reader(cell[56:])
    version, mode, dtype, level, _, listed, n_words, n_escapes = struct.unpack_from("<BBBB32sIII", payload.data)
    payload.at = 48
    true = np.dtype(TRUE[dtype - 1])
    assert version == 1
    if mode == 0:
        return payload.take(f"u{true.itemsize}", *shape).view(true)
    said, tensors = read_file(file)
    name, step = said["levels"][level]["name"], np.float32(said["levels"][level]["step"])
    units = [
        (i, unit)
        for i, unit in enumerate(said["units"])
        if 0 <= unit["first_layer"] - first_layer < layers and 0 <= unit["first_head"] - first_head < heads
    ]
    exact = {(u, 0) for u in range(len(units)) if first_token == 0}
    exact |= {(int(one) >> 16, int(one) & 0xFFFF) for one in payload.take("<u4", listed)}
    bits = {}
    for u, token in sorted(exact):
        unit = units[u][1]
        of_unit = (len(unit["planes"]), unit["layers"], unit["heads"], channels)
        bits[u, token] = payload.take(f"u{true.itemsize}", *of_unit).view(true)
    opened, total = [], 0
    for _, unit in units:
        opened.append(unit["streams"] or int(total == 0))
        total += opened[-1]
    counts = [(count(payload), count(payload)) for _ in range(total)]
    states = payload.take("<u4", total, 32)
    words = np.split(payload.take("<u2", n_words), np.cumsum([one[0] for one in counts]))
    escapes = np.split(payload.take("i1", n_escapes), np.cumsum([one[1] for one in counts]))
    assert payload.at == len(payload.data)
    streams = [Stream(states[s].tolist(), words[s].tolist(), escapes[s].tolist()) for s in range(total)]
    out = np.empty(shape, true)
    largest = np.float32(ml_dtypes.finfo(true).max)  # type: ignore[no-untyped-call]
    following = 0
    for u, (i, unit) in enumerate(units):
        coded = [token for token in range(tokens) if (u, token) not in exact]
        n, first = (opened[u], following) if opened[u] else (1, following - 1)
        following += opened[u]
        tables = tensors[f"{i}.{name}.tables"]
        q = np.zeros((len(tables), len(coded)), np.int64)
        for s in range(n):
            for r in range(s, len(tables), n):
                q[r] = streams[first + s].run(tables[r], len(coded))
        sums = (tensors[f"{i}.inverse"][:, : len(tables)].astype(np.int64) @ q).astype(np.float32)
        y = sums.T * (tensors[f"{i}.inverse_scale"] * step) + tensors[f"{i}.mean"]
        y = y.reshape(len(coded), len(unit["planes"]), unit["layers"], unit["heads"], channels)
        half = said["rotary"] // 2
        for t, token in enumerate(coded if unit["planes"][0] == 0 else []):
            for j in range(half):
                c, s_ = cosine_and_sine(float(tensors["turns"][j]), first_token + token)
                a, b = y[t, 0, ..., j].copy(), y[t, 0, ..., j + half].copy()
                y[t, 0, ..., j], y[t, 0, ..., j + half] = a * c - b * s_, b * c + a * s_
        planes = slice(unit["planes"][0], unit["planes"][-1] + 1)
        of_layers = slice(unit["first_layer"] - first_layer, unit["first_layer"] - first_layer + unit["layers"])
        of_heads = slice(unit["first_head"] - first_head, unit["first_head"] - first_head + unit["heads"])
        box = out[planes, of_layers, :, of_heads]
        box[:, :, coded] = np.clip(y, -largest, largest).astype(true).transpose(1, 2, 0, 3, 4)
        for of, token in exact:
            if of == u:
                box[:, :, token] = bits[of, token]
    for stream in streams:
        assert set(stream.states) == {2**16}
        assert not [*stream.words, *stream.escapes]
    return out


@pytest.mark.parametrize("first_token", [0, 96])
@pytest.mark.parametrize(
    "kv_dtype", [one if one == "bfloat16" else pytest.param(one, marks=pytest.mark.slow) for one in DTYPES]
)
@pytest.mark.parametrize("cut", ["layers", "joint"])
def test_it_reads_what_the_codec_reads(cut: str, kv_dtype: KVDtype, first_token: int) -> None:
    shape = (2, 4, 65, 2, 12)
    spec = CellSpec(shape, kv_dtype)
    made = (
        made_calibration(spec, unit_heads=1, streams=(2, 0, 1, 0, 0), rotary=8, fewer=0.1, first_layer=1, first_head=2)
        if cut == "layers"
        else made_calibration(spec, stages=2, head_groups=2, unit_layers=2, joint=True, streams=(3, 0), live=70)
    )
    layer, head = (1, 2) if cut == "layers" else (4, 2)
    position = CellPosition(bytes(16), first_token, layer, head)
    bits = random_bits(shape, kv_dtype, np.random.default_rng(0))
    bits[:, 1, 5, 0, 3] = np.array(np.nan, TRUE[DTYPES.index(kv_dtype)]).view(bits.dtype)
    data = make_codec("transform", {"calibration": calibrations.register(made)}).encode(bits, spec, position)
    out = np.empty_like(bits)
    make_codec("transform").decode(data, spec, position, out)
    assert data[57] == 1
    assert second_reader(data, shape, made.to_bytes()).tobytes() == out.tobytes()
