"""Seeded mutations of stored cells, with right and wrong checksums: `Unusable` or a whole array, nothing else.

`fuzz` raises what a decoder raised in error, with codec, dtype, seed and round noted; `count_untyped` counts instead.
A decoder that crashes takes the process with it: count in processes of their own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import get_args

import google_crc32c
import numpy as np

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.header import HEADER_BYTES
from lmcache_s3.errors import Unusable
from lmcache_s3.testing.calibrations import encoder
from lmcache_s3.testing.extents import random_bits
from lmcache_s3.types import KVDtype

POSITION = CellPosition(bytes(range(16)), 0, 2, 1)
SHAPE = (2, 2, 24, 2, 16)
"""So large that every codec codes it, none stores it raw: mutations shall reach what decodes."""
QUICK_DTYPES: tuple[KVDtype, ...] = ("bfloat16", "float8_e4m3fn")
_NUMBERS = (0, 1, 2**7, 2**15, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


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
                value = int(_NUMBERS[rng.integers(len(_NUMBERS))]) & (2 ** (8 * width) - 1)
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


def mutated_cells(stored: bytes, rounds: int, rng: np.random.Generator, *, header: bool) -> Iterator[bytes]:
    """So many changed cells; where there is a header, three of four have a right one."""
    for number in range(rounds):
        if header and number % 4:
            yield rewrapped(mutate(stored[HEADER_BYTES:], rng), stored[:HEADER_BYTES])
        else:
            yield mutate(stored, rng)


def fuzz(codec_id: str, rounds: int, seed: int, dtypes: tuple[KVDtype, ...] = QUICK_DTYPES) -> None:
    """Decode so many changed cells of one codec. Raises what its decoder raises besides `Unusable`."""
    for error in _untyped(codec_id, rounds, seed, dtypes):
        raise error


def count_untyped(codec_id: str, rounds: int, seed: int) -> int:
    """How many of so many changed cells, of every dtype, raised something else than `Unusable`."""
    return sum(1 for _ in _untyped(codec_id, rounds, seed, get_args(KVDtype)))


def _untyped(codec_id: str, rounds: int, seed: int, dtypes: tuple[KVDtype, ...]) -> Iterator[BaseException]:
    rng = np.random.default_rng(seed)
    for i, kv_dtype in enumerate(dtypes):
        spec = CellSpec(SHAPE, kv_dtype)
        codec = encoder(codec_id, spec, POSITION)
        stored = codec.encode(random_bits(spec.shape, kv_dtype, rng), spec, POSITION)
        out = random_bits(spec.shape, kv_dtype, rng)
        share = rounds // len(dtypes) + (i < rounds % len(dtypes))
        for number, data in enumerate(mutated_cells(stored, share, rng, header=codec_id != "fast")):
            try:
                codec.decode(data, spec, POSITION if number % 3 else None, out)
            except Unusable:
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
                error.add_note(f"codec {codec_id}, dtype {kv_dtype}, seed {seed}, round {number}")
                yield error
