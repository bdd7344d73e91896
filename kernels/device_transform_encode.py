"""Encoding `transform` cells on a device: centred values, one product a unit, then a warp a stream.

The product is torch's, in float32, of values cut in two parts: TF32 would not round the first at all, nor the second by
more than 2⁻²² of the value. So whatever `torch.backends.cuda.matmul` is set to, the sums are about as good as those of
float32, and no setting of the process is touched. They need not be the CPU's to the last bit, so neither need what lies
next to the middle between two steps be rounded alike.

Waits for the device. Scratch: about 16 bytes a value. Raises `Bug` for shapes that do not fit. Threads: as torch's;
work is queued on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lmcache_s3.errors import Bug
from lmcache_s3.kernels import triton_transform_encode
from lmcache_s3.kernels.device_cachegen import (
    FORMATS,
    TILE_VALUES,
    UNSIGNED,
    Places,
    device_tables,
    on_device,
    padded,
)
from lmcache_s3.kernels.device_cachegen_encode import ends_of, packed
from lmcache_s3.kernels.device_transform import TILE_TOKENS, Dealt, channel_strides, halves, runs_of
from lmcache_s3.kernels.rans import LANES

SCRATCH_BYTES = 16
"""A value's share of what `encode` needs beside its results."""
REACH = 127.0
_TF32 = -(1 << 13)
"""Mask of the bits of a float32 that TF32 keeps."""


class ForwardArrays(NamedTuple):
    """What encoding a unit at one level takes. rows, heads, mean, turned: as in `UnitArrays`. forward: float16
    [coefficient, value]; scale: float32 [coefficient], over the step; dealt: of those coefficients."""

    rows: np.ndarray
    heads: np.ndarray
    forward: np.ndarray
    scale: np.ndarray
    mean: np.ndarray
    turned: np.ndarray
    dealt: Dealt


@dataclass(frozen=True, slots=True)
class EncodePlan:
    """A cell's units at one level, on a device; see `triton_transform_encode` for the tensors.

    of_vectors: row, head, turned, start, width, within. units: forward and scale of each.
    """

    runs: tuple[torch.Tensor, ...]
    of_vectors: tuple[torch.Tensor, ...]
    mean: torch.Tensor
    units: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    of_streams: np.ndarray
    """int64 [stream]: its coefficients."""
    channels: int

    @property
    def coefficients(self) -> int:
        return int(self.of_streams.sum())


def make_encode_plan(units: Sequence[ForwardArrays], streams: int, channels: int, device: torch.device) -> EncodePlan:
    """Tables and matrices to the device, 2 bytes a number of the coefficients that the level codes."""
    vectors: list[tuple[np.ndarray, ...]] = []
    of_streams = np.zeros(streams, np.int64)
    start = 0
    for unit in units:
        n, width = unit.rows.size, unit.mean.size
        within = np.arange(n) * channels
        vectors.append((unit.rows, unit.heads, unit.turned, np.full(n, start), np.full(n, width), within))
        start += width
        dealt = unit.dealt
        of_streams[dealt.first_stream : dealt.first_stream + dealt.streams] += np.bincount(
            np.arange(dealt.tables.size) % dealt.streams, minlength=dealt.streams
        )
    columns = [np.concatenate(column) for column in zip(*vectors, strict=True)]
    return EncodePlan(
        runs_of([unit.dealt for unit in units], streams, device),
        tuple(on_device(device, of.astype(np.int32 if i < 3 else np.int64)) for i, of in enumerate(columns)),
        on_device(device, np.concatenate([unit.mean for unit in units])),
        tuple((on_device(device, unit.forward), on_device(device, unit.scale)) for unit in units),
        of_streams,
        channels,
    )


class Encoded(NamedTuple):
    """A batch of cells, coded, on the host. exact: bool [cell, unit, token], which tokens are not coded. states: u32
    [cell, stream, 32]; word_counts, escape_counts: int64 [cell, stream]; words u16, escapes i8: stream after stream."""

    exact: np.ndarray
    states: np.ndarray
    word_counts: np.ndarray
    escape_counts: np.ndarray
    words: np.ndarray
    escapes: np.ndarray


def encode(
    plan: EncodePlan, places: Places, exact: np.ndarray, turns: tuple[np.ndarray, np.ndarray], kv_dtype: str
) -> Encoded:
    """Code a batch of cells of one plan. exact: bool [cell], whether the first token is not to be coded; turns: cosine,
    sine, float32 [cell, token, pair]."""
    n, tokens = places.tokens.shape[1:]
    if len(exact) != n or turns[0].shape[:2] != (n, tokens):
        raise Bug(f"{n} places of {tokens} tokens, {len(exact)} flags, turns {turns[0].shape}", kind="shape")
    x = _centred(plan, places, turns, kv_dtype)
    coded, q = _quantised(plan, x, on_device(x.device, exact), tokens)
    del x
    found = _streams(plan, q, coded.sum(dim=2, dtype=torch.int32), tokens)
    return Encoded(~coded.cpu().numpy(), *found)


