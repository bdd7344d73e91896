"""Stored `cachegen` cells to and from a device's memory: what a GPU decodes crosses the bus in coded form.

A cell's header, checksum and sections are checked on the host, as `CachegenCodec` does; rows are coded and decoded on
the device by `kernels/device_cachegen.py`. The same bytes and bits as on a CPU. Blocks until the device is done.
Raises `Bug` for arguments that do not fit each other; a cell that cannot be used is an outcome, not an exception.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from lmcache_s3.codecs.arrays import storage_dtype
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.cachegen import CachegenCodec, exact_tokens, read_cell, write_cell
from lmcache_s3.errors import Bug, Unusable
from lmcache_s3.kernels import device_cachegen, device_cachegen_encode
from lmcache_s3.kernels.cachegen_rows import STEP_OUT_OF_RANGE, WHOLE, Rows
from lmcache_s3.kernels.device_cachegen import Places
from lmcache_s3.types import Buffer

_BATCH_VALUES = 1 << 30
"""Values decoded at a time: a byte of scratch each."""
_BATCH_ROWS = 65_535
"""Layers of cells at a time: CUDA launches no more programs along an axis."""


def decode_cachegen(
    cells: Sequence[Buffer], spec: CellSpec, positions: Sequence[CellPosition | None], places: Places
) -> list[Unusable | None]:
    """Decode stored cells of one shape into device memory; what became of each.

    positions: as in `KVCodec.decode`. places: of as many cells; elements are as wide as the kv dtype's. A cell that
    came out `Unusable` has undefined values in its own places; memory elsewhere is not touched.
    """
    if not len(cells) == len(positions) == places.cells:
        raise Bug(f"{len(cells)} cells, {len(positions)} positions, {places.cells} places", kind="shape")
    outcomes: list[Unusable | None] = [None] * len(cells)
    read: dict[int, tuple[np.ndarray, Rows | None]] = {}
    for i, (data, position) in enumerate(zip(cells, positions, strict=True)):
        try:
            read[i] = read_cell(data, spec, position)
        except Unusable as e:
            outcomes[i] = e
    for i, outcome in zip(read, place_cachegen(list(read.values()), spec, places.of(list(read))), strict=True):
        outcomes[i] = outcome
    return outcomes


def place_cachegen(
    cells: Sequence[tuple[np.ndarray, Rows | None]], spec: CellSpec, places: Places
) -> list[Unusable | None]:
    """The second half of `decode_cachegen`: cells as `cachegen.read_cell` gave them, all rows of a batch at once."""
    if len(cells) != places.cells:
        raise Bug(f"{len(cells)} cells, {places.cells} places", kind="shape")
    batch = batch_cells(spec)
    outcomes: list[Unusable | None] = []
    with on(places.addresses.device):
        for first in range(0, len(cells), batch):
            which = range(first, min(first + batch, len(cells)))
            outcomes += _place_batch([cells[i] for i in which], spec, places.of(which))
    return outcomes


def _place_batch(
    cells: Sequence[tuple[np.ndarray, Rows | None]], spec: CellSpec, places: Places
) -> list[Unusable | None]:
    outcomes: list[Unusable | None] = [None] * len(cells)
    coded: dict[int, tuple[Rows, bool]] = {}
    for i, (exact, rows) in enumerate(cells):
        if rows is not None:
            coded[i] = (rows, bool(exact.shape[2]))
        if exact.size:
            place_exact(exact, places, i)
    if not coded:
        return outcomes
    device = places.addresses.device
    batch = device_cachegen.upload([r for r, _ in coded.values()], [e for _, e in coded.values()], spec.shape, device)
    status = device_cachegen.decode(batch, places.of(list(coded)), spec.kv_dtype).cpu().numpy()
    for i, of_cell in zip(coded, status.reshape(len(coded), -1), strict=True):
        if (of_cell == STEP_OUT_OF_RANGE).any():
            outcomes[i] = Unusable("cachegen: a step out of range", kind="payload")
        elif (of_cell != WHOLE).any():
            outcomes[i] = Unusable("cachegen: a row's stream is not whole", kind="payload")
    return outcomes


def encode_cachegen(
    places: Places, spec: CellSpec, positions: Sequence[CellPosition], level: str = "medium"
) -> list[bytes]:
    """Stored cells of what lies in device memory, a batch at once: `CachegenCodec(level)`'s bytes."""
    if len(positions) != places.cells:
        raise Bug(f"{len(positions)} positions, {places.cells} places", kind="shape")
    kv, layers, _, heads, channels = spec.shape
    steps = CachegenCodec(level).steps(kv, layers)
    batch = batch_cells(spec, device_cachegen_encode.SCRATCH_BYTES)
    stored: list[bytes] = []
    with on(places.addresses.device):
        for first in range(0, len(positions), batch):
            which = range(first, min(first + batch, len(positions)))
            exact = np.array([exact_tokens(spec, positions[i]) for i in which])
            coded = device_cachegen_encode.encode(
                places.of(which), (layers, heads, channels), exact == 1, steps, spec.kv_dtype
            )
            for i, n, rows in zip(which, exact, coded, strict=True):
                whole = functools.partial(take_tokens, spec, places, i, spec.shape[2])
                stored.append(write_cell(take_tokens(spec, places, i, int(n)), rows, whole, spec, positions[i]))
    return stored


def take_tokens(spec: CellSpec, places: Places, cell: int, count: int) -> np.ndarray:
    """The first `count` tokens of one of the cells, as a new array on the host."""
    kv, layers, _, heads, channels = spec.shape
    dtype = storage_dtype(spec)
    shape = (kv, layers, count, heads, channels)
    bits = device_cachegen.take(places, cell, count, (heads, channels), dtype.itemsize).cpu().numpy()
    return bits.view(dtype).reshape(shape)


def place_exact(exact: np.ndarray, places: Places, cell: int) -> None:
    kv, layers, tokens, heads, channels = exact.shape
    bits = np.array(exact, order="C").view(f"u{exact.itemsize}").reshape(kv * layers, tokens, heads, channels)
    device_cachegen.place(torch.from_numpy(bits).to(places.addresses.device), places, cell, 0)


def batch_cells(spec: CellSpec, scratch_bytes: int = 1) -> int:
    """How many cells go in one launch, of so many bytes of scratch a value."""
    by_values = _BATCH_VALUES // (math.prod(spec.shape) * scratch_bytes)
    return max(1, min(by_values, _BATCH_ROWS // spec.shape[1]))


def on(device: torch.device) -> AbstractContextManager[object]:
    """While within, work is queued on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
