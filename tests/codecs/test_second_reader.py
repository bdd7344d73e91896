"""A second reader of `cachegen` cells, written from FORMAT.md with nothing but struct, NumPy and the readable kernels.

What it reads must be what the codec reads: the document describes the bytes.
"""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np
import pytest

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.kernels.rans_reference import decode as rans_decode
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


def second_reader(cell: bytes, shape: tuple[int, int, int, int, int], kv_dtype: str) -> np.ndarray:
    kv, layers, tokens, heads, channels = shape
    true = np.dtype(TRUE[kv_dtype])
    payload = Reader(cell[56:])
    version, mode, exact, dtype, n_words, n_escapes = struct.unpack_from("<BBBBII", payload.data)
    payload.at = 12
    assert (version, dtype) == (1, 1 + ["bfloat16", "float16", "float32", "float8_e4m3fn"].index(kv_dtype))
    if mode == 0:
        return payload.take(f"u{true.itemsize}", *shape).view(true)
    coded = tokens - exact
    first = payload.take(f"u{true.itemsize}", kv, layers, exact, heads, channels)
    bases = payload.take("<u2", kv, layers)
    means = payload.take("<u2", layers, heads, channels)
    channel_codes = payload.take("u1", layers, heads, channels)
    token_codes = payload.take("u1", kv - 1, layers, coded, heads)
    tables = payload.take("u1", kv * layers * heads * channels)
    states = payload.take("<u4", 32)
    words = payload.take("<u2", n_words)
    escapes = iter(payload.take("<i2", n_escapes).tolist())
    assert payload.at == len(payload.data)
    rows = rans_decode(states.tolist(), words.tolist(), tables.tolist(), coded)
    q = np.array([[next(escapes) if s == 63 else s - 31 for s in row] for row in rows], np.float32)
    q = q.reshape(kv, layers, heads, channels, coded).transpose(0, 1, 4, 2, 3)
    out = np.empty(shape, true)
    largest = np.float32(ml_dtypes.finfo(true).max)  # type: ignore[no-untyped-call]
    for plane in range(kv):
        for layer in range(layers):
            codes = token_codes[0, layer][:, :, None] if plane else channel_codes[layer][None]
            step = ((codes.astype(np.uint32) + bases[plane, layer]) << 20).view(np.float32)
            mean = np.float32(0) if plane else means[layer].view(ml_dtypes.bfloat16).astype(np.float32)
            out[plane, layer, exact:] = np.clip(q[plane, layer] * step + mean, -largest, largest).astype(true)
    out[:, :, :exact] = first.view(true)
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
