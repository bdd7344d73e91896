"""Codec `cachegen`: quantise, then entropy-code; lossy. After CacheGen (SIGCOMM '24), in its simplest correct form.

K is scaled per channel, V per token, the more coarsely the deeper the layer; the prompt's first token, which attention
leans on most, is kept to the bit; symbols are coded by rANS with static tables. The payload says everything that
decoding needs, so any instance decodes every level. FORMAT.md has its bytes:

    0   1  version, 1                        4  4  number of words
    1   1  mode: 0 raw, 1 quantised          8  4  number of escapes
    2   1  1 if the first token is exact    12  …  sections; their sizes follow from shape, mode and the two numbers
    3   1  kv dtype, 1 to 5

A cell that holds NaN or infinity, or that would not become smaller, is stored raw. Encoding and decoding give the same
bits on every machine. Raises `Unusable` (header's kinds, payload) when decoding, `Invalid` for arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from lmcache_s3.codecs.arrays import check_array, contiguous, raw_bytes, storage_dtype
from lmcache_s3.codecs.base import JSON, CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.header import HEADER_BYTES, unwrap, wrap
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.types import Buffer

VERSION = 1
RAW, QUANTISED = 0, 1
_FIXED = struct.Struct("<BBBBII")
_STATES = 32
_DTYPES: dict[str, int] = {"bfloat16": 1, "float16": 2, "float32": 3, "float8_e4m3fn": 4, "float8_e5m2": 5}

_SIXTEENTHS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "fine": ((4, 5, 6), (6, 7, 8)),
    "medium": ((8, 10, 12), (12, 14, 16)),
    "coarse": ((12, 16, 20), (18, 21, 24)),
}
"""level → steps of (K, V) in the first, middle and last third of a cell's layers, in 1/16 standard deviations."""
LEVELS = tuple(_SIXTEENTHS)


