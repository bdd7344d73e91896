"""Calibrations made of seeded random numbers: orthogonal transforms in units of any cut. For tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.calibration import Calibration, Level, Unit
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.types import Geometry, Grid, KVDtype

LEVELS = (Level("fine", 0.25), Level("medium", 0.5, kl=0.0625, bits=2.0), Level("coarse", 1.0))
_NARROW = 20
_STEPS_PER_UNIT = 2.0
"""Coefficients of step 1 are half a value's unit: of values about 1 wide, medium codes a quarter."""


def made_unit(
    planes: Sequence[int],
    layers: range,
    heads: range,
    head_dim: int,
    rng: np.random.Generator,
    *,
    streams: int = 1,
    live: int | None = None,
    mean: np.ndarray | None = None,
    tables: Sequence[int] = (34, 31, 28),
    fewer: float = 0.0,
) -> Unit:
    """A unit with a random orthogonal transform. live: coefficients kept, all if None; mean: float32 [W], 0 if None.

    tables: one a level. fewer: share of the coefficients that each level codes less than the one before.
    """
    width = len(planes) * len(layers) * len(heads) * head_dim
    live = width if live is None else min(live, width)
    turn = np.linalg.qr(rng.standard_normal((width, width)))[0][:live]
    # As fine as the sums' bound admits, and never above 2047.
    scale = min(2047 / np.abs(turn).max(), 131_000 / np.abs(turn).sum(axis=0).max())
    inverse = np.floor(np.abs(turn) * scale) * np.sign(turn)
    kept = [live - int(min(live / 2, i * fewer * live)) for i in range(len(tables))]
    return Unit(
        planes=tuple(planes),
        first_layer=layers.start,
        layers=len(layers),
        first_head=heads.start,
        heads=len(heads),
        streams=streams,
        mean=np.zeros(width, np.float32) if mean is None else mean.astype(np.float32),
        forward=(turn * 64).astype(np.float16),
        forward_scale=np.full(live, _STEPS_PER_UNIT / 64, np.float32),
        inverse=np.ascontiguousarray(inverse.T.astype(np.int16)),
        inverse_scale=np.full(width, 1 / (scale * _STEPS_PER_UNIT), np.float32),
        tables=tuple(_tables(n, table) for n, table in zip(kept, tables, strict=True)),
    )


def _tables(coefficients: int, table: int) -> np.ndarray:
    """That table, but for each fifth coefficient a narrow one, whose symbols are pairs: many of its values escape."""
    return np.where(np.arange(coefficients) % 5 == 4, _NARROW, table).astype(np.uint8)


def made_calibration(
    spec: CellSpec,
    *,
    stages: int = 1,
    head_groups: int = 1,
    unit_layers: int = 1,
    unit_heads: int | None = None,
    joint: bool = False,
    streams: Sequence[int] = (1,),
    live: int | None = None,
    rotary: int | None = None,
    fewer: float = 0.0,
    first_layer: int = 0,
    first_head: int = 0,
    seed: int = 0,
) -> Calibration:
    """One for a grid of stages × head groups of cells like the spec's, in units of so many layers × heads.

    joint: K and V of a layer in one unit. streams: of the units, cyclically. rotary: rotated channels; all of an even
    head_dim if None. fewer: as for a unit. first_layer, first_head: what there is before the first cell, in units of 1.
    """
    kv, cell_layers, _, cell_heads, channels = spec.shape
    layers, heads = first_layer + stages * cell_layers, first_head + head_groups * cell_heads
    rng = np.random.default_rng(seed)
    rotary = channels - channels % 2 if rotary is None else rotary
    units: list[Unit] = []
    planes = [tuple(range(kv))] if joint else [(plane,) for plane in range(kv)]

    def cut(first: int, total: int, cell: int, step: int) -> list[range]:
        before = [range(i, i + 1) for i in range(first)]
        cells = range(first, total, cell)
        return before + [range(a, min(a + step, c + cell)) for c in cells for a in range(c, c + cell, step)]

    for of_planes in planes:
        for some_layers in cut(first_layer, layers, cell_layers, unit_layers):
            for some_heads in cut(first_head, heads, cell_heads, unit_heads or cell_heads):
                n = streams[len(units) % len(streams)]
                units.append(
                    made_unit(of_planes, some_layers, some_heads, channels, rng, streams=n, live=live, fewer=fewer)
                )
    turns = np.geomspace(0.159, 1e-5, rotary // 2) if rotary else np.empty(0)
    about = {"made": "of random numbers", "seed": seed}
    return Calibration(spec.kv_dtype, kv, layers, heads, channels, LEVELS, turns, tuple(units), about)


@lru_cache(maxsize=64)
def _fitting(
    kv: int, layers: int, heads: int, channels: int, kv_dtype: KVDtype, first_layer: int, first_head: int
) -> str:
    """Digest of one that a cell of this shape and place fits; how its units are cut depends on the shape."""
    calibration = made_calibration(
        CellSpec((kv, layers, 1, heads, channels), kv_dtype),
        unit_layers=1 + layers % 2,
        joint=heads % 2 == 0,
        streams=(2, 0, 1),
        first_layer=first_layer,
        first_head=first_head,
        seed=layers + 8 * heads + 64 * channels,
    )
    return calibrations.register(calibration)


def encoder(codec_id: str, spec: CellSpec, position: CellPosition) -> KVCodec:
    """The codec at its defaults, with a calibration that fits such a cell if it needs one."""
    if codec_id != "transform":
        return make_codec(codec_id)
    kv, layers, _, heads, channels = spec.shape
    digest = _fitting(kv, layers, heads, channels, spec.kv_dtype, position.first_layer, position.first_head)
    return make_codec(codec_id, {"calibration": digest})


@lru_cache(maxsize=16)
def _of_model(geometry: Geometry) -> Calibration:
    spec = CellSpec.of(geometry, Grid(1, 1))
    return made_calibration(spec, unit_layers=1, unit_heads=1, streams=(1, 0, 0))


def model_encoder(codec_id: str, geometry: Geometry) -> KVCodec:
    """The codec at its defaults, with a calibration that fits a model however it is divided, if it needs one."""
    if codec_id != "transform":
        return make_codec(codec_id)
    return make_codec(codec_id, {"calibration": calibrations.register(_of_model(geometry))})
