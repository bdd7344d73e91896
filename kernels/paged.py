"""Copies between an engine's paged KV blocks and cells: gather and scatter.

An engine layer is a view `[block, head, slot, content]` of any strides. Where token n's channel d of K or V lies inside
one (block, head) *plane* is the engine's own affair (vLLM's CPU backend transposes K inside a block); a `PlaneMap` says
it, learnt from the engine by `lmcache_s3.integrations.vllm.layout`. Cells are `[kv, token, head, channel]` per layer.

Three forms with the same results: `gather`/`scatter` (Numba, host memory, no GIL), `gather_torch`/`scatter_torch` (any
torch device), and the readable one in `paged_reference.py`. No I/O, no configuration; bits are copied, never converted.
Raises `Bug` when blocks or shapes do not fit; nothing is copied then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from lmcache_s3.errors import Bug

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
class HostLayer:
    """One engine layer in host memory. `flat`: 1-D unsigned integers over the layer's memory; strides in elements."""

    flat: np.ndarray
    blocks: int
    heads: int
    block_stride: int
    head_stride: int
    offsets: np.ndarray

    def __post_init__(self) -> None:
        last = (self.blocks - 1) * self.block_stride + (self.heads - 1) * self.head_stride + int(self.offsets.max())
        if last >= self.flat.size or int(self.offsets.min()) < 0:
            raise Bug(f"engine layer: strides reach element {last} of {self.flat.size}", kind="layout")


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _gather(flat: Any, bases: Any, head_stride: int, offsets: Any, out: Any) -> None:
    kv, slots, channels = offsets.shape
    for b in range(bases.shape[0]):
        for h in range(out.shape[2]):
            base = bases[b] + h * head_stride
            for s in range(kv):
                for n in range(slots):
                    for d in range(channels):
                        out[s, b * slots + n, h, d] = flat[base + offsets[s, n, d]]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _scatter(flat: Any, bases: Any, head_stride: int, offsets: Any, cell: Any) -> None:
    kv, slots, channels = offsets.shape
    for b in range(bases.shape[0]):
        for h in range(cell.shape[2]):
            base = bases[b] + h * head_stride
            for s in range(kv):
                for n in range(slots):
                    for d in range(channels):
                        flat[base + offsets[s, n, d]] = cell[s, b * slots + n, h, d]


def _bases(layer: HostLayer, block_ids: np.ndarray, first_head: int, cell: np.ndarray) -> np.ndarray:
    kv, slots, channels = layer.offsets.shape
    heads = cell.shape[2]
    if cell.shape != (kv, len(block_ids) * slots, heads, channels) or cell.dtype != layer.flat.dtype:
        raise Bug(
            f"cell {cell.dtype}{cell.shape} does not fit {len(block_ids)} blocks of [{kv}, {slots}, {channels}] "
            f"{layer.flat.dtype}",
            kind="shape",
        )
    if len(block_ids) and not (int(block_ids.min()) >= 0 and int(block_ids.max()) < layer.blocks):
        raise Bug(f"block {int(block_ids.max())} is outside the engine's {layer.blocks}", kind="shape")
    if not 0 <= first_head <= first_head + heads <= layer.heads:
        raise Bug(f"heads {first_head}…{first_head + heads} are outside the engine's {layer.heads}", kind="shape")
    return np.asarray(block_ids, dtype=np.int64) * layer.block_stride + first_head * layer.head_stride


def gather(layer: HostLayer, block_ids: np.ndarray, first_head: int, out: np.ndarray) -> None:
    """Engine blocks → `out` [kv, token, head, channel] (any strides, the layer's unsigned dtype)."""
    _gather(layer.flat, _bases(layer, block_ids, first_head, out), layer.head_stride, layer.offsets, out)


def scatter(layer: HostLayer, block_ids: np.ndarray, first_head: int, cell: np.ndarray) -> None:
    """`cell` [kv, token, head, channel] → engine blocks, heads first_head … ."""
    _scatter(layer.flat, _bases(layer, block_ids, first_head, cell), layer.head_stride, layer.offsets, cell)


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
