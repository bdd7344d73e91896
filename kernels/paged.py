"""Copies between an engine's paged KV blocks and cells: gather and scatter.

An engine layer is a view `[block, head, slot, content]` of any strides. Where token n's channel d of K or V lies inside
one (block, head) *plane* is the engine's own affair (vLLM's CPU backend transposes K inside a block); a `PlaneMap` says
it, learnt from the engine by `lmcache_s3.integrations.vllm.layout`. Cells are `[kv, layer, token, head, channel]`; the
torch forms take one layer at a time.

Three forms with the same results: `gather`/`scatter` (Numba, host memory, no GIL), `gather_torch`/`scatter_torch` (any
torch device), and the readable one in `paged_reference.py`. No I/O, no configuration; bits are copied, never converted.
Raises `Bug` when blocks or shapes do not fit; nothing is copied then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from lmcache_s3.errors import Bug
from lmcache_s3.kernels.jit import kernel

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PlaneMap:
    """index: int64 [kv, slot, channel] → flat position in the logical `[slot, content]` plane of one block and head."""

    index: np.ndarray

    @classmethod
    def standard(cls, kv: int, slots: int, head_dim: int) -> PlaneMap:
        """Content = K channels, then V channels (or MLA's one latent), each slot on its own."""
        content = kv * head_dim
        s, n, d = np.ogrid[:kv, :slots, :head_dim]
        return cls(np.ascontiguousarray(n * content + s * head_dim + d, dtype=np.int64))

    @property
    def slots(self) -> int:
        return int(self.index.shape[1])

    def offsets(self, slot_stride: int, content_stride: int) -> np.ndarray:
        """The same in elements of memory, for a view with these strides (in elements)."""
        kv, _, head_dim = self.index.shape
        slot, content = np.divmod(self.index, kv * head_dim)
        return np.ascontiguousarray(slot * slot_stride + content * content_stride)


@dataclass(frozen=True, slots=True)
class HostLayers:
    """Engine layers in host memory, alike but for where they begin. Strides in elements.

    flat: 1-D unsigned integers over memory from the first of them to the last. bases: int64 [layer], where each begins.
    offsets: int64 [kv, slot, channel], from a plane's beginning. steps: int64 [kv, 3], (first, per slot, per channel)
    where they make up the offsets; empty where no such steps do (a packed layout).
    """

    flat: np.ndarray
    bases: np.ndarray
    blocks: int
    heads: int
    block_stride: int
    head_stride: int
    offsets: np.ndarray
    steps: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        last = (self.blocks - 1) * self.block_stride + (self.heads - 1) * self.head_stride + int(self.offsets.max())
        if int(self.bases.max()) + last >= self.flat.size or min(int(self.offsets.min()), int(self.bases.min())) < 0:
            raise Bug(f"engine layers: strides reach element {last} of {self.flat.size}", kind="layout")
        object.__setattr__(self, "steps", _steps(self.offsets))


def _steps(offsets: np.ndarray) -> np.ndarray:
    kv, slots, channels = offsets.shape
    n, d = np.ogrid[:slots, :channels]
    steps = np.zeros((kv, 3), np.int64)
    for s in range(kv):
        plane = offsets[s]
        steps[s, 0] = plane[0, 0]
        steps[s, 1] = plane[1, 0] - plane[0, 0] if slots > 1 else 1
        steps[s, 2] = plane[0, 1] - plane[0, 0] if channels > 1 else 1
        if not np.array_equal(plane, steps[s, 0] + n * steps[s, 1] + d * steps[s, 2]):
            return np.zeros((0, 3), np.int64)
    return steps


def _gather(flat: Any, bases: Any, head_stride: int, offsets: Any, steps: Any, out: Any) -> None:
    kv, slots, channels = offsets.shape
    for i in range(bases.shape[0]):
        for b in range(bases.shape[1]):
            first = b * slots
            for h in range(out.shape[3]):
                base = bases[i, b] + h * head_stride
                for s in range(kv):
                    if not len(steps):
                        for n in range(slots):
                            for d in range(channels):
                                out[s, i, first + n, h, d] = flat[base + offsets[s, n, d]]
                    elif steps[s, 1] == 1:  # transposed: run along memory, which is along the slots
                        for d in range(channels):
                            place = base + steps[s, 0] + d * steps[s, 2]
                            for n in range(slots):
                                out[s, i, first + n, h, d] = flat[place + n]
                    else:
                        for n in range(slots):
                            place = base + steps[s, 0] + n * steps[s, 1]
                            for d in range(channels):
                                out[s, i, first + n, h, d] = flat[place + d * steps[s, 2]]


def _scatter(flat: Any, bases: Any, head_stride: int, offsets: Any, steps: Any, cell: Any) -> None:
    kv, slots, channels = offsets.shape
    for i in range(bases.shape[0]):
        for b in range(bases.shape[1]):
            first = b * slots
            for h in range(cell.shape[3]):
                base = bases[i, b] + h * head_stride
                for s in range(kv):
                    if not len(steps):
                        for n in range(slots):
                            for d in range(channels):
                                flat[base + offsets[s, n, d]] = cell[s, i, first + n, h, d]
                    elif steps[s, 1] == 1:
                        for d in range(channels):
                            place = base + steps[s, 0] + d * steps[s, 2]
                            for n in range(slots):
                                flat[place + n] = cell[s, i, first + n, h, d]
                    else:
                        for n in range(slots):
                            place = base + steps[s, 0] + n * steps[s, 1]
                            for d in range(channels):
                                flat[place + d * steps[s, 2]] = cell[s, i, first + n, h, d]


def _copy_runs(
    target: Any, source: Any, bases: Any, head_stride: int, steps: Any, strides: Any, shape: Any, run: int, back: bool
) -> None:
    """Runs of `run` elements between engine memory and a cell, both flat; strides: the cell's. back: engine → cell."""
    heads, slots = shape
    for i in range(bases.shape[0]):
        for b in range(bases.shape[1]):
            for s in range(steps.shape[0]):
                for n in range(slots):
                    here = bases[i, b] + steps[s, 0] + n * steps[s, 1]
                    there = s * strides[0] + i * strides[1] + (b * slots + n) * strides[2]
                    for h in range(heads):
                        # Unsigned, so that no index needs a look at its sign: else nothing is vectorised.
                        p, q = np.uint64(here + h * head_stride), np.uint64(there + h * strides[3])
                        if back:
                            p, q = q, p
                        for d in range(np.uint64(run)):
                            target[p + d] = source[q + d]


@cache
def _compiled_runs(dtype: str) -> Callable[..., None]:
    element = numba.from_dtype(np.dtype(dtype))
    array, numbers = numba.types.Array, numba.types.int64
    bases, steps = array(numbers, 2, "C", readonly=True), array(numbers, 2, "C", readonly=True)
    signature = numba.types.void(
        array(element, 1, "C"),
        array(element, 1, "C", readonly=True),
        bases,
        numbers,
        steps,
        array(numbers, 1, "C", readonly=True),
        numba.types.UniTuple(numbers, 2),
        numbers,
        numba.types.boolean,
    )
    return kernel(_copy_runs, signature)


def _in_runs(where: HostLayers, bases: np.ndarray, cell: np.ndarray, *, back: bool) -> bool:
    """Copy by runs of channels where both sides keep a token's channels side by side: several times as fast. Whether it
    was done."""
    item = cell.dtype.itemsize
    if not len(where.steps) or (where.steps[:, 2] != 1).any() or cell.strides[4] != item or min(cell.strides) < 0:
        return False
    strides = np.array(cell.strides, np.int64)
    if cell.size == 0 or (strides % item).any():
        return cell.size == 0
    strides //= item
    span = 1 + int(((np.array(cell.shape) - 1) * strides).sum())
    flat = np.lib.stride_tricks.as_strided(cell, (span,), (item,), writeable=back)
    target, source = (flat, where.flat) if back else (where.flat, flat)
    slots = where.offsets.shape[1]
    run = _compiled_runs(where.flat.dtype.name)
    run(target, source, bases, where.head_stride, where.steps, strides, (cell.shape[3], slots), cell.shape[4], back)
    return True


@cache
def _compiled(dtype: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """(gather, scatter) for one unsigned type: compiled now and once, for cells of any strides, writeable or not.

    One call a cell, not one a layer: each takes the GIL again when it is done, and may wait for it.
    """
    element = numba.from_dtype(np.dtype(dtype))
    array, numbers = numba.types.Array, numba.types.int64
    flat, bases = array(element, 1, "C"), array(numbers, 2, "C", readonly=True)
    offsets, steps = array(numbers, 3, "C", readonly=True), array(numbers, 2, "C", readonly=True)
    common = (flat, bases, numbers, offsets, steps)
    none = numba.types.void
    return (
        kernel(_gather, none(*common, array(element, 5, "A"))),
        kernel(_scatter, none(*common, array(element, 5, "A", readonly=True))),
    )


def _bases(where: HostLayers, layers: range, block_ids: np.ndarray, first_head: int, cell: np.ndarray) -> np.ndarray:
    """Where each layer's and block's first plane begins, int64 [layer, block], after everything was checked."""
    kv, slots, channels = where.offsets.shape
    heads = cell.shape[3]
    if cell.shape != (kv, len(layers), len(block_ids) * slots, heads, channels) or cell.dtype != where.flat.dtype:
        raise Bug(
            f"cell {cell.dtype}{cell.shape} does not fit {len(layers)} layers, {len(block_ids)} blocks of "
            f"[{kv}, {slots}, {channels}] {where.flat.dtype}",
            kind="shape",
        )
    if len(block_ids) and not (int(block_ids.min()) >= 0 and int(block_ids.max()) < where.blocks):
        raise Bug(f"block {int(block_ids.max())} is outside the engine's {where.blocks}", kind="shape")
    if not 0 <= first_head <= first_head + heads <= where.heads:
        raise Bug(f"heads {first_head}…{first_head + heads} are outside the engine's {where.heads}", kind="shape")
    if not 0 <= layers.start <= layers.stop <= len(where.bases):
        raise Bug(f"layers {layers} are outside the engine's {len(where.bases)}", kind="shape")
    blocks = np.asarray(block_ids, dtype=np.int64) * where.block_stride + first_head * where.head_stride
    return np.ascontiguousarray(where.bases[layers.start : layers.stop, None] + blocks[None])


def gather(where: HostLayers, layers: range, block_ids: np.ndarray, first_head: int, out: np.ndarray) -> None:
    """Engine blocks → `out` [kv, layer, token, head, channel] (any strides, the layers' unsigned dtype).

    layers: which of the engine's; heads first_head … as many as `out` has.
    """
    bases = _bases(where, layers, block_ids, first_head, out)
    if _in_runs(where, bases, out, back=True):
        return
    run, _ = _compiled(where.flat.dtype.name)
    run(where.flat, bases, where.head_stride, where.offsets, where.steps, out)


def scatter(where: HostLayers, layers: range, block_ids: np.ndarray, first_head: int, cell: np.ndarray) -> None:
    """`cell` [kv, layer, token, head, channel] → engine blocks; the other way round."""
    bases = _bases(where, layers, block_ids, first_head, cell)
    if _in_runs(where, bases, cell, back=False):
        return
    _, run = _compiled(where.flat.dtype.name)
    run(where.flat, bases, where.head_stride, where.offsets, where.steps, cell)


def gather_torch(view: torch.Tensor, block_ids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Engine layer `[block, head, slot, content]` → [kv, token, head, channel], same device and dtype.

    index: `PlaneMap.index` as an int64 tensor on the view's device.
    """
    n, heads = int(block_ids.shape[0]), int(view.shape[1])
    kv, slots, channels = index.shape
    planes = view.index_select(0, block_ids).reshape(n, heads, index.numel()).index_select(2, index.reshape(-1))
    return planes.view(n, heads, kv, slots, channels).permute(2, 0, 3, 1, 4).reshape(kv, n * slots, heads, channels)


def scatter_torch(
    view: torch.Tensor, block_ids: torch.Tensor, index: torch.Tensor, first_head: int, cell: torch.Tensor
) -> None:
    """`cell` [kv, token, head, channel] (the view's device and dtype) → engine blocks, heads first_head … ."""
    n, heads = int(block_ids.shape[0]), int(cell.shape[2])
    kv, slots, channels = index.shape
    planes = cell.reshape(kv, n, slots, heads, channels).permute(1, 3, 0, 2, 4).reshape(n, heads, kv * slots * channels)
    content = int(view.shape[3])
    inverse = index.reshape(-1).argsort()
    view[block_ids, first_head : first_head + heads] = planes.index_select(2, inverse).view(n, heads, slots, content)