class CachegenCodec(KVCodec):
    """level: `fine`, `medium` or `coarse`. Its error has not been measured on a model: `measured_kl` is None."""

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

    def encode(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> bytes:
        check_array(cell, spec, what="cell")
        first_exact = position.first_token == 0
        payload = self._quantised(cell, spec, first_exact) if spec.shape[2] > first_exact else None
        if payload is None or len(payload) >= _FIXED.size + raw_bytes(spec):
            payload = _FIXED.pack(VERSION, RAW, 0, _DTYPES[spec.kv_dtype], 0, 0) + contiguous(cell, spec).tobytes()
        return wrap(payload, spec, position)

    def _quantised(self, cell: np.ndarray, spec: CellSpec, first_exact: bool) -> bytes | None:
        """The payload of mode 1; None where a value is not finite."""
        from lmcache_s3.codecs.dtypes import to_float32  # numba and ml_dtypes only where they are needed
        from lmcache_s3.kernels import rans
        from lmcache_s3.kernels.quantise import quantise

        kv, layers, tokens, heads, channels = spec.shape
        symbols = np.empty((kv, layers, heads, channels, tokens - first_exact), np.uint8)
        bases = np.empty((kv, layers), "<u2")
        means, codes, escapes = [], [], []
        for plane in range(kv):
            for layer in range(layers):
                values = to_float32(cell[plane, layer, int(first_exact) :], spec.kv_dtype)
                if not np.isfinite(values).all():
                    return None
                done = quantise(values, self._sixteenths(plane, layer, layers), per_token=plane == 1)
                symbols[plane, layer], bases[plane, layer] = done.symbols, done.base
                codes.append(done.codes.tobytes())
                escapes.append(done.escapes.astype("<i2").tobytes())
                if plane == 0:
                    means.append(done.means.astype("<u2").tobytes())
        rows = symbols.reshape(-1, symbols.shape[-1])
        tables = rans.choose_tables(rows)
        states, words = rans.encode(rows, tables)
        escape_bytes = b"".join(escapes)
        first = contiguous(cell[:, :, :1], spec).tobytes() if first_exact else b""
        dtype, count = _DTYPES[spec.kv_dtype], len(escape_bytes) // 2
        fixed = _FIXED.pack(VERSION, QUANTISED, first_exact, dtype, len(words), count)
        parts = (first, bases.tobytes(), *means, *codes, tables.tobytes(), states.astype("<u4").tobytes())
        return b"".join((fixed, *parts, words.astype("<u2").tobytes(), escape_bytes))

    def _sixteenths(self, plane: int, layer: int, layers: int) -> int:
        return _SIXTEENTHS[self._level][plane][3 * layer // layers]

    def decode(self, data: Buffer, spec: CellSpec, position: CellPosition | None, out: np.ndarray) -> None:
        check_array(out, spec, what="out")
        payload = unwrap(data, spec, position, max_bytes=self.max_encoded_bytes(spec))
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
            np.copyto(out, np.frombuffer(body, storage_dtype(spec)).reshape(spec.shape))
            return
        if spec.shape[2] <= first_exact:
            raise Unusable("cachegen payload without a quantised token", kind="payload")
        _Sections(body, spec, bool(first_exact), words, escapes).decode(out)


class _Sections:
    """The sections of a quantised payload, cut out and checked. Raises `Unusable`."""

    def __init__(self, body: memoryview, spec: CellSpec, first_exact: bool, words: int, escapes: int) -> None:
        kv, layers, tokens, heads, channels = spec.shape
        self.spec = spec
        self.first_exact = first_exact
        coded = tokens - first_exact
        shapes: list[tuple[str, np.dtype, tuple[int, ...]]] = [
            ("first", storage_dtype(spec), (kv, layers, int(first_exact), heads, channels)),
            ("bases", np.dtype("<u2"), (kv, layers)),
            ("means", np.dtype("<u2"), (layers, heads, channels)),
            ("channel_codes", np.dtype("u1"), (layers, heads, channels)),
            ("token_codes", np.dtype("u1"), (kv - 1, layers, coded, heads)),
            ("tables", np.dtype("u1"), (kv * layers * heads * channels,)),
            ("states", np.dtype("<u4"), (_STATES,)),
            ("words", np.dtype("<u2"), (words,)),
            ("escapes", np.dtype("<i2"), (escapes,)),
        ]
        sizes = [dtype.itemsize * int(np.prod(shape, dtype=object)) for _, dtype, shape in shapes]
        if sum(sizes) != len(body):
            raise Unusable(f"cachegen sections of {sum(sizes)} bytes in {len(body)}", kind="payload")
        self.section: dict[str, np.ndarray] = {}
        offset = 0
        for (name, dtype, shape), size in zip(shapes, sizes, strict=True):
            # bytes(): aligned, so that the kernels see ordinary arrays; sections are small beside the decoded cell.
            self.section[name] = np.frombuffer(bytes(body[offset : offset + size]), dtype).reshape(shape)
            offset += size
        self.symbols = np.empty((kv, layers, heads, channels, coded), np.uint8)

    def decode(self, out: np.ndarray) -> None:
        from lmcache_s3.codecs.dtypes import from_float32
        from lmcache_s3.kernels import rans
        from lmcache_s3.kernels.quantise import Quantised, dequantise

        self._check()
        kv, layers, _, heads, channels = self.spec.shape
        coded = self.symbols.shape[-1]
        taken = 0
        values = np.empty((coded, heads, channels), np.float32)
        no_means = np.zeros((heads, channels), np.uint16)
        for plane in range(kv):
            for layer in range(layers):
                symbols = self.symbols[plane, layer]
                count = rans.count_escapes(symbols)
                quantised = Quantised(
                    symbols,
                    self.section["escapes"][taken : taken + count],
                    no_means if plane else self.section["means"][layer],
                    int(self.section["bases"][plane, layer]),
                    self.section["token_codes"][0, layer] if plane else self.section["channel_codes"][layer],
                )
                taken += count
                dequantise(quantised, values, per_token=plane == 1)
                out[plane, layer, int(self.first_exact) :] = from_float32(values, self.spec.kv_dtype)
        if self.first_exact:
            out[:, :, :1] = self.section["first"]

    def _check(self) -> None:
        from lmcache_s3.kernels import rans
        from lmcache_s3.kernels.quantise import MAX_STEP_CODE, MIN_STEP_CODE

        bases = self.section["bases"]
        if bases.size and (bases.min() < MIN_STEP_CODE or bases.max() > MAX_STEP_CODE - 255):
            raise Unusable("cachegen: a step out of range", kind="payload")
        if ((self.section["means"] & 0x7F80) == 0x7F80).any():
            raise Unusable("cachegen: a mean that is not finite", kind="payload")
        rows = self.symbols.reshape(-1, self.symbols.shape[-1])
        if not rans.decode(self.section["states"], self.section["words"], self.section["tables"], rows):
            raise Unusable("cachegen: the symbols' stream is not whole", kind="payload")
        if rans.count_escapes(self.symbols) != len(self.section["escapes"]):
            raise Unusable("cachegen: escapes do not match the symbols", kind="payload")
