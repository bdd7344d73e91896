"""Stored `transform` cells into a device's memory: what a GPU decodes crosses the bus in coded form.

Header, checksum and sections are checked on the host, as `TransformCodec` does; `kernels/device_transform.py` does the
rest. The same bits as on a CPU. Blocks until the device is done. Raises `Bug` for arguments that do not fit each other;
a cell that cannot be used is an outcome, not an exception.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import torch

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.codecs.device import batch_cells, on, place_exact
from lmcache_s3.codecs.transform import Cell, read_cell, rotation
from lmcache_s3.codecs.transform_layout import Layout, Placed
from lmcache_s3.errors import Bug, Unavailable, Unusable
from lmcache_s3.kernels import device_transform
from lmcache_s3.kernels.device_cachegen import Places
from lmcache_s3.kernels.device_transform import DeviceStreams, Plan, StreamArrays, UnitArrays
from lmcache_s3.kernels.triton_rans import WHOLE
from lmcache_s3.types import Buffer

Outcome = Unusable | Unavailable | None
PlanKey = tuple[str, int, int, int, int, int, torch.device]
_MOST_PLANS = 16
P = TypeVar("P")


class Plans(Generic[P]):
    """What calibrations look like on a device. Made once; the oldest are dropped. Thread-safe."""

    def __init__(self) -> None:
        self._made: OrderedDict[PlanKey, P] = OrderedDict()
        self._lock = Lock()

    def get(self, key: PlanKey, make: Callable[[], P]) -> P:
        with self._lock:
            plan = self._made.pop(key, None)
        if plan is None:
            plan = make()
        with self._lock:
            self._made[key] = plan
            while len(self._made) > _MOST_PLANS:
                self._made.popitem(last=False)
        return plan


_plans: Plans[Plan] = Plans()


def decode_transform(
    cells: Sequence[Buffer], spec: CellSpec, positions: Sequence[CellPosition | None], places: Places
) -> list[Outcome]:
    """Decode stored cells of one shape into device memory; what became of each.

    positions: as in `KVCodec.decode`. places: of as many cells; elements are as wide as the kv dtype's. A cell that
    came out unusable has undefined values in its own places; memory elsewhere is not touched.
    """
    if not len(cells) == len(positions) == places.cells:
        raise Bug(f"{len(cells)} cells, {len(positions)} positions, {places.cells} places", kind="shape")
    outcomes: list[Outcome] = [None] * len(cells)
    read: dict[int, Cell | np.ndarray] = {}
    for i, (data, position) in enumerate(zip(cells, positions, strict=True)):
        try:
            read[i] = read_cell(data, spec, position)
        except (Unusable, Unavailable) as e:
            outcomes[i] = e
    for i, outcome in zip(read, place_transform(list(read.values()), spec, places.of(list(read))), strict=True):
        outcomes[i] = outcome
    return outcomes


def place_transform(cells: Sequence[Cell | np.ndarray], spec: CellSpec, places: Places) -> list[Unusable | None]:
    """The second half of `decode_transform`: cells as `transform.read_cell` gave them, those of one plan at once."""
    if len(cells) != places.cells:
        raise Bug(f"{len(cells)} cells, {places.cells} places", kind="shape")
    outcomes: list[Unusable | None] = [None] * len(cells)
    together: dict[PlanKey, dict[int, Cell]] = {}
    device, batch = places.addresses.device, batch_cells(spec)
    with on(device):
        for i, read in enumerate(cells):
            if isinstance(read, Cell):
                together.setdefault(key_of(read, spec, device), {})[i] = read
            else:
                place_exact(read, places, i)
        for of_plan in together.values():
            which = list(of_plan)
            plan = plan_of(of_plan[which[0]], spec, device)
            for first in range(0, len(which), batch):
                some = which[first : first + batch]
                found = _decode(plan, [of_plan[i] for i in some], spec, places.of(some))
                for i, outcome in zip(some, found, strict=True):
                    outcomes[i] = outcome
    return outcomes


def key_of(cell: Cell, spec: CellSpec, device: torch.device) -> PlanKey:
    """What a plan depends on: calibration, level, and which box of the model the cells hold."""
    placed = cell.layout.units[0]
    first_layer = placed.unit.first_layer - placed.layers.start
    first_head = placed.unit.first_head - placed.heads.start
    return (cell.calibration.digest, cell.level, first_layer, spec.shape[1], first_head, spec.shape[3], device)


def plan_of(cell: Cell, spec: CellSpec, device: torch.device) -> Plan:
    """What a cell is decoded by. Of the size of the calibration's coded part."""

    def make() -> Plan:
        units = [_arrays(cell.calibration, placed, cell.level, spec.shape[1]) for placed in cell.layout.units]
        return device_transform.make_plan(units, cell.layout.streams, spec.shape[4], device)

    return _plans.get(key_of(cell, spec, device), make)


