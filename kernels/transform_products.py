"""Sums of products of a unit's integers: weights packed two coefficients a column, and the columns added up.

Σ weight · q with |weight| ≤ 2047, q in ±127 and a bounded sum is exact in int32 as in float32, so its order is free:
two coefficients at a time make the int16 pairs that processors multiply and add in one instruction. Only pairs that
hold something else than 0 are met, which leaves most out. `transform_reference.py` has the sum written to be read.
Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.vectors import (
    VectorType,
    _indices,
    _inline,
    _paired_products,
    _signature,
    load16,
    load32,
    store,
)

_TOGETHER = 128
"""Values of vectors that are computed at once, about, if a vector is not longer."""
_LANES = 16
_SLICE = 128
_LINE = 64
_SOME_PAIRS = 48
"""A slice's weights of so many pairs are 24 KiB: they stay in the first cache while all tokens pass."""


class Packed(NamedTuple):
    """A unit's `inverse`, its values in *blocks* of whole vectors, padded to a multiple of 16 *columns*.

    weights: int16, flat: [block], its *slices* of 128 columns (the last may be of fewer), each [pair, column, 2]. A
    pair is two coefficients that follow one another in a stream; what is missing is 0. first_pairs: int64 [stream], the
    number of each stream's first pair. pairs: of a slice. vectors, columns: of a block.
    """

    weights: np.ndarray
    first_pairs: np.ndarray
    pairs: int
    vectors: int
    columns: int


