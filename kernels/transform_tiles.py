"""A product of two matrices of int16, the sums int32: the work of encoding with `transform`, a tile in registers.

A *pair* is two int16 that follow one another in the direction that is summed over, held in one int32. A *panel* is the
pairs of 64 tokens side by side; a *tile* is sums of a few rows with some of them, which stay in registers while pairs
pass. Sums wrap around, so those that end within int32 are exact in any order. Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.vectors import WIDE, VectorType, _data, _indices, _inline, _paired_products

ROWS = 6
"""Rows of a tile: with its vectors of tokens they fill a processor's registers."""
_VECTORS, _LANES = (4, 16) if WIDE else (2, 8)
TOKENS = 64
"""Of a panel."""
_TILE_TOKENS = _VECTORS * _LANES
_SOME_PAIRS = 256
"""A panel's part of so many pairs is 64 KiB: it stays in the second cache while all rows pass."""


def _added(builder: Any, total: Any, pairs: Any, splat: Any) -> Any:
    """total + pairs · splat; one instruction where there is one that adds up."""
    halves = ir.VectorType(ir.IntType(16), 2 * _LANES)
    product = _paired_products(builder, builder.bitcast(pairs, halves), builder.bitcast(splat, halves))
    return builder.add(total, product)


@_inline
def _add_tile(
    _typing: Any, weights: Any, at: Any, panel: Any, panel_at: Any, pairs: Any, totals: Any, totals_at: Any
) -> Any:
    """totals[row · 64 + token] += Σ over pairs of weights[pair · ROWS + row] · panel[pair · 64 + token], all int32."""
    vector = VectorType("int32", _LANES)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        def pointer(array: int, index: Any) -> Any:
            return builder.gep(_data(context, builder, signature.args[array], values[array]), [index])

        def offset(index: Any, by: Any) -> Any:
            return builder.add(index, by if isinstance(by, ir.Value) else ir.Constant(index.type, by))

        def of_vector(array: int, index: Any) -> Any:
            return builder.bitcast(pointer(array, index), vector.llvm.as_pointer())

        def load(array: int, index: Any) -> Any:
            loaded = builder.load(of_vector(array, index))
            loaded.align = 4
            return loaded

        starts = {i: context.cast(builder, values[i], signature.args[i], types.intp) for i in (1, 3, 4, 6)}
        nothing = ir.Constant(vector.llvm, ir.Undefined)
        zero = ir.Constant(ir.IntType(32), 0)
        places = [
            (row, v, offset(starts[6], row * TOKENS + v * _LANES)) for row in range(ROWS) for v in range(_VECTORS)
        ]
        sums = {(row, v): cgutils.alloca_once_value(builder, load(5, place)) for row, v, place in places}
        with cgutils.for_range(builder, starts[4], intp=starts[4].type) as loop:
            of_panel = offset(starts[3], builder.mul(loop.index, ir.Constant(loop.index.type, TOKENS)))
            of_weights = offset(starts[1], builder.mul(loop.index, ir.Constant(loop.index.type, ROWS)))
            pairs_of = [load(2, offset(of_panel, v * _LANES)) for v in range(_VECTORS)]
            for row in range(ROWS):
                weight = builder.load(pointer(0, offset(of_weights, row)))
                splat = builder.insert_element(nothing, weight, zero)
                splat = builder.shuffle_vector(splat, nothing, _indices([0] * _LANES))
                for v in range(_VECTORS):
                    total = sums[row, v]
                    builder.store(_added(builder, builder.load(total), pairs_of[v], splat), total)
        for row, v, place in places:
            stored = builder.store(builder.load(sums[row, v]), of_vector(5, place))
            stored.align = 4
        return context.get_dummy_value()

    return types.void(weights, at, panel, panel_at, pairs, totals, totals_at), codegen


@kernel
def multiply(weights: np.ndarray, pairs: int, tiles: int, panel: np.ndarray, totals: np.ndarray) -> None:
    """totals of the first tiles, int32 [tile · ROWS + row, 64 tokens] flat.

    weights: int32, [tile, pair, ROWS] flat; panel: int32, [pair, 64 tokens] flat.
    """
    totals[: tiles * ROWS * TOKENS] = 0
    for first in range(0, pairs, _SOME_PAIRS):
        n = min(_SOME_PAIRS, pairs - first)
        for tile in range(tiles):
            for token in range(0, TOKENS, _TILE_TOKENS):
                _add_tile(
                    weights, (tile * pairs + first) * ROWS, panel, first * TOKENS + token, n,
                    totals, tile * ROWS * TOKENS + token,
                )  # fmt: skip
