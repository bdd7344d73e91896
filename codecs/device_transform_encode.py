"""Stored `transform` cells of what lies in a device's memory: only coded bytes cross the bus.

The same values, steps, tables and streams as `TransformCodec.encode`, but for the sums of the product, which a device
adds up in an order of its own: a coefficient within rounding of the middle between two steps, or of the reach, may come
out as its neighbour. So bytes may differ from the CPU's in a few places; every decoder reads them, to the same bits.
Blocks until the device is done. Raises `Bug` for arguments that do not fit each other, `Invalid`, `Unusable` and
`Unavailable` as the codec.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.codecs.device import batch_cells, on, take_tokens
from lmcache_s3.codecs.device_transform import Plans, exact_vectors, vectors_of
from lmcache_s3.codecs.transform import TransformCodec, rotation, write_cell
from lmcache_s3.codecs.transform_layout import Layout, Placed, layout_of
from lmcache_s3.codecs.transform_payload import Coded, put_together
from lmcache_s3.errors import Bug, Invalid
from lmcache_s3.kernels import device_transform_encode
from lmcache_s3.kernels.device_cachegen import Places
from lmcache_s3.kernels.device_transform import Dealt
from lmcache_s3.kernels.device_transform_encode import EncodePlan, ForwardArrays
from lmcache_s3.types import ITEM_BYTES

_plans: Plans[EncodePlan] = Plans()


def encode_transform(
    places: Places, spec: CellSpec, positions: Sequence[CellPosition], level: str, calibration: str
) -> list[bytes]:
    """Stored cells of what lies in device memory, those of one box of the model at once.

    level, calibration: as for `TransformCodec`. Elements of `places` are as wide as the kv dtype's.
    """
    if len(positions) != places.cells:
        raise Bug(f"{len(positions)} positions, {places.cells} places", kind="shape")
    known, number = TransformCodec(level, calibration).settings()
    boxes: dict[tuple[int, int], list[int]] = {}
    for i, position in enumerate(positions):
        boxes.setdefault((position.first_layer, position.first_head), []).append(i)
    stored: dict[int, bytes] = {}
    batch = batch_cells(spec, device_transform_encode.SCRATCH_BYTES)
    with on(places.addresses.device):
        for box, cells in boxes.items():
            plan, layout = _plan(known, number, spec, box, positions[cells[0]], places.addresses.device)
            for first in range(0, len(cells), batch):
                some = cells[first : first + batch]
                of_some = [positions[i] for i in some]
                coded = _encode(plan, layout, known, number, spec, places.of(some), of_some)
                stored.update(zip(some, coded, strict=True))
    return [stored[i] for i in range(len(positions))]


def _plan(
    calibration: Calibration,
    level: int,
    spec: CellSpec,
    box: tuple[int, int],
    position: CellPosition,
    device: torch.device,
) -> tuple[EncodePlan, Layout]:
    layout = layout_of(calibration, spec, position)
    if isinstance(layout, str):
        raise Invalid(layout, kind="argument")

    def make() -> EncodePlan:
        units = [_arrays(calibration, placed, level, spec.shape[1]) for placed in layout.units]
        return device_transform_encode.make_encode_plan(units, layout.streams, spec.shape[4], device)

    key = (calibration.digest, level, box[0], spec.shape[1], box[1], spec.shape[3], device)
    return _plans.get(key, make), layout


def _arrays(calibration: Calibration, placed: Placed, level: int, cell_layers: int) -> ForwardArrays:
    unit, tables = placed.unit, placed.unit.tables[level]
    rows, heads, turned = vectors_of(calibration, placed, cell_layers)
    scale = unit.forward_scale[: tables.size] / np.float32(calibration.levels[level].step)
    dealt = Dealt(tables, placed.first_stream, placed.streams)
    return ForwardArrays(rows, heads, unit.forward[: tables.size], scale, unit.mean, turned, dealt)


def _encode(
    plan: EncodePlan,
    layout: Layout,
    calibration: Calibration,
    level: int,
    spec: CellSpec,
    places: Places,
    positions: Sequence[CellPosition],
) -> list[bytes]:
    """A batch of cells of one box."""
    turns = [rotation(calibration, position.first_token, spec.shape[2]) for position in positions]
    begins = np.array([position.first_token == 0 for position in positions])
    coded = device_transform_encode.encode(
        plan, places, begins, (np.stack([c for c, _ in turns]), np.stack([s for _, s in turns])), spec.kv_dtype
    )
    item_bytes = ITEM_BYTES[spec.kv_dtype]
    where = [exact_vectors(calibration, layout, coded.exact[i], i, spec.shape[1]) for i in range(len(positions))]
    bits = device_transform_encode.take_vectors(np.concatenate(where), places, spec.shape[4], item_bytes)
    of_exact = np.cumsum([0, *map(len, where)])
    of_words = np.cumsum([0, *coded.word_counts.sum(axis=1)])
    of_escapes = np.cumsum([0, *coded.escape_counts.sum(axis=1)])
    stored = []
    for i, position in enumerate(positions):
        payload = put_together(
            Coded(
                coded.exact[i],
                bits[of_exact[i] : of_exact[i + 1]].tobytes(),
                coded.states[i],
                coded.word_counts[i],
                coded.escape_counts[i],
                coded.words[of_words[i] : of_words[i + 1]],
                coded.escapes[of_escapes[i] : of_escapes[i + 1]],
            ),
            calibration.digest,
            level,
            spec.kv_dtype,
            position.first_token == 0,
        )
        whole = functools.partial(take_tokens, spec, places, i, spec.shape[2])
        stored.append(write_cell(payload, whole, spec, position, (level, calibration.digest)))
    return stored