def pack(inverse: np.ndarray, vectors: int, streams: int) -> Packed:
    """inverse: int16 [value, coefficient], the values of so many vectors. Coefficients are dealt to the streams."""
    width, live = inverse.shape
    channels = width // vectors
    order: list[int] = []
    firsts = []
    for stream in range(streams):
        firsts.append(len(order) // 2)
        order += range(stream, live, streams)
        order += [live] * (len(order) % 2)
    together = _together(vectors, channels)
    blocks = -(-vectors // together)
    columns = -(-together * channels // _LANES) * _LANES
    rows = np.zeros((live + 1, blocks * together * channels), np.int16)
    rows[:live, :width] = inverse.T
    weights = np.zeros((blocks, len(order) // 2, columns, 2), np.int16)
    by_pair = rows[order].reshape(-1, 2, blocks, together * channels)
    weights[:, :, : together * channels] = by_pair.transpose(2, 0, 3, 1)
    slices = [
        block[:, column : column + _SLICE].reshape(-1) for block in weights for column in range(0, columns, _SLICE)
    ]
    return Packed(aligned(np.concatenate(slices)), np.array(firsts, np.int64), len(order) // 2, together, columns)


def _together(vectors: int, channels: int) -> int:
    """Vectors of a block: about as many as fill a slice, such that little is padded."""
    most = max(1, _TOGETHER // channels)
    tried = (most, -(-vectors // max(1, vectors // most)))
    return min(tried, key=lambda together: -(-vectors // together) * together)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins where a cache line does: vectors that lie across two of them take twice as long to load."""
    room = np.empty(array.nbytes + _LINE, np.uint8)
    start = -room.ctypes.data % _LINE
    copy = room[start : start + array.nbytes].view(array.dtype)
    copy[:] = array
    return copy


def packed_columns(packed: Packed, per_value: np.ndarray, vectors: int) -> np.ndarray:
    """float32 [value] as [block · column], padded with 0."""
    width = packed.vectors * (per_value.size // vectors)
    blocks = -(-vectors // packed.vectors)
    whole = np.zeros((blocks, width), np.float32)
    whole.reshape(-1)[: per_value.size] = per_value
    columns = np.zeros((blocks, packed.columns), np.float32)
    columns[:, :width] = whole
    return columns.reshape(-1)


@_inline
def _products(_typing: Any, weights: Any, pair: Any) -> Any:
    """16 int32: weights(2i) · low(pair) + weights(2i + 1) · high(pair), of 32 int16 and an int32 of two int16."""
    result = VectorType("int32", _LANES)

    def generate(builder: Any, values: list[Any]) -> Any:
        nothing = ir.Constant(result.llvm, ir.Undefined)
        first = builder.insert_element(nothing, values[1], ir.Constant(ir.IntType(32), 0))
        pairs = builder.shuffle_vector(first, nothing, _indices([0] * _LANES))
        pairs = builder.bitcast(pairs, ir.VectorType(ir.IntType(16), 2 * _LANES))
        return _paired_products(builder, values[0], pairs)

    return _signature(result, [weights, pair], generate)


@kernel
def _add_128(
    weights: np.ndarray, start: int, entries: np.ndarray, i: int, end: int, totals: np.ndarray, at: int
) -> None:
    t0, t1 = load16(totals, at), load16(totals, at + 16)
    t2, t3 = load16(totals, at + 32), load16(totals, at + 48)
    t4, t5 = load16(totals, at + 64), load16(totals, at + 80)
    t6, t7 = load16(totals, at + 96), load16(totals, at + 112)
    while i < end:
        entry = entries[i]
        pair = np.int32(entry)
        of_pair = start + (entry >> 32) * 256
        t0 = t0 + _products(load32(weights, of_pair), pair)
        t1 = t1 + _products(load32(weights, of_pair + 32), pair)
        t2 = t2 + _products(load32(weights, of_pair + 64), pair)
        t3 = t3 + _products(load32(weights, of_pair + 96), pair)
        t4 = t4 + _products(load32(weights, of_pair + 128), pair)
        t5 = t5 + _products(load32(weights, of_pair + 160), pair)
        t6 = t6 + _products(load32(weights, of_pair + 192), pair)
        t7 = t7 + _products(load32(weights, of_pair + 224), pair)
        i += 1
    store(totals, at, t0)
    store(totals, at + 16, t1)
    store(totals, at + 32, t2)
    store(totals, at + 48, t3)
    store(totals, at + 64, t4)
    store(totals, at + 80, t5)
    store(totals, at + 96, t6)
    store(totals, at + 112, t7)


@kernel
def _add_64(
    weights: np.ndarray, start: int, entries: np.ndarray, i: int, end: int, totals: np.ndarray, at: int
) -> None:
    t0, t1 = load16(totals, at), load16(totals, at + 16)
    t2, t3 = load16(totals, at + 32), load16(totals, at + 48)
    while i < end:
        entry = entries[i]
        pair = np.int32(entry)
        of_pair = start + (entry >> 32) * 128
        t0 = t0 + _products(load32(weights, of_pair), pair)
        t1 = t1 + _products(load32(weights, of_pair + 32), pair)
        t2 = t2 + _products(load32(weights, of_pair + 64), pair)
        t3 = t3 + _products(load32(weights, of_pair + 96), pair)
        i += 1
    store(totals, at, t0)
    store(totals, at + 16, t1)
    store(totals, at + 32, t2)
    store(totals, at + 48, t3)


@kernel
def _add_16(
    weights: np.ndarray, start: int, stride: int, entries: np.ndarray, i: int, end: int, totals: np.ndarray, at: int
) -> None:
    total = load16(totals, at)
    while i < end:
        entry = entries[i]
        total = total + _products(load32(weights, start + (entry >> 32) * stride), np.int32(entry))
        i += 1
    store(totals, at, total)


@kernel
def ends_of(packed: Packed, entries: np.ndarray, filled: np.ndarray, tokens: int) -> np.ndarray:
    """Where entries of each so many pairs begin and end, int64 [some + 1, token], in `entries` flat.

    entries: int64 [token, …]; of each the first `filled` are pair · 2³² + its two int16, pairs rising.
    """
    length = entries.shape[1]
    every = entries.reshape(-1)
    parts = (packed.pairs + _SOME_PAIRS - 1) // _SOME_PAIRS
    ends = np.empty((parts + 1, tokens), np.int64)
    for token in range(tokens):
        i = token * length
        last = i + filled[token]
        for part in range(parts):
            ends[part, token] = i
            limit = np.int64(part + 1) * _SOME_PAIRS << 32
            if part == parts - 1:
                i = last
            while i < last and every[i] < limit:
                i += 1
        ends[parts, token] = last
    return ends


@kernel
def add_up(packed: Packed, block: int, entries: np.ndarray, ends: np.ndarray, totals: np.ndarray) -> None:
    """totals, int32 [token · column], of one block, from entries with their `ends_of`."""
    every = entries.reshape(-1)
    columns = packed.columns
    tokens = ends.shape[1]
    totals[: tokens * columns] = 0
    for part in range(ends.shape[0] - 1):
        for first in range(0, columns, _SLICE):
            width = min(_SLICE, columns - first)
            start = (block * columns + first) * packed.pairs * 2
            for token in range(tokens):
                i = ends[part, token]
                end = ends[part + 1, token]
                if width == _SLICE:
                    _add_128(packed.weights, start, every, i, end, totals, token * columns + first)
                elif width == 64:
                    _add_64(packed.weights, start, every, i, end, totals, token * columns + first)
                else:
                    for column in range(0, width, 16):
                        at = token * columns + first + column
                        _add_16(packed.weights, start + 2 * column, 2 * width, every, i, end, totals, at)