def _centred(plan: EncodePlan, places: Places, turns: tuple[np.ndarray, np.ndarray], kv_dtype: str) -> torch.Tensor:
    """float32, unit after unit [cell, token, value]."""
    kv, n, tokens = places.tokens.shape
    device = places.addresses.device
    x = torch.empty(n * tokens * plan.mean.numel(), dtype=torch.float32, device=device)
    form = FORMATS[kv_dtype]
    half, parts = halves(plan.channels)
    cell_rows = places.addresses.shape[1]
    triton_transform_encode.centre[(-(-tokens // TILE_TOKENS) * parts, plan.mean.numel() // plan.channels, n)](
        places.addresses, places.tokens, on_device(device, turns[0]), on_device(device, turns[1]), plan.mean, x,
        *plan.of_vectors, n, tokens, cell_rows, cell_rows // kv, turns[0].shape[2],
        places.head_stride, channel_strides(places),
        channels=plan.channels, PARTS=parts, HALF=half, TOKENS=TILE_TOKENS,
        BITS=form.bits, MANTISSA=form.mantissa, BIAS=form.bias, INFINITE=form.infinite, enable_fp_fusion=False,
    )  # fmt: skip
    return x


def in_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 numbers as sums of two: the first with 11 significant bits, as TF32 has, the second with the other 13."""
    high = (x.view(torch.int32) & _TF32).view(torch.float32)
    return high, x - high


def product(forward: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """float32 [coefficient, token], of forward, float16 [coefficient, value], and x, float32 [token, value]."""
    wide = forward.to(torch.float32)
    high, low = in_parts(x)
    return torch.addmm(torch.matmul(wide, high.T), wide, low.T)


def _quantised(
    plan: EncodePlan, x: torch.Tensor, exact: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(bool [cell, unit, token]: which tokens are coded; i8 [cell, coefficient, ≥ coded tokens], in their order)."""
    n = exact.shape[0]
    coded = torch.empty((n, len(plan.units), tokens), dtype=torch.bool, device=x.device)
    q = torch.empty((n, plan.coefficients, padded(tokens)), dtype=torch.int8, device=x.device)
    start = row = 0
    for u, (forward, scale) in enumerate(plan.units):
        live, width = forward.shape
        of_unit = x[start * n * tokens : (start + width) * n * tokens].view(n * tokens, width)
        found = product(forward, of_unit).mul_(scale[:, None]).round_()
        # A comparison with NaN is false.
        within = torch.isfinite(of_unit).all(dim=1) & (found.abs() <= REACH).all(dim=0)
        coded[:, u] = within.view(n, tokens)
        coded[:, u, 0] &= ~exact
        order = torch.argsort(~coded[:, u], dim=1, stable=True)
        some = torch.where(within, found, 0.0).to(torch.int8).view(live, n, tokens)
        q[:, row : row + live, :tokens] = some.gather(2, order.expand(live, n, tokens)).transpose(0, 1)
        start += width
        row += live
    return coded, q


def _streams(plan: EncodePlan, q: torch.Tensor, counts: torch.Tensor, tokens: int) -> tuple[np.ndarray, ...]:
    """What `Encoded` has of the streams. counts: int32 [cell, unit]."""
    n, device, streams = q.shape[0], q.device, plan.of_streams.size
    # A place for each value, and one more where a run's last has no partner.
    rooms = np.concatenate(([0], np.cumsum(plan.of_streams * (tokens + tokens % 2))))
    words = torch.empty(n * int(rooms[-1]) + 1, dtype=torch.uint16, device=device)
    escapes = torch.empty(n * int(rooms[-1]) + 1, dtype=torch.int8, device=device)
    states = torch.empty((n, streams, LANES), dtype=torch.uint32, device=device)
    n_words, n_escapes = (torch.empty((n, streams), dtype=torch.int32, device=device) for _ in range(2))
    tables = device_tables(device)
    triton_transform_encode.encode_streams[(n * streams,)](
        q, counts.contiguous(), *plan.runs, on_device(device, rooms),
        tables.symbols, tables.frequencies, tables.starts, states, words, escapes, n_words, n_escapes,
        streams, counts.shape[1], plan.coefficients, q.shape[2], num_warps=1,
    )  # fmt: skip
    ends = (np.arange(n)[:, None] * rooms[-1] + rooms[1:]).reshape(-1)
    word_ends, escape_ends = ends_of(n_words), ends_of(n_escapes)
    return (
        states.cpu().numpy(),
        np.diff(word_ends).reshape(n, streams),
        np.diff(escape_ends).reshape(n, streams),
        packed(words, ends, word_ends),
        packed(escapes, ends, escape_ends),
    )


def take_vectors(where: np.ndarray, places: Places, channels: int, item_bytes: int) -> np.ndarray:
    """Vectors as they are, unsigned [vector, channel], on the host. where: as for `device_transform.place_vectors`."""
    kv, n, tokens = places.tokens.shape
    device = places.addresses.device
    cell_rows = places.addresses.shape[1]
    target = torch.empty((len(where), channels), dtype=UNSIGNED[8 * item_bytes], device=device)
    if len(where):
        columns = (on_device(device, where[:, i].astype(np.int32)) for i in range(4))
        triton_transform_encode.take_vectors[(-(-len(where) * channels // TILE_VALUES),)](
            target, *columns, places.addresses, places.tokens, len(where), channels,
            n, tokens, cell_rows, cell_rows // kv, places.head_stride, channel_strides(places), TILE=TILE_VALUES,
        )  # fmt: skip
    array: np.ndarray = target.cpu().numpy()
    return array
