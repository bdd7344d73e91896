"""Codec `lossless`: exact, and a third smaller: what is not noise in floating-point numbers is entropy-coded.

Sign, exponent and first mantissa bit of a channel's values are far from evenly spread; the other mantissa bits are
noise. So each channel of each layer's K and V gets a base (its usual exponent) and one of a few tables of frequencies
that the cell holds, and the upper bits are coded with it by rANS; the lower ones are packed as they are. FORMAT.md has
the bytes:

    0   1  version, 1                        4  4  number of words
    1   1  mode: 0 raw, 1 coded              8  4  number of escapes
    2   1  kv dtype, 1 to 5                 12  …  tables, then sections whose sizes follow from shape and numbers
    3   1  number of tables

A cell that would not become smaller is stored raw, so every bit pattern survives, NaN and denormals too. Encoding and
decoding give the same bits on every machine. Raises `Unusable` (header's kinds, payload) when decoding, `Invalid` for
arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lmcache_s3.codecs.arrays import bits_of, check_array, contiguous, raw_bytes, storage_dtype
from lmcache_s3.codecs.base import JSON, CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.header import HEADER_BYTES, unwrap, wrap
from lmcache_s3.errors import Unusable
from lmcache_s3.types import ITEM_BYTES, Buffer

if TYPE_CHECKING:
    from lmcache_s3.kernels.float_planes import FloatLayout

VERSION = 1
RAW, CODED = 0, 1
_FIXED = struct.Struct("<BBBBII")
_DTYPES: dict[str, int] = {"bfloat16": 1, "float16": 2, "float32": 3, "float8_e4m3fn": 4, "float8_e5m2": 5}
MAX_TABLES = 32
"""Two of them for what each channel says of itself: its table, and its base."""
_TABLES = 16
"""As many as an encoder makes: twice as many would save a six-hundredth, and not stay near a decoder's core."""
_VALUES_A_TABLE = 8192
"""A table takes some forty bytes: fewer values than these gain less from one more."""
_SAMPLED_COLUMNS = 1024
"""Enough to make tables from."""
_VALUES_AT_ONCE = 1 << 16
_COLUMN_BYTES = 65 * 4
"""A column's counts."""
_SAMPLE_BYTES = 1 << 20
_TABLES_BYTES = 1 << 19
"""What an encoder's sample takes, and a decoder's tables."""


