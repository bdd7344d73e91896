"""`cachegen` rows on a device: tensors in, tensors out, by the Triton kernels; the same bits as `cachegen_rows.py`.

All rows of a batch of cells go in one launch a stage. A stream is decoded by one warp, so a batch should hold some
hundreds of rows to keep a large GPU busy; a cell has kv · layers. Decoding never waits for the device: what is wrong
with a row stands in its answer. Scratch is a byte a value.

On a CPU the kernels run in Triton's interpreter, if TRITON_INTERPRET=1 was set before Triton was imported: for tests.
Raises `Bug` for shapes that do not fit. Threads: as torch's; work is queued on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from lmcache_s3.errors import Bug
from lmcache_s3.kernels import triton_cachegen, triton_encode, triton_rans
from lmcache_s3.kernels.cachegen_rows import Rows
from lmcache_s3.kernels.paged import PlaneMap
from lmcache_s3.kernels.quantise import block_of
from lmcache_s3.kernels.rans_tables import all_tables

MOST_VALUES = 1 << 26
"""Of a row: launches are at most 65,535 programs long along an axis."""
TILE_VALUES = 2048
"""Values a program of the elementwise kernels takes."""


class Format(NamedTuple):
    """A kv dtype: bits in all, bits of mantissa, bias of the exponent, its largest number as float32 bits.

    infinite: the least magnitude, in its own bits, that is no finite number.
    """

    bits: int
    mantissa: int
    bias: int
    largest: int
    infinite: int


FORMATS = {
    "bfloat16": Format(16, 7, 127, 0x7F7F0000, 0x7F80),
    "float16": Format(16, 10, 15, 0x477FE000, 0x7C00),
    "float32": Format(32, 23, 127, 0x7F7FFFFF, 0x7F800000),
    "float8_e4m3fn": Format(8, 3, 7, 0x43E00000, 0x7F),
    "float8_e5m2": Format(8, 2, 15, 0x47600000, 0x7C),
}
UNSIGNED = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}


@dataclass(frozen=True, slots=True)
class Places:
    """Where a batch of cells lies in device memory; for writing and for reading.

    addresses: int64 [cell, kv · layer], in bytes. tokens: int64 [kv, cell, token], in elements from there; head_stride
    and channel_strides (of each plane) too. The memory is the caller's, who keeps it alive.
    """

    addresses: torch.Tensor
    tokens: torch.Tensor
    head_stride: int
    channel_strides: tuple[int, ...]

    @property
    def cells(self) -> int:
        return int(self.addresses.shape[0])

    def of(self, cells: Sequence[int]) -> Places:
        """The places of some of the cells."""
        which = on_device(self.addresses.device, np.array(cells, np.int64))
        return replace(self, addresses=self.addresses[which], tokens=self.tokens[:, which].contiguous())

    @classmethod
    def dense(cls, cells: torch.Tensor) -> Places:
        """cells: [cell, kv, layer, token, head, channel], any strides."""
        n, kv, layers, tokens, _, _ = cells.shape
        strides = cells.stride()
        planes = np.add.outer(np.arange(kv) * strides[1], np.arange(layers) * strides[2]).reshape(-1)
        rows = np.add.outer(np.arange(n) * strides[0], planes) * cells.element_size() + cells.data_ptr()
        per_token = np.broadcast_to(np.arange(tokens) * strides[3], (kv, n, tokens))
        return cls(on_device(cells.device, rows), on_device(cells.device, per_token), strides[4], (strides[5],) * kv)

    @classmethod
    def paged(cls, layers: Sequence[torch.Tensor], blocks: np.ndarray, plane: PlaneMap, heads: range) -> Places | None:
        """An engine's layers `[block, head, slot, content]`, alike in shape and strides, on one device.

        blocks: int [cell, block], each cell's in its tokens' order. heads: the cells', among the engine's. None: within
        a block, the channels of K or V do not lie at even steps.
        """
        view = layers[0]
        if any(other.stride() != view.stride() or other.shape != view.shape for other in layers):
            raise Bug("engine layers of different shapes or strides", kind="layout")
        if blocks.size and not 0 <= int(blocks.min()) <= int(blocks.max()) < view.shape[0]:
            raise Bug(f"a block outside the engine's {view.shape[0]}", kind="shape")
        if not 0 <= heads.start <= heads.stop <= view.shape[1]:
            raise Bug(f"heads {heads} are outside the engine's {view.shape[1]}", kind="shape")
        block_stride, head_stride, slot_stride, content_stride = view.stride()
        offsets = plane.offsets(slot_stride, content_stride)
        kv, _, channels = offsets.shape
        strides = tuple(int(of[0, 1] - of[0, 0]) if channels > 1 else 1 for of in offsets)
        for of, stride in zip(offsets, strides, strict=True):
            if not np.array_equal(of, of[:, :1] + np.arange(channels) * stride):
                return None
        first = heads.start * head_stride
        starts = [layer.data_ptr() + first * layer.element_size() for layer in layers]
        addresses = np.broadcast_to(np.array(starts * kv, np.int64), (len(blocks), kv * len(layers)))
        tokens = blocks[None, :, :, None].astype(np.int64) * block_stride + offsets[:, None, None, :, 0]
        tokens = tokens.reshape(kv, len(blocks), -1)
        return cls(on_device(view.device, addresses), on_device(view.device, tokens), head_stride, strides)


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """Coded rows of a batch of cells on a device: `Rows`, cell after cell; see `triton_rans.decode_rows` for dtypes.

    exact: u8 [cell], 1 where the first of the cell's `tokens` is not among the rows' values.
    """

    bases: torch.Tensor
    chosen: torch.Tensor
    states: torch.Tensor
    word_ends: torch.Tensor
    escape_ends: torch.Tensor
    words: torch.Tensor
    escapes: torch.Tensor
    exact: torch.Tensor
    kv: int
    layers: int
    tokens: int
    heads: int
    channels: int

    @property
    def cells(self) -> int:
        return int(self.exact.shape[0])

    @property
    def width(self) -> int:
        return self.heads * self.channels


def upload(
    cells: Sequence[Rows], exact: Sequence[bool], shape: tuple[int, int, int, int, int], device: torch.device
) -> DeviceRows:
    """Rows of cells of one shape [kv, layer, token, head, channel] to a device.

    They are checked as `cachegen_rows.decode` asks. exact: whether a cell's first token is not among the rows' values.
    """
    kv, layers, tokens, heads, channels = shape
    if not cells or len(exact) != len(cells) or any(len(rows.bases) != kv * layers for rows in cells):
        raise Bug(f"{len(cells)} cells of rows, {len(exact)} flags, {kv} · {layers} rows each", kind="shape")
    if tokens * heads * channels > MOST_VALUES:
        raise Bug(f"rows of {tokens * heads * channels} values", kind="shape")
    word_counts = np.concatenate([np.diff(rows.word_ends) for rows in cells])
    escape_counts = np.concatenate([np.diff(rows.escape_ends) for rows in cells])
    words = np.concatenate([rows.words[: rows.word_ends[-1]] for rows in cells] + [np.zeros(1, np.uint16)])
    escapes = np.concatenate([rows.escapes[: rows.escape_ends[-1]] for rows in cells] + [np.zeros(1, np.int8)])
    return DeviceRows(
        on_device(device, np.concatenate([rows.bases for rows in cells])),
        on_device(device, np.concatenate([rows.chosen for rows in cells])),
        on_device(device, np.concatenate([rows.states for rows in cells])),
        on_device(device, np.concatenate(([0], np.cumsum(word_counts)))),
        on_device(device, np.concatenate(([0], np.cumsum(escape_counts)))),
        on_device(device, words),
        on_device(device, escapes.view(np.uint8)),
        on_device(device, np.array(exact, np.uint8)),
        kv, layers, tokens, heads, channels,
    )  # fmt: skip


def decode(rows: DeviceRows, places: Places, kv_dtype: str) -> torch.Tensor:
    """Decode all rows to their places; int32 [row]: `WHOLE`, or what is wrong with it (its values are then undefined).

    Memory outside the cells' places is never touched, whatever the streams hold.
    """
    values = read_streams(rows)
    write_values(rows, values, places, kv_dtype)
    return values.status


class Values(NamedTuple):
    """What streams hold: i8 [row, stride] codes of steps, means, values; status int32 [row], of the stream alone."""

    codes: torch.Tensor
    means: torch.Tensor
    q: torch.Tensor
    status: torch.Tensor


def read_streams(rows: DeviceRows) -> Values:
    """The first half of `decode`: all runs of all rows, by one warp a row."""
    device = rows.states.device
    n = rows.states.shape[0]
    q_stride = padded(rows.tokens * rows.width)
    side_stride = padded(max(rows.width, rows.tokens * rows.heads))
    codes = torch.empty((n, side_stride), dtype=torch.int8, device=device)
    means = torch.empty((n, side_stride), dtype=torch.int8, device=device)
    q = torch.empty((n, q_stride), dtype=torch.int8, device=device)
    status = torch.empty(n, dtype=torch.int32, device=device)
    tables = device_tables(device)
    triton_rans.decode_rows[(n,)](
        rows.states, rows.words, rows.word_ends, rows.escapes, rows.escape_ends, rows.chosen, rows.exact,
        tables.slots, tables.values, codes, means, q, status,
        rows.layers, rows.kv * rows.layers, rows.tokens, rows.heads, rows.width, side_stride, q_stride, num_warps=1,
    )  # fmt: skip
    return Values(codes, means, q, status)


def write_values(rows: DeviceRows, values: Values, places: Places, kv_dtype: str) -> None:
    """The second half: values to their places; where a step is out of range, the row's status becomes that."""
    _check(rows, places)
    block = block_of(rows.channels)
    tile = max(1, TILE_VALUES // block)
    tiles = -(-(rows.tokens * rows.width // block) // tile)
    for plane in range(rows.kv):
        triton_cachegen.dequantise[(tiles, rows.cells * rows.layers)](
            values.codes, values.means, values.q, rows.bases, rows.exact, values.status,
            places.addresses, places.tokens[plane], plane * rows.layers,
            rows.layers, rows.kv * rows.layers, rows.tokens, places.head_stride, places.channel_strides[plane],
            values.codes.shape[1], values.q.shape[1],
            heads=rows.heads, channels=rows.channels, PER_TOKEN=plane == 1,
            BLOCK=block, LEVELS=block.bit_length() - 1, TILE=tile, **format_of(kv_dtype), enable_fp_fusion=False,
        )  # fmt: skip


def place(source: torch.Tensor, places: Places, cell: int, first: int) -> None:
    """Copy tokens of one cell that are stored as they are to its tokens first, first + 1, ….

    source: unsigned, contiguous [kv · layer, token, head, channel], on the device.
    """
    n, count, heads, channels = source.shape
    kv = places.tokens.shape[0]
    if n != places.addresses.shape[1] or not 0 <= first <= first + count <= places.tokens.shape[2]:
        raise Bug(f"tokens {tuple(source.shape)} at {first} do not fit their places", kind="shape")
    tiles = -(-(count * heads * channels) // TILE_VALUES)
    for plane in range(kv if tiles else 0):
        triton_cachegen.place_tokens[(tiles, n // kv)](
            source, places.addresses[cell], places.tokens[plane, cell], plane * (n // kv), first, count,
            heads, channels, places.head_stride, places.channel_strides[plane], TILE=TILE_VALUES,
        )  # fmt: skip


def take(places: Places, cell: int, count: int, shape: tuple[int, int], item_bytes: int) -> torch.Tensor:
    """The first `count` tokens of one cell as they are: unsigned, [kv · layer, token, head, channel], on the device.

    shape: (heads, channels).
    """
    kv, n, (heads, channels) = places.tokens.shape[0], places.addresses.shape[1], shape
    if not 0 <= count <= places.tokens.shape[2]:
        raise Bug(f"{count} tokens of {places.tokens.shape[2]}", kind="shape")
    dtype = UNSIGNED[8 * item_bytes]
    target = torch.empty((n, count, heads, channels), dtype=dtype, device=places.addresses.device)
    tiles = -(-(count * heads * channels) // TILE_VALUES)
    for plane in range(kv if tiles else 0):
        triton_encode.take_tokens[(tiles, n // kv)](
            places.addresses[cell], places.tokens[plane, cell], target, plane * (n // kv), 0, count,
            heads, channels, places.head_stride, places.channel_strides[plane], TILE=TILE_VALUES,
        )  # fmt: skip
    return target


class DeviceTables(NamedTuple):
    """`rans_tables.Tables` on a device."""

    slots: torch.Tensor
    values: torch.Tensor
    symbols: torch.Tensor
    frequencies: torch.Tensor
    starts: torch.Tensor
    costs: torch.Tensor


@lru_cache(maxsize=16)
def device_tables(device: torch.device) -> DeviceTables:
    tables = all_tables()
    return DeviceTables(*(on_device(device, getattr(tables, name)) for name in DeviceTables._fields))


def _check(rows: DeviceRows, places: Places) -> None:
    wanted = ((rows.cells, rows.kv * rows.layers), (rows.kv, rows.cells, rows.tokens))
    found = (tuple(places.addresses.shape), tuple(places.tokens.shape))
    if wanted != found or len(places.channel_strides) != rows.kv:
        raise Bug(f"places of {found}, rows want {wanted}", kind="shape")


def format_of(kv_dtype: str) -> dict[str, int]:
    bits, mantissa, bias, largest, _ = FORMATS[kv_dtype]
    return {"BITS": bits, "MANTISSA": mantissa, "BIAS": bias, "LARGEST": largest}


def padded(values: int) -> int:
    """Room for so many values of one byte and one more, a multiple of 16."""
    return (values + 16) // 16 * 16


def on_device(device: torch.device, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, order="C")).to(device)
