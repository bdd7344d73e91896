"""Made-up cells by which a device's decoder proves itself: whole ones, raw ones, and some that are damaged.

The same cells each time. Nothing here knows a device: who asks decodes them there and by the codec, and compares.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.arrays import storage_dtype
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.cachegen import CachegenCodec
from lmcache_s3.codecs.calibration import Calibration, Level, Unit
from lmcache_s3.codecs.dtypes import from_float32
from lmcache_s3.codecs.header import HEADER_BYTES, wrap
from lmcache_s3.codecs.transform import TransformCodec
from lmcache_s3.errors import Bug
from lmcache_s3.kernels.rans_tables import TABLES
from lmcache_s3.types import HASH_BYTES

_COEFFICIENTS = 96
_LARGEST = 1300
"""Of so many integers the sums stay exact, whatever the coefficients: 96 · 1300 · 127 < 2²⁴."""
_DAMAGED = 6
_SPARED_BYTES = 36
"""Of a payload, which damage spares: so that it concerns what the device reads, and finds the calibration."""


def made_cells(codec: str, spec: CellSpec) -> list[tuple[bytes, CellPosition]]:
    """Stored cells of `cachegen` or `transform`. Two are coded, at other levels, one of them begins a prompt; one is
    raw; then come damaged ones, of which some can be used."""
    rng = np.random.default_rng(0)
    whole = [
        (one.encode(_values(spec, rng), spec, position), position)
        for one, position in zip(_codecs(codec, spec), (_position(0), _position(977)), strict=True)
    ]
    bits = np.frombuffer(rng.bytes(int(np.prod(spec.shape)) * storage_dtype(spec).itemsize), storage_dtype(spec))
    raw = (_codecs(codec, spec)[0].encode(bits.reshape(spec.shape), spec, _position(5)), _position(5))
    damaged = []
    for i in range(_DAMAGED):
        data, position = whole[i % 2]
        payload = bytearray(data[HEADER_BYTES:])
        payload[int(rng.integers(_SPARED_BYTES, len(payload)))] ^= 1 << int(rng.integers(8))
        damaged.append((wrap(bytes(payload), spec, position), position))
    return [*whole, raw, *damaged]


def _position(first_token: int) -> CellPosition:
    return CellPosition(bytes(HASH_BYTES), first_token, 0, 0)


def _values(spec: CellSpec, rng: np.random.Generator) -> np.ndarray:
    """Heavy tails, an offset and a scale for each channel."""
    scale = np.exp(rng.standard_normal((*spec.shape[:2], 1, *spec.shape[3:])))
    values = rng.standard_t(4, spec.shape) * scale + rng.standard_normal(scale.shape)
    return from_float32(values.astype(np.float32), spec.kv_dtype)


def _codecs(codec: str, spec: CellSpec) -> tuple[KVCodec, KVCodec]:
    if codec == "cachegen":
        return CachegenCodec("fine"), CachegenCodec("coarse")
    if codec == "transform":
        digest = calibrations.register(_calibration(spec))
        return TransformCodec("one", digest), TransformCodec("two", digest)
    raise Bug(f"no cells are made up of codec {codec}")


def _calibration(spec: CellSpec) -> Calibration:
    """A unit a layer and plane, of matrices that have nothing to do with each other: what is decoded need not mean
    anything. Every table is used, the second level codes half of the coefficients."""
    kv, layers, _, heads, channels = spec.shape
    rng = np.random.default_rng(1)
    width = heads * channels
    n = min(width, _COEFFICIENTS)
    tables = (np.arange(n) * 7 % TABLES).astype(np.uint8)
    units = tuple(
        Unit(
            planes=(plane,),
            first_layer=layer,
            layers=1,
            first_head=0,
            heads=heads,
            streams=1 - layer % 2,
            mean=rng.standard_normal(width).astype(np.float32),
            forward=rng.standard_normal((n, width)).astype(np.float16),
            forward_scale=np.full(n, 8 / np.sqrt(width), np.float32),
            inverse=rng.integers(-_LARGEST, _LARGEST + 1, (width, n), np.int16),
            inverse_scale=np.full(width, 1 / (16 * _LARGEST * np.sqrt(n)), np.float32),
            tables=(tables, tables[: (n + 1) // 2]),
        )
        for plane in range(kv)
        for layer in range(layers)
    )
    turns = np.geomspace(0.159, 1e-5, channels // 2)
    levels = (Level("one", 1.0), Level("two", 2.0))
    return Calibration(spec.kv_dtype, kv, layers, heads, channels, levels, turns, units, {"made": "to prove decoders"})
