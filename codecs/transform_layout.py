"""Which units of a calibration a `transform` cell holds, where in it, and in which of its streams. FORMAT.md §7.3.

Pure; raises nothing: what does not fit is told as a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.calibration import Calibration, Unit
from lmcache_s3.types import HASH_BYTES, Geometry, Grid

if TYPE_CHECKING:
    from lmcache_s3.kernels.transform_values import Place, Rotation

MAX_FIRST_TOKEN = 1 << 48
MAX_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True)
class Placed:
    """A unit in a cell. layers, heads: where in the cell. first_stream, streams: which of the cell's it is coded in."""

    unit: Unit
    layers: slice
    heads: slice
    first_stream: int
    streams: int

    def box(self, cell: np.ndarray) -> np.ndarray:
        """A view of the unit's part of a cell, [plane, layer, token, head, channel]."""
        planes = slice(self.unit.planes[0], self.unit.planes[-1] + 1)
        return cell[planes, self.layers, :, self.heads]


@dataclass(frozen=True, slots=True)
class Layout:
    """A cell's units, in the calibration's order, and its number of streams."""

    units: tuple[Placed, ...]
    streams: int


def place_of(placed: Placed, strides: Sequence[int]) -> Place:
    """Where a unit's values lie in a cell, for the kernels. strides: of plane, layer, token, head, in elements."""
    from lmcache_s3.kernels.transform_values import Place  # numba only where it is needed

    unit, (plane, layer, token, head) = placed.unit, strides
    start = unit.planes[0] * plane + placed.layers.start * layer + placed.heads.start * head
    return Place(start, plane, layer, token, head, unit.layers, unit.heads)


def rotation_of(unit: Unit, turns: tuple[np.ndarray, np.ndarray]) -> Rotation:
    """How a unit's vectors are turned, for the kernels. turns: (cosine, sine), float32 [token of the cell, pair]."""
    from lmcache_s3.kernels.transform_values import Rotation

    pairs = turns[0].shape[1]
    turned = unit.layers * unit.heads if pairs and unit.planes[0] == 0 else 0
    return Rotation(turns[0].reshape(-1), turns[1].reshape(-1), pairs, turned)


_MOST_KEPT = 256
_layouts: WeakKeyDictionary[Calibration, dict[tuple[int, int, int, int], Layout]] = WeakKeyDictionary()
"""Of boxes (first layer, layers, first head, heads) met lately."""


def _units_in(calibration: Calibration, first_layer: int, layers: int, first_head: int, heads: int) -> Layout | None:
    """The units of a box, None where it cuts one. Streams are numbered as the units come."""
    placed: list[Placed] = []
    streams = 0
    for unit in calibration.units:
        layer, head = unit.first_layer - first_layer, unit.first_head - first_head
        if layer + unit.layers <= 0 or layer >= layers or head + unit.heads <= 0 or head >= heads:
            continue
        if layer < 0 or layer + unit.layers > layers or head < 0 or head + unit.heads > heads:
            return None
        opened = unit.streams or int(streams == 0)
        first = streams if opened else streams - 1
        streams += opened
        of_layers, of_heads = slice(layer, layer + unit.layers), slice(head, head + unit.heads)
        placed.append(Placed(unit, of_layers, of_heads, first, max(opened, 1)))
    if sum(one.unit.vectors for one in placed) != calibration.kv * layers * heads:
        return None
    return Layout(tuple(placed), streams)


def layout_of(calibration: Calibration, spec: CellSpec, position: CellPosition) -> Layout | str:
    """The units of a cell, or why the calibration does not fit it."""
    kv, layers, tokens, heads, channels = spec.shape
    first_layer, first_head = position.first_layer, position.first_head
    if (
        (kv, channels, spec.kv_dtype) != (calibration.kv, calibration.head_dim, calibration.kv_dtype)
        or first_layer + layers > calibration.layers
        or first_head + heads > calibration.heads
    ):
        return (
            f"{_what(calibration)}; a cell of {spec.kv_dtype}[{kv}, {layers} layers from {first_layer}, {heads} heads "
            f"from {first_head}, {channels}] is no part of that"
        )
    if tokens > MAX_TOKENS or position.first_token > MAX_FIRST_TOKEN:
        return f"codec transform codes no {tokens} tokens at {position.first_token}"
    box = (first_layer, layers, first_head, heads)
    known = _layouts.setdefault(calibration, {})
    layout = known.get(box)
    if layout is None:
        layout = _units_in(calibration, *box)
        if layout is None:
            widest = max(unit.layers for unit in calibration.units), max(unit.heads for unit in calibration.units)
            return (
                f"{_what(calibration)} in units of {widest[0]} layers × {widest[1]} heads; layers {first_layer} … "
                f"{first_layer + layers - 1}, heads {first_head} … {first_head + heads - 1} cut them"
            )
        if len(known) >= _MOST_KEPT:
            known.clear()
        known[box] = layout
    return layout


def _what(calibration: Calibration) -> str:
    return (
        f"calibration {calibration.digest[:12]}… is of {calibration.kv_dtype}[{calibration.kv}, {calibration.layers} "
        f"layers, {calibration.heads} heads, {calibration.head_dim}]"
    )


def misfit(calibration: Calibration, geometry: Geometry, grid: Grid) -> str | None:
    """Why the calibration fits not all cells of a model divided so; None: it does."""
    spec = CellSpec.of(geometry, grid)
    if (calibration.layers, calibration.heads) != (geometry.layers, geometry.heads):
        return f"{_what(calibration)}, the model of {geometry.layers} layers, {geometry.heads} heads"
    for shard in range(grid.shards):
        layer, head = geometry.cell_layers(grid, shard).start, geometry.cell_heads(grid, shard).start
        layout = layout_of(calibration, spec, CellPosition(bytes(HASH_BYTES), 0, layer, head))
        if isinstance(layout, str):
            return layout
    return None
