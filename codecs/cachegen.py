"""Codec `cachegen`: quantise, then entropy-code; lossy. After CacheGen (SIGCOMM '24), with what measuring changed.

Hadamard transform over each head's channels; K scaled per channel, V per token; static rANS tables that a byte
names; the prompt's first token, which attention leans on most, kept to the bit; no deltas between tokens, which gain
nothing at equal error. The payload says everything that decoding needs, so any instance decodes every level. FORMAT.md
§7.1 has its bytes:

    0   1  version, 1                        4  4  number of words
    1   1  mode: 0 raw, 1 quantised          8  4  number of values of escapes
    2   1  1 if the first token is exact    12  …  sections; their sizes follow from shape, mode and the two numbers
    3   1  kv dtype, 1 to 5

A cell that holds NaN or infinity, or that would not become smaller, is stored raw. Encoding and decoding give the same
bits on every machine. Raises `Unusable` (header's kinds, payload) when decoding, `Invalid` for arguments.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lmcache_s3.codecs.arrays import bits_of, check_array, contiguous, raw_bytes, storage_dtype
from lmcache_s3.codecs.base import JSON, CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.header import HEADER_BYTES, unwrap, wrap
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.types import Buffer

if TYPE_CHECKING:
    from lmcache_s3.kernels.cachegen_rows import Rows

VERSION = 1
RAW, QUANTISED = 0, 1
_FIXED = struct.Struct("<BBBBII")
_LANES = 32
_DTYPES: dict[str, int] = {"bfloat16": 1, "float16": 2, "float32": 3, "float8_e4m3fn": 4, "float8_e5m2": 5}

_SIXTEENTHS: dict[str, tuple[int, int]] = {
    "fine": (5, 12),
    "medium": (10, 23),
    "coarse": (13, 30),
}
"""level → steps of (K, V), in 1/16 standard deviations of a coefficient; K's are smaller, its errors do more."""
LEVELS = tuple(_SIXTEENTHS)
_ROW_VALUE_BYTES, _STEP_BYTES, _TILE_BYTES = 8, 48, 24_576
"""What a row takes that is being encoded: of each value float32, int8, room for a word and an escape; of each step, and
of a tile of values."""
_SPARE_BYTES = 1 << 12
"""For what does not grow with a cell."""


