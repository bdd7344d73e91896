"""Seeded mutations of stored cells, with right and wrong checksums: `Unusable` or a whole array, nothing else.

A failure prints codec, seed and round.
"""

from __future__ import annotations

import struct
import tracemalloc

import google_crc32c
import numpy as np
import pytest

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.registry import CODEC_IDS, make_codec
from lmcache_s3.errors import Unusable
from lmcache_s3.testing.extents import random_bits
from lmcache_s3.types import KVDtype

POSITION = CellPosition(bytes(range(16)), 0, 2, 1)
QUICK = {"fast": 6000, "torch": 3000, "safetensors": 5000, "cachegen": 6000}
SLOW_FACTOR = 12


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes: bytes, numbers, cuts, repeats, swaps."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(out) + 1)) if rng.random() < 0.5 else int(rng.integers(min(len(out), 200) + 1))
        match int(rng.integers(6)):
            case 0 if out:
                out[at % len(out)] ^= 1 << int(rng.integers(8))
            case 1 if len(out) > 8:
                width = int(rng.choice([1, 2, 4, 8]))
                value = int(rng.choice([0, 1, 2**7, 2**15, 2**31, 2**32 - 1, 2**63, 2**64 - 1])) & (
                    2 ** (8 * width) - 1
                )
                at = min(at, len(out) - width)
                out[at : at + width] = value.to_bytes(width, "little")
            case 2:
                del out[at : at + int(rng.integers(1, 64))]
            case 3:
                out[at:at] = rng.bytes(int(rng.integers(1, 64)))
            case 4:
                start = int(rng.integers(len(out) + 1))
                out[at:at] = out[start : start + int(rng.integers(1, 256))]
            case _:
                out[at : at + 16] = rng.bytes(16)
    return bytes(out)


def rewrapped(payload: bytes, header: bytes) -> bytes:
    """The changed payload under a header whose length and crc are right."""
    fields = header[:44] + struct.pack("<Q", len(payload))
    return fields + struct.pack("<I", google_crc32c.value(fields + payload)) + payload


def fuzz(codec_id: str, rounds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dtypes: tuple[KVDtype, ...] = ("bfloat16", "float8_e4m3fn")
    for kv_dtype in dtypes:
        spec = CellSpec((2, 2, 8, 2, 4), kv_dtype)
        codec = make_codec(codec_id)
        stored = codec.encode(random_bits(spec.shape, kv_dtype, rng), spec, POSITION)
        out = random_bits(spec.shape, kv_dtype, rng)
        for number in range(rounds // len(dtypes)):
            if codec_id != "fast" and number % 4:
                data = rewrapped(mutate(stored[56:], rng), stored[:56])
            else:
                data = mutate(stored, rng)
            try:
                codec.decode(data, spec, POSITION if number % 3 else None, out)
            except Unusable:
                continue
            except BaseException as error:
                error.add_note(f"codec {codec_id}, dtype {kv_dtype}, seed {seed}, round {number}")
                raise


@pytest.mark.parametrize("codec_id", CODEC_IDS)
def test_changed_cells_are_unusable_or_whole(codec_id: str) -> None:
    fuzz(codec_id, QUICK[codec_id], seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 2 + SLOW_FACTOR))
@pytest.mark.parametrize("codec_id", CODEC_IDS)
def test_many_more_changed_cells(codec_id: str, seed: int) -> None:
    fuzz(codec_id, QUICK[codec_id], seed)


@pytest.mark.parametrize("codec_id", CODEC_IDS)
def test_decoding_lies_takes_no_memory_to_speak_of(codec_id: str) -> None:
    """Sizes are checked before memory is allocated: a cell of a kilobyte cannot make its reader take a megabyte."""
    fuzz(codec_id, 50, seed=0)  # whatever is imported and compiled once
    tracemalloc.start()
    try:
        fuzz(codec_id, 600, seed=99)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
