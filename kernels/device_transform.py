"""Decoding `transform` cells on a device: a plan made once of a calibration, then two launches a batch of cells.

The first reads all streams of all cells, one warp a stream; the second multiplies, scales, turns, rounds and scatters.
The same bits as `transform_values.py`. Scratch is a byte a coefficient that is coded. Nothing waits for the device.
Raises `Bug` for shapes that do not fit. Threads: as torch's; work is queued on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lmcache_s3.errors import Bug
from lmcache_s3.kernels import triton_transform
from lmcache_s3.kernels.device_cachegen import (
    TILE_VALUES,
    Places,
    device_tables,
    format_of,
    on_device,
    padded,
)

TILE_TOKENS = 64
_DEPTH = 64
_HALF = 64
"""Coded tokens, coefficients and, at most, pairs of channels of a step of the product."""


class UnitArrays(NamedTuple):
    """What decoding a unit at one level takes. rows: int [vector], plane · layers + layer in the cell; heads: int
    [vector], in the cell. inverse: int16 [value, ≥ coefficient]; scale (times the step), mean: float32 [value]; tables:
    u8 [coefficient]. turned: pairs of channels that are turned, of each vector. first_stream, streams: of the cell's.
    """

    rows: np.ndarray
    heads: np.ndarray
    inverse: np.ndarray
    scale: np.ndarray
    mean: np.ndarray
    tables: np.ndarray
    turned: np.ndarray
    first_stream: int
    streams: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A cell's units at one level, on a device; see `triton_transform` for the tensors.

    runs: starts, tables, rows of q, units. vectors: unit, matrix, stride, live, q, row, head, turned, as
    `write_values` wants them.
    """

    runs: tuple[torch.Tensor, ...]
    of_vectors: tuple[torch.Tensor, ...]
    matrices: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor
    streams: int
    units: int
    coefficients: int
    vectors: int
    channels: int


class StreamArrays(NamedTuple):
    """Streams of a cell on the host: states u32 [stream, 32], words u16, escapes i8; word_counts, escape_counts int64
    [stream], which add up to theirs."""

    states: np.ndarray
    words: np.ndarray
    escapes: np.ndarray
    word_counts: np.ndarray
    escape_counts: np.ndarray


class Dealt(NamedTuple):
    """A unit's coefficients, dealt to streams: u8 [coefficient] tables; the first of the cell's streams, how many."""

    tables: np.ndarray
    first_stream: int
    streams: int