class CachegenCodec(KVCodec):
    """level: one of `LEVELS`, from fine to coarse."""

    id: ClassVar[str] = "cachegen"
    exact: ClassVar[bool] = False

    def __init__(self, level: str = "medium") -> None:
        if not isinstance(level, str) or level not in _SIXTEENTHS:
            raise Invalid(f"codec level {level!r}: there are {', '.join(LEVELS)}", kind="setting", key="codec_level")
        self._level = level

    @property
    def config(self) -> Mapping[str, JSON]:
        return {"level": self._level}

    @property
    def level(self) -> str:
        return self._level

    def max_encoded_bytes(self, spec: CellSpec) -> int:
        return HEADER_BYTES + _FIXED.size + raw_bytes(spec)

    def encode_memory_bytes(self, spec: CellSpec) -> int:
        """Rooms for words and escapes, then what coding a row takes, or the result."""
        rooms = 2 * (raw_bytes(spec) // 2) + _most_escapes(spec)
        row = _ROW_VALUE_BYTES * _row_values(spec) + _STEP_BYTES * _most_steps(spec) + _TILE_BYTES
        return rooms + max(raw_bytes(spec), row) + _SPARE_BYTES

    def decode_memory_bytes(self, spec: CellSpec, stored_bytes: int) -> int:
        """A copy of what is coded, and what decoding a row's steps takes."""
        return stored_bytes + 16 * _most_steps(spec) + 2 * _TILE_BYTES + _SPARE_BYTES

    def encode(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> bytes:
        check_array(cell, spec, what="cell")
        n = exact_tokens(spec, position)
        rows = self._rows(cell[:, :, n:], spec) if spec.shape[2] > n else None
        return write_cell(cell[:, :, :n], rows, lambda: cell, spec, position)

    def steps(self, kv: int, layers: int) -> np.ndarray:
        """Wanted steps in standard deviations, float64 [row]."""
        return np.repeat(np.array(_SIXTEENTHS[self._level][:kv], np.float64) / 16, layers)

    def _rows(self, coded: np.ndarray, spec: CellSpec) -> Rows | None:
        """The coded tokens' rows; None where a value is not finite, or where they would not be smaller."""
        from lmcache_s3.kernels import cachegen_rows  # numba only where it is needed

        kv, layers, _, _, _ = spec.shape
        rows = cachegen_rows.room_for_rows(kv * layers, raw_bytes(spec) // 2, _most_escapes(spec))
        return rows if cachegen_rows.encode(rows, self.steps(kv, layers), coded, spec.kv_dtype) else None

    def decode(self, data: Buffer, spec: CellSpec, position: CellPosition | None, out: np.ndarray) -> None:
        check_array(out, spec, what="out")
        exact, rows = read_cell(data, spec, position)
        n = exact.shape[2]
        if rows is not None:
            _decode_rows(rows, spec, out[:, :, n:])
        out[:, :, :n] = exact


def _row_values(spec: CellSpec) -> int:
    return math.prod(spec.shape[2:])


def _most_steps(spec: CellSpec) -> int:
    """Of a row: one a channel, or one a token and head."""
    return spec.shape[3] * max(spec.shape[2], spec.shape[4])


def _most_escapes(spec: CellSpec) -> int:
    """All values and all steps and means of each row, unless the raw cell is smaller."""
    of_row = _row_values(spec) + 2 * _most_steps(spec) + 3
    return min(raw_bytes(spec), spec.shape[0] * spec.shape[1] * of_row)


def exact_tokens(spec: CellSpec, position: CellPosition) -> int:
    """How many of a cell's first tokens an encoder stores as they are: 1 where the prompt begins."""
    return int(position.first_token == 0)


def write_cell(
    exact: np.ndarray, rows: Rows | None, whole: Callable[[], np.ndarray], spec: CellSpec, position: CellPosition
) -> bytes:
    """The stored cell: its first tokens that are stored as they are, and the others' rows.

    whole: the cell, asked for where it is stored raw: rows None, or not smaller.
    """
    dtype = _DTYPES[spec.kv_dtype]
    if rows is not None:
        words, escapes = int(rows.word_ends[-1]), int(rows.escape_ends[-1])
        sections: list[Buffer] = [
            _FIXED.pack(VERSION, QUANTISED, exact.shape[2], dtype, words, escapes),
            contiguous(exact, spec).tobytes(),
            np.diff(rows.word_ends).astype("<u4").tobytes(),
            np.diff(rows.escape_ends).astype("<u4").tobytes(),
            rows.bases.astype("<u2").tobytes(),
            rows.chosen.tobytes(),
            rows.states.astype("<u4").tobytes(),
            rows.words[:words].astype("<u2", copy=False).view(np.uint8).data,
            rows.escapes[:escapes].view(np.uint8).data,
        ]
        if sum(map(len, sections)) < _FIXED.size + raw_bytes(spec):
            return wrap(sections, spec, position)
    return wrap([_FIXED.pack(VERSION, RAW, 0, dtype, 0, 0), bits_of(whole(), spec)], spec, position)


def read_cell(data: Buffer, spec: CellSpec, position: CellPosition | None) -> tuple[np.ndarray, Rows | None]:
    """(first tokens that are stored as they are, rows of the others) of a stored cell, after everything was checked.

    The tokens: storage dtype, [kv, layer, token, head, channel], read-only; all of a raw cell's, which has no rows.
    Whether streams are whole and steps in range shows only in decoding. Raises `Unusable`.
    """
    payload = unwrap(data, spec, position, max_bytes=HEADER_BYTES + _FIXED.size + raw_bytes(spec))
    if len(payload) < _FIXED.size:
        raise Unusable("cachegen payload is shorter than its fixed part", kind="truncated")
    version, mode, first_exact, dtype, words, escapes = _FIXED.unpack_from(payload)
    if version != VERSION or mode not in (RAW, QUANTISED) or first_exact > 1:
        raise Unusable(f"cachegen payload of version {version}, mode {mode}", kind="payload")
    if dtype != _DTYPES[spec.kv_dtype]:
        raise Unusable(f"cachegen payload of dtype {dtype}, wanted {spec.kv_dtype}", kind="shape")
    body = payload[_FIXED.size :]
    if mode == RAW:
        if first_exact or words or escapes or len(body) != raw_bytes(spec):
            raise Unusable(f"raw cachegen payload of {len(body)} bytes", kind="payload")
        return np.frombuffer(body, storage_dtype(spec)).reshape(spec.shape), None
    if spec.shape[2] <= first_exact:
        raise Unusable("cachegen payload without a quantised token", kind="payload")
    return _sections(body, spec, bool(first_exact), words, escapes)


def _sections(body: memoryview, spec: CellSpec, first_exact: bool, words: int, escapes: int) -> tuple[np.ndarray, Rows]:
    """(first token, rows) of a quantised payload, cut out and checked against its length. Raises `Unusable`."""
    from lmcache_s3.kernels.cachegen_rows import VALUES, Rows
    from lmcache_s3.kernels.rans import SPARE_WORDS
    from lmcache_s3.kernels.rans_tables import TABLES

    kv, layers, _, heads, channels = spec.shape
    count = kv * layers
    shapes: list[tuple[np.dtype, tuple[int, ...]]] = [
        (storage_dtype(spec), (kv, layers, int(first_exact), heads, channels)),
        (np.dtype("<u4"), (count,)),
        (np.dtype("<u4"), (count,)),
        (np.dtype("<u2"), (count,)),
        (np.dtype("u1"), (count, VALUES + 1)),
        (np.dtype("<u4"), (count, _LANES)),
        (np.dtype("<u2"), (words,)),
        (np.dtype("i1"), (escapes,)),
    ]
    sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in shapes]
    if sum(sizes) != len(body):
        raise Unusable(f"cachegen sections of {sum(sizes)} bytes in {len(body)}", kind="payload")
    cut: list[np.ndarray] = []
    offset = 0
    for (dtype, shape), size in zip(shapes, sizes, strict=True):
        # May lie unaligned: what goes to the kernels is copied.
        cut.append(np.frombuffer(body[offset : offset + size], dtype).reshape(shape))
        offset += size
    first, word_counts, escape_counts, bases, chosen, states, stream, escaped = cut
    if int(word_counts.sum(dtype=np.uint64)) != words or int(escape_counts.sum(dtype=np.uint64)) != escapes:
        raise Unusable("cachegen rows do not add up to the payload's words and escapes", kind="payload")
    if (chosen >= TABLES).any() or (kv == 2 and chosen[layers:, 1].any()):
        raise Unusable("cachegen: a table there is not", kind="payload")
    padded = np.zeros(words + SPARE_WORDS, np.uint16)
    padded[:words] = stream
    ends = [np.concatenate((np.zeros(1, np.int64), np.cumsum(counts))) for counts in (word_counts, escape_counts)]
    native = (bases.astype(np.uint16), chosen.copy(), states.astype(np.uint32))
    return first, Rows(*native, ends[0].astype(np.int64), ends[1].astype(np.int64), padded, escaped.copy())


def _decode_rows(rows: Rows, spec: CellSpec, out: np.ndarray) -> None:
    """Rows into the coded tokens' part of `out`. Raises `Unusable`."""
    from lmcache_s3.kernels.cachegen_rows import STEP_OUT_OF_RANGE, WHOLE, decode

    kv, layers = out.shape[:2]
    answer = decode(rows, range(kv * layers), layers, out, spec.kv_dtype)
    if answer == STEP_OUT_OF_RANGE:
        raise Unusable("cachegen: a step out of range", kind="payload")
    if answer != WHOLE:
        raise Unusable("cachegen: a row's stream is not whole", kind="payload")
