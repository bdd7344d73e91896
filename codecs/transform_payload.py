"""The payload of a `transform` cell as bytes: put together, and cut into sections that are checked. FORMAT.md §7.3.

    0   1  version, 1                                 4  32  digest of the calibration
    1   1  mode: 0 raw, 1 coded                      36   4  number of (unit, token) listed as exact
    2   1  kv dtype, 1 to 5                          40   4  number of words
    3   1  level, in the calibration's order         44   4  number of values of escapes

Raises `Unusable` (truncated, shape, payload), nothing else. Sizes are checked before memory is allocated for them.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lmcache_s3.codecs.arrays import raw_bytes, storage_dtype
from lmcache_s3.codecs.base import CellSpec
from lmcache_s3.codecs.transform_layout import Layout
from lmcache_s3.errors import Unusable
from lmcache_s3.types import Buffer

if TYPE_CHECKING:
    from lmcache_s3.kernels.transform_streams import Streams

VERSION = 1
RAW, CODED = 0, 1
FIXED_BYTES = 48
_FIXED = struct.Struct("<BBBB32sIII")
_LANES = 32
_DTYPES: dict[str, int] = {"bfloat16": 1, "float16": 2, "float32": 3, "float8_e4m3fn": 4, "float8_e5m2": 5}


class Fixed(NamedTuple):
    """level: index. calibration: digest, hex. listed: exact (unit, token). words, escapes: how many in all."""

    mode: int
    level: int
    calibration: str
    listed: int = 0
    words: int = 0
    escapes: int = 0

    def pack(self, kv_dtype: str) -> bytes:
        digest = bytes.fromhex(self.calibration)
        return _FIXED.pack(VERSION, self.mode, _DTYPES[kv_dtype], self.level, digest, *self[3:])


def read_fixed(payload: memoryview, spec: CellSpec) -> tuple[Fixed, memoryview]:
    """(the fixed part, the sections behind it)."""
    if len(payload) < FIXED_BYTES:
        raise Unusable("transform payload is shorter than its fixed part", kind="truncated")
    version, mode, dtype, level, digest, listed, words, escapes = _FIXED.unpack_from(payload)
    if version != VERSION or mode not in (RAW, CODED):
        raise Unusable(f"transform payload of version {version}, mode {mode}", kind="payload")
    if dtype != _DTYPES[spec.kv_dtype]:
        raise Unusable(f"transform payload of dtype {dtype}, wanted {spec.kv_dtype}", kind="shape")
    body = payload[FIXED_BYTES:]
    if mode == RAW and (listed or words or escapes or len(body) != raw_bytes(spec)):
        raise Unusable(f"raw transform payload of {len(body)} bytes", kind="payload")
    return Fixed(mode, level, digest.hex(), listed, words, escapes), body


class Coded(NamedTuple):
    """What a cell is coded as. exact: bool [unit, token]. bits: of these, units one after another, each [token, plane,
    layer, head, channel]. states: u32 [stream, 32]. word_counts, escape_counts: int64 [stream]. words u16, escapes i8:
    stream after stream."""

    exact: np.ndarray
    bits: Buffer
    states: np.ndarray
    word_counts: np.ndarray
    escape_counts: np.ndarray
    words: np.ndarray
    escapes: np.ndarray


def put_together(coded: Coded, calibration: str, level: int, kv_dtype: str, first_exact: bool) -> list[Buffer]:
    """The payload of mode 1, in parts. first_exact: token 0 is exact in every unit, which is then not listed."""
    tokens = coded.exact.shape[1]
    exact = coded.exact.copy()
    exact[:, : int(first_exact)] = False
    listed = np.flatnonzero(exact)
    entries = (listed // tokens << 16) + listed % tokens
    fixed = Fixed(CODED, level, calibration, entries.size, coded.words.size, coded.escapes.size)
    return [
        fixed.pack(kv_dtype),
        entries.astype("<u4").tobytes(),
        coded.bits,
        _write_counts(coded.word_counts, coded.escape_counts),
        coded.states.astype("<u4").tobytes(),
        np.ascontiguousarray(coded.words, "<u2").view(np.uint8).data,
        np.ascontiguousarray(coded.escapes).view(np.uint8).data,
    ]


def _write_counts(words: np.ndarray, escapes: np.ndarray) -> bytes:
    """Words and escapes of each stream, seven bits a byte from the lowest, all but a number's last byte with bit 7."""
    out = bytearray()
    for pair in zip(words.tolist(), escapes.tolist(), strict=True):
        for number in pair:
            while number > 0x7F:
                out.append(number & 0x7F | 0x80)
                number >>= 7
            out.append(number)
    return bytes(out)


def _read_counts(data: memoryview, streams: int) -> tuple[np.ndarray, int]:
    """(int64 [stream, 2], bytes read). Raises `Unusable`."""
    counts: list[int] = []
    number = shift = at = 0
    while len(counts) < 2 * streams:
        if at >= len(data) or shift > 28:
            raise Unusable("transform: counts that do not end", kind="payload")
        number |= (data[at] & 0x7F) << shift
        shift += 7
        if data[at] < 0x80:
            counts.append(number)
            number = shift = 0
        at += 1
    return np.array(counts, np.int64).reshape(-1, 2), at


@dataclass(frozen=True, slots=True)
class Parts:
    """A coded payload, read. exact, bits: as in `Coded`, bits in the storage dtype."""

    exact: np.ndarray
    bits: np.ndarray
    streams: Streams


def read_sections(body: memoryview, fixed: Fixed, layout: Layout, spec: CellSpec, first_exact: bool) -> Parts:
    """A coded payload cut into its sections, each checked against what is there. Raises `Unusable`."""
    from lmcache_s3.kernels.transform_streams import streams_of

    units, tokens = len(layout.units), spec.shape[2]
    at = 0

    def take(dtype: np.dtype | str, *shape: int) -> np.ndarray:
        nonlocal at
        size = np.dtype(dtype).itemsize * math.prod(shape)
        if size > len(body) - at:
            raise Unusable(f"transform sections need {size} bytes where {len(body) - at} are left", kind="payload")
        # May lie unaligned: what goes to the kernels is copied.
        cut = np.frombuffer(body[at : at + size], dtype).reshape(shape)
        at += size
        return cut

    exact = np.zeros((units, tokens), bool)
    entries = take("<u4", fixed.listed).astype(np.int64)
    of, token = entries >> 16, entries & 0xFFFF
    if (np.diff(entries) <= 0).any() or (of >= units).any() or (token >= tokens).any() or (token < first_exact).any():
        raise Unusable("transform: its list of exact tokens is out of order", kind="payload")
    exact[:, : int(first_exact)] = True
    exact[of, token] = True
    widths = np.array([placed.unit.mean.size for placed in layout.units], np.int64)
    bits = take(storage_dtype(spec), int((exact.sum(axis=1) * widths).sum()))
    counts, size = _read_counts(body[at:], layout.streams)
    at += size
    if tuple(counts.sum(axis=0)) != (fixed.words, fixed.escapes):
        raise Unusable("transform streams do not add up to the payload's words and escapes", kind="payload")
    states = take("<u4", layout.streams, _LANES)
    streams = streams_of(states, take("<u2", fixed.words), counts, take("i1", fixed.escapes))
    if at != len(body):
        raise Unusable(f"transform payload with {len(body) - at} bytes too many", kind="payload")
    return Parts(exact, bits, streams)
