"""Where an engine keeps a token's K and V inside a block: learnt from the engine by writing through it.

vLLM hands connectors a view `[block, head, slot, content]`, but what lies at `[slot, content]` is the attention
backend's own affair: FlashAttention keeps each token's K and V side by side, the CPU backend keeps all K of a block
transposed and then all V. Cells are canonical, so we must know. We write numbered tokens into a scratch cache through
the backend's own cache update and read off where each number went. Works for any dtype that keeps small integers apart.

Raises `Invalid` (kind `engine`) where no consistent map comes out: the caller then stores and loads nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lmcache_s3.errors import Invalid
from lmcache_s3.kernels.paged import HostLayers, PlaneMap

_DIGITS, _PLACES = 8, 6
"""Numbers are written digit by digit as 1…8: integers that bf16, fp16, fp32 and both fp8 keep apart."""
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def learn_plane_map(attention: Any, view: torch.Tensor, head_dim: int) -> PlaneMap:
    """The plane map of one engine layer.

    attention: vLLM's attention layer (`.impl` with the backend's `do_kv_cache_update`). view: its cache, `[block, head,
    slot, content]`; only its shape, strides and dtype are used. head_dim: channels of K (and of V).
    """
    _, heads, slots, content = view.shape
    if content == head_dim:  # MLA: one latent, no K and V to tell apart
        return PlaneMap.standard(1, slots, head_dim)
    if content != 2 * head_dim:
        raise Invalid(f"engine layer holds {content} values a slot, not 2 × {head_dim}", kind="engine")
    impl = attention.impl
    if not hasattr(impl, "do_kv_cache_update"):
        if view.device.type == "cpu":
            raise Invalid(f"{type(impl).__name__} does not say how it lays out its cache", kind="engine")
        return PlaneMap.standard(2, slots, head_dim)
    writer = _Writer(attention, view, head_dim)
    digits = writer.digit_of_pattern()
    n = slots * head_dim
    numbers = np.arange(2 * n).reshape(2, slots, head_dim)
    found = np.zeros((heads, slots * content), dtype=np.int64)
    for power in range(_PLACES):
        written = writer.write((numbers // _DIGITS**power) % _DIGITS)
        found += np.vectorize(digits.__getitem__, otypes=[np.int64])(written) * _DIGITS**power
    if not (np.sort(found, axis=1) == np.arange(2 * n)).all() or (found != found[0]).any() or 2 * n > _DIGITS**_PLACES:
        raise Invalid(f"{type(impl).__name__} does not keep a block's K and V in one plane per head", kind="engine")
    index = np.empty(2 * n, dtype=np.int64)
    index[found[0]] = np.arange(2 * n)
    return PlaneMap(index.reshape(2, slots, head_dim))


def scratch_like(view: torch.Tensor, blocks: int) -> torch.Tensor:
    """So many blocks of zeros, shaped otherwise and laid out as an engine layer `[block, head, slot, content]`."""
    strides = view.stride()
    order = sorted(range(4), key=lambda axis: -strides[axis])
    shape = (blocks, *view.shape[1:])
    memory = torch.zeros([shape[axis] for axis in order], dtype=view.dtype, device=view.device)
    return memory.permute([order.index(axis) for axis in range(4)])


class _Writer:
    """A scratch cache of two blocks, written through the attention backend itself; block 1 is used, 0 must stay."""

    def __init__(self, attention: Any, view: torch.Tensor, head_dim: int) -> None:
        self._attention, self._head_dim = attention, head_dim
        self._cache = scratch_like(view, 2)
        self._slots = torch.arange(view.shape[2], device=view.device) + view.shape[2]
        # What a quantised cache's update divides K and V by. A checkpoint's may be so small that all digits saturate.
        # A little more, for rounding, be it to nearest or towards 0, to give the digit again.
        scales = [float(getattr(attention, name, 1.0)) for name in ("_k_scale_float", "_v_scale_float")]
        self._scales = np.array(scales).reshape(2, 1, 1) * (1 + 1 / 64)
        self._dtype = getattr(attention, "dtype", None) or view.dtype
        if not self._dtype.is_floating_point or self._dtype.itemsize == 1:
            self._dtype = torch.bfloat16

    def write(self, values: np.ndarray) -> np.ndarray:
        """values: int [kv, slot, channel], 0…7, the same for every head → stored patterns, [head, plane position]."""
        heads = self._cache.shape[1]
        kv = torch.from_numpy((values + 1) * self._scales).to(self._cache.device, self._dtype)
        k, v = (kv[i].unsqueeze(1).expand(-1, heads, -1).contiguous() for i in range(2))
        self._attention.impl.do_kv_cache_update(self._attention, k, v, self._cache, self._slots)
        patterns = self._cache.cpu().contiguous().view(_UNSIGNED[self._cache.dtype.itemsize]).numpy()
        if patterns[0].any():
            raise Invalid("the engine's cache update wrote outside its block", kind="engine")
        stored: np.ndarray = patterns[1].reshape(heads, -1)
        return stored

    def digit_of_pattern(self) -> dict[int, int]:
        """Which stored bits stand for which digit (K and V may be scaled differently)."""
        digits: dict[int, int] = {}
        shape = (2, len(self._slots), self._head_dim)
        for digit in range(_DIGITS):
            for pattern in np.unique(self.write(np.full(shape, digit))):
                if digits.setdefault(int(pattern), digit) != digit:
                    raise Invalid("the engine's cache dtype cannot keep small numbers apart", kind="engine")
        return digits


def host_layers(views: Sequence[torch.Tensor], plane: PlaneMap) -> HostLayers:
    """Engine layers in host memory as NumPy sees them, without a copy; they must be alike in shape, strides and dtype.

    The result does not keep the views alive: their owner must. Raises `Invalid` (kind `engine`).
    """
    first = views[0]
    item = first.dtype.itemsize
    span = 1 + sum((size - 1) * stride for size, stride in zip(first.shape, first.stride(), strict=True))
    starts = [view.data_ptr() for view in views]
    if any(view.stride() != first.stride() or view.shape != first.shape for view in views):
        raise Invalid("the engine's layers have different strides", kind="engine")
    low = min(starts)
    if any((start - low) % item for start in starts):
        raise Invalid("the engine's layers are not aligned alike", kind="engine")
    n_bytes = max(starts) - low + span * item
    memory = (ctypes.c_uint8 * n_bytes).from_address(low)
    flat = np.ctypeslib.as_array(memory).view(f"u{item}")
    bases = np.array([(start - low) // item for start in starts], np.int64)
    sb, sh, sn, sc = first.stride()
    return HostLayers(flat, bases, first.shape[0], first.shape[1], sb, sh, plane.offsets(sn, sc))