class LosslessCodec(KVCodec):
    """Entropy-coded exponents, raw mantissas."""

    id: ClassVar[str] = "lossless"
    exact: ClassVar[bool] = True

    @property
    def config(self) -> Mapping[str, JSON]:
        return {}

    def max_encoded_bytes(self, spec: CellSpec) -> int:
        return HEADER_BYTES + _FIXED.size + raw_bytes(spec)

    def encode(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> bytes:
        check_array(cell, spec, what="cell")
        parts = _coded(_planes(contiguous(cell, spec), spec), spec) if cell.size else None
        if parts is None or sum(map(len, parts)) >= _FIXED.size + raw_bytes(spec):
            parts = [_FIXED.pack(VERSION, RAW, _DTYPES[spec.kv_dtype], 0, 0, 0), bits_of(cell, spec)]
        return wrap(parts, spec, position)

    def encode_memory_bytes(self, spec: CellSpec) -> int:
        """A copy of the cell, or of its parts, and the result."""
        n, columns = spec.shape[0] * spec.shape[1], spec.shape[3] * spec.shape[4]
        of_block = 3 * max(_rows_at_once(columns) * columns, n * columns)
        return 2 * raw_bytes(spec) + of_block + _COLUMN_BYTES * columns + 32 * n * columns + _SAMPLE_BYTES

    def decode_memory_bytes(self, spec: CellSpec, stored_bytes: int) -> int:
        """A copy of all that is coded."""
        kv, layers, _, heads, channels = spec.shape
        return stored_bytes + 24 * kv * layers * heads * channels + _TABLES_BYTES

    def decode(self, data: Buffer, spec: CellSpec, position: CellPosition | None, out: np.ndarray) -> None:
        check_array(out, spec, what="out")
        payload = unwrap(data, spec, position, max_bytes=self.max_encoded_bytes(spec))
        if len(payload) < _FIXED.size:
            raise Unusable("lossless payload is shorter than its fixed part", kind="truncated")
        version, mode, dtype, tables, words, escapes = _FIXED.unpack_from(payload)
        if version != VERSION or mode not in (RAW, CODED):
            raise Unusable(f"lossless payload of version {version}, mode {mode}", kind="payload")
        if dtype != _DTYPES[spec.kv_dtype]:
            raise Unusable(f"lossless payload of dtype {dtype}, wanted {spec.kv_dtype}", kind="shape")
        body = payload[_FIXED.size :]
        if mode == RAW:
            if tables or words or escapes or len(body) != raw_bytes(spec):
                raise Unusable(f"raw lossless payload of {len(body)} bytes", kind="payload")
            np.copyto(out, np.frombuffer(body, storage_dtype(spec)).reshape(spec.shape))
            return
        _Coded(body, spec, tables, words, escapes).decode(out)


def _planes(cell: np.ndarray, spec: CellSpec) -> np.ndarray:
    """The cell's bits as unsigned integers [plane, token, column]: a plane is a layer's K or V, a column a channel."""
    kv, layers, tokens, heads, channels = spec.shape
    return cell.view(f"u{ITEM_BYTES[spec.kv_dtype]}").reshape(kv * layers, tokens, heads * channels)


# ---- encoding --------------------------------------------------------------------------------------------------------


def _rows_at_once(columns: int) -> int:
    """So many rows are coded at once; before them lies a multiple of the coder's lanes."""
    return 64 * max(1, _VALUES_AT_ONCE // (64 * columns))


def _coded(planes: np.ndarray, spec: CellSpec) -> list[Buffer] | None:
    """The payload of mode 1, in parts; None where it cannot be smaller than the raw cell."""
    from lmcache_s3.kernels import column_rans as rans  # numba only where it is needed
    from lmcache_s3.kernels import column_tables, float_planes

    layout = float_planes.LAYOUTS[spec.kv_dtype]
    n, tokens, columns = planes.shape
    bases = float_planes.mean_bases(planes, layout)
    # A base is said as its distance from the plane's, which is a symbol too: channels far below lose to escapes.
    plane_bases = np.maximum(bases.min(axis=1), bases.max(axis=1).clip(layout.escape) - layout.escape)
    bases = np.maximum(bases, plane_bases[:, None]).astype(np.uint8)
    frequencies = _first_tables(planes, bases, layout)
    cost, pooled = column_tables.costs(frequencies), np.zeros(frequencies.shape, np.int64)
    # Symbols are made twice, once to count them and once to code them: cheaper than memory for all of them.
    blocks = [slice(row, row + _rows_at_once(columns)) for row in range(0, tokens, _rows_at_once(columns))]
    symbols = np.empty((min(tokens, _rows_at_once(columns)), columns), np.uint8)
    chosen = np.empty((n, columns), np.uint8)
    counts = np.empty((columns, layout.escape + 1), np.uint32)
    escapes: list[np.ndarray] = []
    room = planes.nbytes - n * layout.raw_bytes(tokens * columns)
    for plane in range(n):
        counts[:] = 0
        met = 0
        for rows in blocks:
            items = planes[plane, rows]
            some = symbols[: len(items)]
            float_planes.split(items, bases[plane], layout, some, counts)
            escaped = int(counts[:, layout.escape].sum()) - met
            met += escaped
            room -= 2 * escaped
            if room <= 0:
                return None
            if escaped:
                escapes.append(float_planes.escapes_of(items, some, escaped, layout))
        column_tables.assign(counts, cost, pooled, chosen[plane])
    distances = bases - plane_bases[:, None].astype(np.uint8)
    sides = [np.bincount(side.reshape(-1), minlength=layout.escape + 1) for side in (chosen, distances)]
    frequencies = rans.normalised(np.concatenate((pooled, sides)))
    tables, states = rans.encoding_tables(frequencies), np.full(rans.LANES, rans.IDLE, np.uint32)
    spare = max(symbols.size, n * columns) + rans.LANES
    words = np.empty(min(room // 2, planes.size + 2 * n * columns) + spare, np.uint16)
    place = len(words)
    for plane in range(n - 1, -1, -1):
        for rows in reversed(blocks):
            if place < spare:  # more words than there may be
                return None
            items = planes[plane, rows]
            float_planes.split(items, bases[plane], layout, symbols[: len(items)], None)
            place = rans.encode(symbols[: len(items)], chosen[plane], tables, states, words, place)
    for side, table in ((distances, len(pooled) + 1), (chosen, len(pooled))):
        if place < spare:
            return None
        place = rans.encode(side, np.full(columns, table, np.uint8), tables, states, words, place)
    n_escapes = sum(map(len, escapes))
    fixed = _FIXED.pack(VERSION, CODED, _DTYPES[spec.kv_dtype], len(frequencies), len(words) - place, n_escapes)
    sections = (plane_bases.astype(np.uint8), states.astype("<u4"), words[place:], *escapes)
    raw = np.empty((n, layout.raw_bytes(tokens * columns)), np.uint8)
    for plane in range(n):
        float_planes.pack(planes[plane], layout, raw[plane])
    return [fixed, column_tables.write(frequencies), *map(_little, sections), raw.reshape(-1).data]


def _little(section: np.ndarray) -> memoryview:
    """Its bytes, little-endian; a copy only where they are not so already."""
    return section.astype(section.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def _first_tables(planes: np.ndarray, bases: np.ndarray, layout: FloatLayout) -> np.ndarray:
    """Tables made from a sample of the columns."""
    from lmcache_s3.kernels import column_tables, float_planes

    n, _, columns = planes.shape
    sampled = float_planes.count_sample(planes, bases, max(1, n * columns // _SAMPLED_COLUMNS), layout)
    most = min(_TABLES - 2, 1 + planes.size // _VALUES_A_TABLE)
    return column_tables.make_tables(sampled, _groups(sampled, layout.window), most)


def _groups(counts: np.ndarray, window: int) -> np.ndarray:
    """A first guess of columns that belong together: sign, place in the window and spread, each in a few steps."""
    # Of 65,536 tokens at most: all that follows stays below 2³¹.
    narrow = counts.view(np.int32)
    negative = narrow[:, window : 2 * window].sum(axis=1, dtype=np.int32)
    both = narrow[:, :window] + narrow[:, window : 2 * window]
    total, place = np.maximum(both.sum(axis=1), 1), np.arange(window, dtype=np.int32)
    mean = (both @ place) * 4 // total
    spread = (both @ place**2) // total - ((both @ place) // total) ** 2
    groups: np.ndarray = ((negative * 5 // total) * 1024 + mean) * 4 + np.searchsorted([3, 8, 24], spread)
    return groups


# ---- decoding --------------------------------------------------------------------------------------------------------


def read_tables(data: memoryview, tables: int, symbols: int) -> tuple[np.ndarray, int]:
    """(frequencies u16 [table, symbol], bytes read). Raises `Unusable` for tables that nothing can be coded with."""
    from lmcache_s3.kernels import column_tables
    from lmcache_s3.kernels.column_rans import TOTAL

    flat = np.zeros(tables * symbols, np.uint16)
    # Two bytes of room always: what follows the tables is longer than that.
    read = column_tables.read(np.frombuffer(data, np.uint8), flat)
    if read < 0:
        raise Unusable("lossless: the tables are cut off or run over", kind="payload")
    frequencies = flat.reshape(tables, symbols)
    if (frequencies.sum(axis=1, dtype=np.int64) != TOTAL).any() or frequencies.max() >= TOTAL:
        raise Unusable("lossless: frequencies that do not add up", kind="payload")
    return frequencies, read


class _Coded:
    """A coded payload, cut into its sections and checked. Raises `Unusable`."""

    def __init__(self, body: memoryview, spec: CellSpec, tables: int, words: int, escapes: int) -> None:
        from lmcache_s3.kernels.column_rans import LANES
        from lmcache_s3.kernels.float_planes import LAYOUTS

        kv, layers, tokens, heads, channels = spec.shape
        self.spec, self.layout = spec, LAYOUTS[spec.kv_dtype]
        self.shape = (kv * layers, tokens, heads * channels)
        if not 3 <= tables <= MAX_TABLES or 0 in self.shape:
            raise Unusable(f"lossless payload of {tables} tables", kind="payload")
        self.frequencies, at = read_tables(body, tables, self.layout.escape + 1)
        planes = self.shape[0]
        raw = self.layout.raw_bytes(tokens * heads * channels)
        sizes = (planes, 4 * LANES, 2 * words, 2 * escapes, planes * raw)
        if at + sum(sizes) != len(body):
            raise Unusable(f"lossless sections of {at + sum(sizes)} bytes in {len(body)}", kind="payload")
        parts = []
        for size in sizes:
            parts.append(body[at : at + size].toreadonly())
            at += size
        self.plane_bases = np.frombuffer(parts[0], np.uint8)
        self.states = np.frombuffer(parts[1], "<u4").astype(np.uint32)
        # What follows the words lets the coder look for one without asking whether there is one.
        self.words = np.concatenate((np.frombuffer(parts[2], "<u2"), np.zeros(LANES, np.uint16)), dtype=np.uint16)
        self.escapes = np.frombuffer(parts[3], "<u2").astype(np.uint16)
        self.raw = np.frombuffer(parts[4], np.uint8).reshape(planes, raw)

    def decode(self, out: np.ndarray) -> None:
        from lmcache_s3.kernels import column_numbers
        from lmcache_s3.kernels import column_rans as rans

        layout, (planes, _, columns) = self.layout, self.shape
        tables, own = rans.decoding_tables(self.frequencies), len(self.frequencies) - 2
        sides, place = np.empty((2, planes, columns), np.uint8), 0
        for side in range(2):
            which = np.full(columns, own + side, np.uint8)
            place = self._whole(rans.decode(self.states, self.words, place, which, tables, sides[side]))
        chosen, bases = sides[0], sides[1].astype(np.int64) + self.plane_bases[:, None]
        if chosen.max() >= own or bases.max() > layout.max_base:
            raise Unusable("lossless: a table or base that there is not", kind="payload")
        if self.escapes.size and self.escapes.max() >> (layout.width - layout.raw):
            raise Unusable("lossless: an escape out of range", kind="payload")
        bases = bases.astype(np.uint8)
        item = np.dtype(f"u{ITEM_BYTES[self.spec.kv_dtype]}")
        whole = out.reshape(-1).view(item).reshape(self.shape) if out.flags.c_contiguous else np.empty(self.shape, item)
        place, needed = column_numbers.decode(
            self.states, self.words, place, chosen, tables, bases, self.raw, self.escapes, layout, whole
        )
        self._whole(place)
        if needed != len(self.escapes):
            raise Unusable("lossless: escapes do not match the symbols", kind="payload")
        if place != len(self.words) - rans.LANES or (self.states != rans.IDLE).any():
            raise Unusable("lossless: the symbols' stream is not whole", kind="payload")
        if not out.flags.c_contiguous:
            np.copyto(out, whole.view(out.dtype).reshape(out.shape))

    @staticmethod
    def _whole(place: int) -> int:
        if place < 0:
            raise Unusable("lossless: the symbols' stream is not whole", kind="payload")
        return place
