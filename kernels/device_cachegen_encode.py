"""Encoding `cachegen` rows on a device: values there in, coded rows on the host out; the bytes of `cachegen_rows.py`.

A batch of cells goes through a launch a stage: coefficients, wanted steps, codes, values, tables, streams. Waits for
the device. Scratch is 9 bytes a value. As `device_cachegen.py` otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lmcache_s3.errors import Bug
from lmcache_s3.kernels import triton_encode
from lmcache_s3.kernels.cachegen_rows import Rows
from lmcache_s3.kernels.device_cachegen import (
    FORMATS,
    MOST_VALUES,
    TILE_VALUES,
    Places,
    device_tables,
    on_device,
    padded,
)
from lmcache_s3.kernels.quantise import MOST, block_of
from lmcache_s3.kernels.rans import LANES

SCRATCH_BYTES = 9
"""A value's share of what `encode` needs beside its results."""


class _Cells(NamedTuple):
    """The batch as the kernels' arguments want it. exact: u8 [cell] on the device. Strides are of scratch rows."""

    cells: int
    kv: int
    layers: int
    tokens: int
    heads: int
    channels: int
    exact: torch.Tensor

    @property
    def rows(self) -> int:
        return self.cells * self.kv * self.layers

    @property
    def width(self) -> int:
        return self.heads * self.channels

    @property
    def q_stride(self) -> int:
        return padded(self.tokens * self.width)

    @property
    def side_stride(self) -> int:
        return padded(max(self.width, self.tokens * self.heads))

    def room(self, dtype: torch.dtype, *of_row: int) -> torch.Tensor:
        return torch.empty((self.rows, *of_row), dtype=dtype, device=self.exact.device)


class _Quantised(NamedTuple):
    """codes, means i8 [row, side_stride], q i8 [row, q_stride], bases, failed i32 [row]."""

    codes: torch.Tensor
    means: torch.Tensor
    q: torch.Tensor
    bases: torch.Tensor
    failed: torch.Tensor


def encode(
    places: Places, shape: tuple[int, int, int], exact: np.ndarray, wanted: np.ndarray, kv_dtype: str
) -> list[Rows | None]:
    """Encode cells where they lie; each one's rows on the host, or None where it cannot be quantised.

    shape: (layers, heads, channels). exact: bool [cell], whether a cell's first token is left out. wanted: float64
    [kv · layer], steps in standard deviations.
    """
    kv, cells, tokens = places.tokens.shape
    layers, heads, channels = shape
    if tuple(places.addresses.shape) != (cells, kv * layers) or len(exact) != cells or len(wanted) != kv * layers:
        raise Bug(f"places of {tuple(places.addresses.shape)} rows; {cells} cells, {kv} · {layers} rows", kind="shape")
    if tokens * heads * channels > MOST_VALUES:
        raise Bug(f"rows of {tokens * heads * channels} values", kind="shape")
    device = places.addresses.device
    c = _Cells(cells, kv, layers, tokens, heads, channels, on_device(device, exact.astype(np.uint8)))
    quantised = _quantise(places, c, wanted, kv_dtype)
    chosen = c.room(torch.uint8, 3)
    tables = device_tables(device)
    triton_encode.choose_tables[(c.rows, 3)](
        quantised.codes, quantised.means, quantised.q, c.exact, tables.costs, chosen,
        layers, kv * layers, tokens, heads, c.width, c.side_stride, c.q_stride, TILE=1024, TOGETHER=16,
    )  # fmt: skip
    return _coded(c, quantised, chosen)


