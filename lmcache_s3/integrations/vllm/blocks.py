"""This rank's engine blocks as canonical arrays: which layers, which heads, and the copies in and out.

Arrays are `[kv, layer, token, head, channel]` in the storage dtype (unsigned integers for bf16 and fp8). Block ids are
the scheduler's; where the attention kernels use smaller blocks than the scheduler, ids are translated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lmcache_s3.errors import Bug, Invalid
from lmcache_s3.integrations.vllm.layout import host_layers, learn_plane_map, scratch_like
from lmcache_s3.integrations.vllm.model import ModelFacts, rank_layers
from lmcache_s3.kernels import paged
from lmcache_s3.types import ITEM_BYTES, STORAGE_DTYPE, Geometry, Grid

_BITS: dict[int, np.dtype[Any]] = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


@dataclass
class EngineBlocks:
    """layers, heads: this rank's places in the whole model. `kernel_blocks`: kernel blocks per scheduler block."""

    layers: range
    heads: range
    kernel_blocks: int
    block_tokens: int
    storage: np.dtype[Any]
    plane: paged.PlaneMap
    views: list[torch.Tensor]
    host: paged.HostLayers | None

    @classmethod
    def learn(
        cls,
        kv_caches: dict[str, torch.Tensor],
        attention_layers: Mapping[str, Any],
        facts: ModelFacts,
        tensor_rank: int,
    ) -> EngineBlocks:
        names, layers = rank_layers(list(kv_caches))
        views = [kv_caches[name] for name in names]
        heads = facts.heads_of(tensor_rank)
        for name, view in zip(names, views, strict=True):
            alike = view.shape == views[0].shape and view.dtype == views[0].dtype
            same_backend = type(attention_layers[name].impl) is type(attention_layers[names[0]].impl)
            if not alike or not same_backend:
                raise Invalid(f"engine layer {name}: not kept as layer {names[0]} is", kind="engine")
            if view.dim() != 4 or view.shape[1] != len(heads):
                raise Invalid(
                    f"engine layer {name}: {tuple(view.shape)} is not [block, {len(heads)} heads, slot, content]",
                    kind="engine",
                )
        plane = learn_plane_map(attention_layers[names[0]], views[0], facts.group.head_dim)
        if plane.index.shape[0] != facts.group.kv or facts.block_tokens % plane.slots:
            raise Invalid(f"engine blocks of {plane.slots} slots do not divide {facts.block_tokens}", kind="engine")
        on_host = views[0].device.type == "cpu"
        blocks = cls(
            layers,
            heads,
            facts.block_tokens // plane.slots,
            facts.block_tokens,
            np.dtype(STORAGE_DTYPE[facts.kv_dtype]),
            plane,
            views,
            host_layers(views, plane) if on_host else None,
        )
        blocks.warm_up()
        return blocks

    def warm_up(self) -> None:
        """Compile the copies now, with no blocks at all, so that no request waits for it."""
        nothing = np.empty(0, dtype=np.int64)
        self.scatter(nothing, self.layers, self.heads, self.gather(nothing))

    def chunk_bytes(self, geometry: Geometry) -> int:
        """Raw bytes of one chunk's part on this rank."""
        per_token = geometry.kv * len(self.layers) * len(self.heads) * geometry.head_dim
        return per_token * geometry.chunk_tokens * ITEM_BYTES[geometry.kv_dtype]

    def covers(self, geometry: Geometry, grid: Grid, shard: int) -> bool:
        """Is this shard's cell wholly on this rank?"""
        layers, heads = geometry.cell_layers(grid, shard), geometry.cell_heads(grid, shard)
        return (
            self.layers.start <= layers.start
            and layers.stop <= self.layers.stop
            and self.heads.start <= heads.start
            and heads.stop <= self.heads.stop
        )

    def local_heads(self, heads: range) -> range:
        return range(heads.start - self.heads.start, heads.stop - self.heads.start)

    def ids(self, block_ids: Sequence[int], begin_token: int, end_token: int) -> np.ndarray:
        """Kernel block ids for tokens begin … end−1, counted from the first of `block_ids`; both block-aligned."""
        size = self.block_tokens
        if begin_token % size or end_token % size or not 0 <= begin_token <= end_token <= len(block_ids) * size:
            raise Bug(f"tokens {begin_token}…{end_token} do not lie on {len(block_ids)} blocks of {size}", kind="shape")
        ids = np.asarray(block_ids[begin_token // size : end_token // size], dtype=np.int64)
        return (ids[:, None] * self.kernel_blocks + np.arange(self.kernel_blocks)).reshape(-1)

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """All of this rank's layers and heads of these blocks → a new array in host memory."""
        kv, slots, channels = self.plane.index.shape
        shape = (kv, len(self.views), len(ids) * slots, len(self.heads), channels)
        if self.host is not None:
            out = np.empty(shape, dtype=self.host.flat.dtype)
            paged.gather(self.host, range(len(self.views)), ids, 0, out)
            return out.view(self.storage)
        device = self.views[0].device
        block_ids, index = torch.from_numpy(ids).to(device), torch.from_numpy(self.plane.index).to(device)
        whole = torch.stack([paged.gather_torch(integers(view), block_ids, index) for view in self.views], dim=1)
        return _bits(whole.cpu()).view(self.storage)

    def mark(self) -> torch.cuda.Event | None:
        """The engine's work queued so far, on the thread that queues it; None on a CPU, where it is done already."""
        if self.views[0].device.type != "cuda":
            return None
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.views[0].device))
        return event

    def scatter(
        self, ids: np.ndarray, layers: range, heads: range, cell: np.ndarray, *, after: torch.cuda.Event | None = None
    ) -> None:
        """`cell` [kv, layer, token, head, channel] → these blocks, at these layers and heads of the model.

        after: a `mark`. The engine queues work ahead, and what was queued before may still write to these blocks.
        """
        bits = cell.view(_BITS[cell.dtype.itemsize])
        first_head = heads.start - self.heads.start
        if self.host is not None:
            mine = range(layers.start - self.layers.start, layers.stop - self.layers.start)
            paged.scatter(self.host, mine, ids, first_head, bits)
            return
        view = self.views[0]
        if after is not None:
            torch.cuda.current_stream(view.device).wait_event(after)
        try:
            self.scatter_there(ids, layers, heads, torch.from_numpy(np.ascontiguousarray(bits)).to(view.device))
        finally:  # also if a later layer failed: nothing may be written once anybody was told
            if view.device.type == "cuda":
                torch.cuda.current_stream(view.device).synchronize()

    def scatter_there(self, ids: np.ndarray, layers: range, heads: range, cell: torch.Tensor) -> None:
        """`scatter` of a cell, unsigned integers, that lies on the blocks' device; queued on its current stream."""
        view = self.views[0]
        block_ids, index = torch.from_numpy(ids).to(view.device), torch.from_numpy(self.plane.index).to(view.device)
        for i, place in enumerate(layers):
            layer = integers(self.views[place - self.layers.start])
            paged.scatter_torch(layer, block_ids, index, heads.start - self.heads.start, integers(cell[:, i]))

    def twin(self, blocks: int, layers: int) -> EngineBlocks:
        """So many blocks of memory of our own, zeros, laid out as the engine's: of a model of so many layers and this
        rank's heads."""
        views = [scratch_like(view, blocks) for view in self.views[:layers]]
        host = None if self.host is None else host_layers(views, self.plane)
        return replace(self, layers=range(layers), heads=range(len(self.heads)), views=views, host=host)


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as signed integers, which every device can index; fp8 and unsigned ones not all can."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def _bits(tensor: torch.Tensor) -> np.ndarray:
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[tensor.dtype.itemsize]
    array: np.ndarray = tensor.contiguous().view(unsigned).numpy()
    return array