def runs_of(units: Sequence[Dealt], streams: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """A cell's runs, stream by stream, on the device; starts, tables, rows, units as `triton_transform` wants them."""
    runs: list[list[tuple[int, int, int]]] = [[] for _ in range(streams)]
    coefficients = 0
    for number, unit in enumerate(units):
        for r in range(unit.tables.size):
            runs[unit.first_stream + r % unit.streams].append((int(unit.tables[r]), coefficients + r, number))
        coefficients += unit.tables.size
    starts = np.concatenate(([0], np.cumsum([len(one) for one in runs])))
    flat = np.array([run for one in runs for run in one], np.int64).reshape(-1, 3)
    kinds = (np.uint8, np.int32, np.int32)
    columns = (on_device(device, flat[:, i].astype(kind)) for i, kind in enumerate(kinds))
    return (on_device(device, starts.astype(np.int32)), *columns)


def make_plan(units: Sequence[UnitArrays], streams: int, channels: int, device: torch.device) -> Plan:
    """Tables and matrices to the device, 2 bytes a number of the coefficients that the level codes."""
    parts: list[np.ndarray] = []
    vectors: list[tuple[np.ndarray, ...]] = []
    coefficients = at = 0
    for number, unit in enumerate(units):
        live = unit.tables.size
        stride = max(1, -(-live // _DEPTH)) * _DEPTH
        matrix = np.zeros((unit.mean.size, stride), np.float16)
        matrix[:, :live] = unit.inverse[:, :live]
        parts.append(matrix.reshape(-1))
        n = unit.rows.size
        first = at + np.arange(n, dtype=np.int64) * channels * stride
        vectors.append((
            np.full(n, number), first, np.full(n, stride), np.full(n, live), np.full(n, coefficients),
            unit.rows, unit.heads, unit.turned,
        ))  # fmt: skip
        coefficients += live
        at += matrix.size
    of_vectors = [np.concatenate(column) for column in zip(*vectors, strict=True)]
    return Plan(
        runs_of([Dealt(unit.tables, unit.first_stream, unit.streams) for unit in units], streams, device),
        tuple(on_device(device, of.astype(np.int64 if i == 1 else np.int32)) for i, of in enumerate(of_vectors)),
        on_device(device, np.concatenate(parts)),
        on_device(device, np.concatenate([unit.scale for unit in units])),
        on_device(device, np.concatenate([unit.mean for unit in units])),
        streams, len(units), coefficients, of_vectors[0].size, channels,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeviceStreams:
    """Streams of a batch of cells on a device, and what else decoding them takes; see `triton_transform`."""

    states: torch.Tensor
    words: torch.Tensor
    word_ends: torch.Tensor
    escapes: torch.Tensor
    escape_ends: torch.Tensor
    counts: torch.Tensor
    coded: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor


def upload(
    cells: Sequence[StreamArrays], coded: np.ndarray, turns: tuple[np.ndarray, np.ndarray], device: torch.device
) -> DeviceStreams:
    """A batch of cells of one plan to a device.

    coded: bool [cell, unit, token], whether it is. turns: cosine, sine, float32 [cell, token, pair].
    """
    if len(coded) != len(cells) or turns[0].shape[:2] != (len(cells), coded.shape[2]):
        raise Bug(f"{len(cells)} cells, coded tokens {coded.shape}, turns {turns[0].shape}", kind="shape")
    words = np.concatenate([cell.words for cell in cells] + [np.zeros(1, np.uint16)])
    escapes = np.concatenate([cell.escapes for cell in cells] + [np.zeros(1, np.int8)])

    def ends(counts: list[np.ndarray]) -> torch.Tensor:
        return on_device(device, np.concatenate(([0], np.cumsum(np.concatenate(counts)))))

    return DeviceStreams(
        on_device(device, np.concatenate([cell.states for cell in cells])),
        on_device(device, words),
        ends([cell.word_counts for cell in cells]),
        on_device(device, escapes.view(np.uint8)),
        ends([cell.escape_counts for cell in cells]),
        on_device(device, coded.sum(axis=2, dtype=np.int32)),
        on_device(device, np.argsort(~coded, axis=2, kind="stable").astype(np.int32)),
        on_device(device, turns[0]),
        on_device(device, turns[1]),
    )


class Values(NamedTuple):
    """What streams hold: i8 [cell · coefficient and some more, ≥ coded token]; int32 [cell, stream] status."""

    q: torch.Tensor
    status: torch.Tensor


def decode(plan: Plan, streams: DeviceStreams, places: Places, kv_dtype: str) -> torch.Tensor:
    """Decode coded tokens of a batch of cells to their places; int32 [cell, stream]: `WHOLE` or `NOT_WHOLE`.

    Memory outside the cells' places is never touched, whatever the streams hold.
    """
    values = read_streams(plan, streams)
    write_values(plan, streams, values, places, kv_dtype)
    return values.status


def read_streams(plan: Plan, streams: DeviceStreams) -> Values:
    """The first half of `decode`: all runs of all streams, by one warp a stream."""
    n, units, tokens = streams.coded.shape
    if units != plan.units:
        raise Bug(f"streams of {units} units, a plan of {plan.units}", kind="shape")
    device = streams.states.device
    q_stride = -(-padded(tokens) // TILE_TOKENS) * TILE_TOKENS
    q = torch.empty((n * plan.coefficients + _DEPTH, q_stride), dtype=torch.int8, device=device)
    status = torch.empty((n, plan.streams), dtype=torch.int32, device=device)
    tables = device_tables(device)
    triton_transform.decode_streams[(n * plan.streams,)](
        streams.states, streams.words, streams.word_ends, streams.escapes, streams.escape_ends, *plan.runs,
        streams.counts, tables.slots, tables.values,
        q, status, plan.streams, plan.units, plan.coefficients, q_stride, num_warps=1,
    )  # fmt: skip
    return Values(q, status)


def write_values(plan: Plan, streams: DeviceStreams, values: Values, places: Places, kv_dtype: str) -> None:
    """The second half: product, turning, rounding, to their places."""
    kv, n, tokens = places.tokens.shape
    if tuple(streams.coded.shape) != (n, plan.units, tokens):
        raise Bug(f"{n} places of {tokens} tokens, streams of {tuple(streams.coded.shape)}", kind="shape")
    pairs = streams.cosine.shape[2]
    half, parts = halves(plan.channels)
    cell_rows = places.addresses.shape[1]
    triton_transform.write_values[(-(-tokens // TILE_TOKENS) * parts, plan.vectors, n)](
        values.q, plan.matrices, plan.scale, plan.mean, streams.cosine, streams.sine,
        streams.coded, streams.counts, places.addresses, places.tokens, *plan.of_vectors,
        plan.units, plan.coefficients, n, tokens, cell_rows, cell_rows // kv, pairs, values.q.shape[1],
        places.head_stride, channel_strides(places),
        channels=plan.channels, PARTS=parts, HALF=half, TOKENS=TILE_TOKENS, DEPTH=_DEPTH, **format_of(kv_dtype),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def halves(channels: int) -> tuple[int, int]:
    """(pairs of channels of a program, programs that a vector's take)."""
    half = min(_HALF, max(16, 1 << ((channels + 1) // 2 - 1).bit_length()))
    return half, -(-channels // (2 * half))


def place_vectors(source: np.ndarray, where: np.ndarray, places: Places) -> None:
    """Copy vectors that are stored as they are. source: unsigned [vector, channel]; where: int [vector, 4], the cell,
    row (plane · layers + layer), head and token of each."""
    kv, n, tokens = places.tokens.shape
    count, channels = source.shape
    if not count:
        return
    device = places.addresses.device
    cell_rows = places.addresses.shape[1]
    columns = (on_device(device, where[:, i].astype(np.int32)) for i in range(4))
    triton_transform.place_vectors[(-(-count * channels // TILE_VALUES),)](
        on_device(device, source), *columns, places.addresses, places.tokens, count, channels,
        n, tokens, cell_rows, cell_rows // kv, places.head_stride, channel_strides(places), TILE=TILE_VALUES,
    )  # fmt: skip


def channel_strides(places: Places) -> torch.Tensor:
    """int64 [kv], on the device."""
    return on_device(places.addresses.device, np.array(places.channel_strides, np.int64))
