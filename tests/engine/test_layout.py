"""The plane map is learnt by writing through a real attention backend's cache update, and then reads true."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

vllm = pytest.importorskip("vllm", reason="the real vLLM is needed: make setup")

from lmcache_s3.errors import Invalid  # noqa: E402
from lmcache_s3.integrations.vllm.blocks import EngineBlocks  # noqa: E402
from lmcache_s3.integrations.vllm.layout import host_layers, learn_plane_map, scratch_like  # noqa: E402
from lmcache_s3.kernels import paged  # noqa: E402

pytestmark = pytest.mark.engine


def cpu_attention(block: int, head_dim: int, dtype: torch.dtype, cache_dtype: str = "auto") -> Any:
    """vLLM's CPU attention, as far as its cache update needs it: the real method over the real kernel."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

    class Impl(CPUAttentionBackendImpl):
        def __init__(self) -> None:
            self.attn_type, self.kv_cache_dtype = "decoder", cache_dtype

    isa = _get_attn_isa(dtype, block, head_dim, cache_dtype)
    return SimpleNamespace(impl=Impl(), isa=isa, _k_scale_float=1.0, _v_scale_float=1.0, dtype=dtype)


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_the_engine_writes_is_read_at_its_true_place(block: int, head_dim: int, dtype: torch.dtype) -> None:
    heads, n_blocks = 3, 4
    attention = cpu_attention(block, head_dim, dtype)
    cache = torch.zeros(n_blocks, heads, block, 2 * head_dim, dtype=dtype)
    plane = learn_plane_map(attention, cache, head_dim)
    assert not cache.any(), "the engine's own cache is never touched"

    generator = torch.Generator().manual_seed(7)
    tokens = 2 * block
    k, v = (torch.randn(tokens, heads, head_dim, generator=generator).to(dtype) for _ in range(2))
    block_ids = [3, 1]
    slots = torch.cat([torch.arange(block) + b * block for b in block_ids])
    attention.impl.do_kv_cache_update(attention, k, v, cache, slots)
    layers = host_layers([cache], plane)
    out = np.zeros((2, 1, tokens, heads, head_dim), dtype=layers.flat.dtype)
    paged.gather(layers, range(1), np.array(block_ids), 0, out)
    truth = torch.stack([k, v]).view({2: torch.uint16, 4: torch.uint32}[dtype.itemsize]).numpy()
    assert np.array_equal(out[:, 0], truth)

    copy = torch.zeros_like(cache)
    paged.scatter(host_layers([copy], plane), range(1), np.array(block_ids), 0, out)
    assert torch.equal(copy, cache)


@pytest.mark.parametrize("cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.25, 0.004), (40.0, 3.3), (0.0117, 0.0771)])
def test_a_coarse_cache_and_a_checkpoints_scales_do_not_hide_the_layout(
    cache_dtype: str, scales: tuple[float, float]
) -> None:
    """What is written is divided by K's or V's scale, and then rounded to 3 or 2 bits behind the first."""
    attention = cpu_attention(32, 64, torch.bfloat16, cache_dtype)
    attention._k_scale_float, attention._v_scale_float = scales
    found = learn_plane_map(attention, torch.zeros(4, 3, 32, 128, dtype=torch.uint8), 64)
    plain = cpu_attention(32, 64, torch.bfloat16, "fp8_e4m3")
    assert np.array_equal(found.index, learn_plane_map(plain, torch.zeros(4, 3, 32, 128, dtype=torch.uint8), 64).index)


def test_a_backend_that_mixes_heads_is_refused() -> None:
    class Impl:
        def do_kv_cache_update(self, layer: Any, k: Any, v: Any, cache: torch.Tensor, slots: Any) -> None:
            cache[1, 0] = 1  # everything in one head

    attention = SimpleNamespace(impl=Impl(), dtype=torch.bfloat16)
    with pytest.raises(Invalid, match="keep"):
        learn_plane_map(attention, torch.zeros(2, 2, 8, 16, dtype=torch.bfloat16), 8)


def test_a_backend_that_writes_past_its_block_is_refused() -> None:
    class Impl:
        def do_kv_cache_update(self, layer: Any, k: Any, v: Any, cache: torch.Tensor, slots: Any) -> None:
            cache += 1

    attention = SimpleNamespace(impl=Impl(), dtype=torch.bfloat16)
    with pytest.raises(Invalid, match="outside its block"):
        learn_plane_map(attention, torch.zeros(2, 2, 8, 16, dtype=torch.bfloat16), 8)


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [(torch.bfloat16, "u2"), (torch.float8_e4m3fn, "u1"), (torch.uint8, "u1"), (torch.float32, "f4")],
)
def test_a_devices_copies_are_the_hosts(dtype: torch.dtype, storage: str) -> None:
    """What runs where blocks lie on a GPU, on memory that the host sees, too: a permuted layout, bits of any kind."""
    slots, heads, channels = 4, 3, 8
    view = torch.zeros(7, slots, heads, 2 * channels, dtype=dtype).transpose(1, 2)
    plane = paged.PlaneMap.standard(2, slots, channels)
    views = [scratch_like(view, 7) for _ in range(2)]
    assert views[0].stride() == view.stride()
    host = EngineBlocks(range(2), range(heads), 1, slots, np.dtype(storage), plane, views, host_layers(views, plane))
    device = dataclasses.replace(host, host=None)
    ids = np.array([5, 2])
    bits = np.random.default_rng(0).integers(
        0, 256, (2, 2, 2 * slots, 2, channels * np.dtype(storage).itemsize), np.uint8
    )
    cell = bits.view(storage)
    device.scatter(ids, range(2), range(1, 3), cell)
    assert host.gather(ids)[:, :, :, 1:].tobytes() == cell.tobytes()
    assert device.gather(ids).tobytes() == host.gather(ids).tobytes()
    assert not host.gather(np.array([0, 1, 3, 4, 6])).view(np.uint8).any()
    twin = host.twin(3, 1)
    assert (len(twin.views), twin.views[0].shape, twin.views[0].stride()) == (1, (3, *view.shape[1:]), view.stride())