def _quantise(places: Places, c: _Cells, wanted: np.ndarray, kv_dtype: str) -> _Quantised:
    y = c.room(torch.float32, c.tokens * c.width)
    steps, means = c.room(torch.float64, c.side_stride), c.room(torch.float64, c.side_stride)
    done = _Quantised(
        c.room(torch.int8, c.side_stride), c.room(torch.int8, c.side_stride), c.room(torch.int8, c.q_stride),
        c.room(torch.int32), c.room(torch.int32),
    )  # fmt: skip
    least = np.where(np.arange(len(wanted)) >= c.layers, np.sqrt(np.float64(c.channels)) / MOST, 0.0)
    wanted_there = on_device(y.device, np.maximum(wanted, least))
    block = block_of(c.channels)
    tile = max(1, TILE_VALUES // block)
    form = FORMATS[kv_dtype]
    common = (c.layers, c.kv * c.layers, c.tokens)
    per_layer = c.cells * c.layers
    y_stride = c.tokens * c.width
    for plane in range(c.kv):
        triton_encode.transform[(-(-y_stride // (tile * block)), per_layer)](
            places.addresses, places.tokens[plane], c.exact, y, plane * c.layers, *common,
            places.head_stride, places.channel_strides[plane], y_stride, heads=c.heads, channels=c.channels,
            BLOCK=block, LEVELS=block.bit_length() - 1, TILE=tile,
            BITS=form.bits, MANTISSA=form.mantissa, BIAS=form.bias, INFINITE=form.infinite, enable_fp_fusion=False,
        )  # fmt: skip
    triton_encode.channel_steps[(-(-c.width // 128), per_layer)](
        y, c.exact, wanted_there, steps, means, *common, y_stride, c.side_stride, width=c.width, TILE=128,
        enable_fp_fusion=False,
    )  # fmt: skip
    if c.kv > 1:
        triton_encode.token_steps[(-(-c.tokens * c.heads // 128), per_layer)](
            y, c.exact, wanted_there, steps, *common, y_stride, c.side_stride, heads=c.heads, channels=c.channels,
            TILE=128, enable_fp_fusion=False,
        )  # fmt: skip
    triton_encode.code_steps[(c.rows,)](
        steps, means, c.exact, done.codes, done.means, done.bases, done.failed, *common, c.heads, c.width,
        c.side_stride, TILE=1024, enable_fp_fusion=False,
    )  # fmt: skip
    for plane in range(c.kv):
        triton_encode.quantise[(-(-y_stride // TILE_VALUES), per_layer)](
            y, done.codes, done.means, done.bases, c.exact, done.q, plane * c.layers, *common,
            y_stride, c.side_stride, c.q_stride, heads=c.heads, channels=c.channels,
            PER_TOKEN=plane == 1, TILE=TILE_VALUES, enable_fp_fusion=False,
        )  # fmt: skip
    return done


def _coded(c: _Cells, quantised: _Quantised, chosen: torch.Tensor) -> list[Rows | None]:
    room = c.tokens * c.width + 2 * c.side_stride
    words, escapes = c.room(torch.uint16, room), c.room(torch.int8, room)
    states = c.room(torch.uint32, LANES)
    n_words, n_escapes = c.room(torch.int32), c.room(torch.int32)
    tables = device_tables(words.device)
    triton_encode.encode_rows[(c.rows,)](
        quantised.codes, quantised.means, quantised.q, chosen, c.exact, tables.symbols, tables.frequencies,
        tables.starts, states, words, escapes, n_words, n_escapes,
        c.layers, c.kv * c.layers, c.tokens, c.heads, c.width, c.side_stride, c.q_stride, room, num_warps=1,
    )  # fmt: skip
    word_ends, escape_ends = ends_of(n_words), ends_of(n_escapes)
    rooms = np.arange(1, c.rows + 1, dtype=np.int64) * room
    packed_words = packed(words, rooms, word_ends)
    packed_escapes = packed(escapes, rooms, escape_ends)
    failed, bases, of_chosen, of_states = (
        tensor.cpu().numpy() for tensor in (quantised.failed, quantised.bases, chosen, states)
    )
    coded: list[Rows | None] = []
    per_cell = c.kv * c.layers
    for first in range(0, c.rows, per_cell):
        these = slice(first, first + per_cell)
        if failed[these].any():
            coded.append(None)
            continue
        of_words, of_escapes = word_ends[first : first + per_cell + 1], escape_ends[first : first + per_cell + 1]
        coded.append(
            Rows(
                bases[these].astype(np.uint16),
                of_chosen[these],
                of_states[these],
                of_words - of_words[0],
                of_escapes - of_escapes[0],
                packed_words[of_words[0] : of_words[-1]],
                packed_escapes[of_escapes[0] : of_escapes[-1]],
            )
        )
    return coded


def ends_of(counts: torch.Tensor) -> np.ndarray:
    """int64 [stream + 1] on the host: where each stream's values end, if they lie one behind another."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts.cpu().numpy().reshape(-1), dtype=np.int64)))


def packed(source: torch.Tensor, rooms: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """What lies at the ends of the streams' rooms, one stream after another, on the host; rooms: where those end."""
    out = torch.empty(int(ends[-1]), dtype=source.dtype, device=source.device)
    if len(out):
        there = (on_device(source.device, where) for where in (rooms, ends))
        triton_encode.pack[(len(rooms),)](source, *there, out, TILE=1024)
    array: np.ndarray = out.cpu().numpy()
    return array