def _arrays(calibration: Calibration, placed: Placed, level: int, cell_layers: int) -> UnitArrays:
    unit = placed.unit
    rows, heads, turned = vectors_of(calibration, placed, cell_layers)
    scale = unit.inverse_scale * np.float32(calibration.levels[level].step)
    return UnitArrays(
        rows, heads, unit.inverse, scale, unit.mean, unit.tables[level], turned, placed.first_stream, placed.streams
    )


def vectors_of(calibration: Calibration, placed: Placed, cell_layers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, head in the cell, pairs of channels that are turned) of each of a unit's vectors."""
    planes = np.array(placed.unit.planes)
    layers = np.arange(placed.layers.start, placed.layers.stop)
    heads = np.arange(placed.heads.start, placed.heads.stop)
    rows = np.repeat((planes[:, None] * cell_layers + layers).reshape(-1), heads.size)
    return rows, np.tile(heads, rows.size // heads.size), np.where(rows < cell_layers, calibration.turns.size, 0)


def _decode(plan: Plan, cells: Sequence[Cell], spec: CellSpec, places: Places) -> list[Unusable | None]:
    streams = upload(cells, spec, places.addresses.device)
    status = device_transform.decode(plan, streams, places, spec.kv_dtype)
    exact = [
        exact_vectors(cell.calibration, cell.layout, cell.parts.exact, n, spec.shape[1]) for n, cell in enumerate(cells)
    ]
    bits = [cell.parts.bits.view(f"u{cell.parts.bits.itemsize}") for cell in cells]
    source = np.concatenate(bits).reshape(-1, spec.shape[4])
    device_transform.place_vectors(source, np.concatenate(exact), places)
    return [
        Unusable("transform: a stream is not whole", kind="payload") if (of_cell != WHOLE.value).any() else None
        for of_cell in status.cpu().numpy()
    ]


def upload(cells: Sequence[Cell], spec: CellSpec, device: torch.device) -> DeviceStreams:
    """Coded cells of one plan to a device."""
    turns = [rotation(cell.calibration, cell.first_token, spec.shape[2]) for cell in cells]
    return device_transform.upload(
        [_streams(cell) for cell in cells],
        np.stack([~cell.parts.exact for cell in cells]),
        (np.stack([cosine for cosine, _ in turns]), np.stack([sine for _, sine in turns])),
        device,
    )


def _streams(cell: Cell) -> StreamArrays:
    streams = cell.parts.streams
    words, escapes = int(streams.word_ends[-1]), int(streams.escape_ends[-1])
    return StreamArrays(
        streams.states,
        streams.words[:words],
        streams.escapes[:escapes],
        streams.word_ends - streams.places,
        streams.escape_ends - streams.escape_places,
    )


def exact_vectors(
    calibration: Calibration, layout: Layout, exact: np.ndarray, cell: int, cell_layers: int
) -> np.ndarray:
    """int [vector, 4] for `place_vectors`, in the order of `Parts.bits`. exact: bool [unit, token]."""
    parts = [np.empty((0, 4), np.int64)]
    for placed, of_unit in zip(layout.units, exact, strict=True):
        rows, heads, _ = vectors_of(calibration, placed, cell_layers)
        kept = np.flatnonzero(of_unit)
        where = np.empty((kept.size, rows.size, 4), np.int64)
        where[:, :, 0], where[:, :, 1], where[:, :, 2], where[:, :, 3] = cell, rows, heads, kept[:, None]
        parts.append(where.reshape(-1, 4))
    return np.concatenate(parts)
