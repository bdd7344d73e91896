"""Gather and scatter: Numba and torch forms against the readable one, for any plane map and any strides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_s3.errors import Bug
from lmcache_s3.kernels import paged, paged_reference

ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)]
"""Physical orders of [block, head, slot, content]: LBHNC, LBNHC, LHBNC."""


def make_view(rng: np.random.Generator, shape: tuple[int, ...], order: tuple[int, ...], dtype: str) -> np.ndarray:
    info = np.iinfo(dtype)
    memory = rng.integers(0, info.max, size=[shape[i] for i in order], dtype=dtype, endpoint=True)
    return memory.transpose(np.argsort(order))


def host_layer(view: np.ndarray, plane: paged.PlaneMap) -> paged.HostLayer:
    item = view.itemsize
    base = view
    while base.base is not None and isinstance(base.base, np.ndarray):
        base = base.base
    sb, sh, sn, sc = (s // item for s in view.strides)
    return paged.HostLayer(base.reshape(-1), view.shape[0], view.shape[1], sb, sh, plane.offsets(sn, sc))


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, paged.PlaneMap, list[int], int, int, np.random.Generator]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kv, slots, dim = draw(st.sampled_from([1, 2])), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    blocks, heads = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    view = make_view(
        rng, (blocks, heads, slots, kv * dim), draw(st.sampled_from(ORDERS)), draw(st.sampled_from(["uint8", "uint16"]))
    )
    index = rng.permutation(kv * slots * dim).reshape(kv, slots, dim)
    plane = draw(st.sampled_from([paged.PlaneMap(index), paged.PlaneMap.standard(kv, slots, dim)]))
    ids = draw(st.permutations(range(blocks)))[: draw(st.integers(0, blocks))]
    first = draw(st.integers(0, heads - 1))
    return view, plane, list(ids), first, draw(st.integers(1, heads - first)), rng


@settings(max_examples=60, deadline=None)
@given(cases())
def test_numba_and_torch_do_what_the_reference_does(case: tuple) -> None:
    view, plane, ids, first, n_heads, rng = case
    kv, slots, dim = plane.index.shape
    shape = (kv, len(ids) * slots, n_heads, dim)
    layer = host_layer(view, plane)
    want, got = np.zeros(shape, view.dtype), np.zeros(shape, view.dtype)
    paged_reference.gather(view, plane.index, ids, first, want)
    paged.gather(layer, np.array(ids, dtype=np.int64), first, got)
    assert np.array_equal(got, want)

    index, block_ids = torch.from_numpy(plane.index), torch.tensor(ids, dtype=torch.int64)
    whole = paged.gather_torch(torch.from_numpy(view.astype(np.int32)), block_ids, index).numpy()
    assert np.array_equal(whole[:, :, first : first + n_heads], want)

    cell = rng.integers(0, 200, size=shape).astype(view.dtype)
    expect = view.copy()
    paged_reference.scatter(expect, plane.index, ids, first, cell)
    in_torch = torch.from_numpy(view.astype(np.int32))
    paged.scatter_torch(in_torch, block_ids, index, first, torch.from_numpy(cell.astype(np.int32)))
    paged.scatter(layer, np.array(ids, dtype=np.int64), first, cell)
    assert np.array_equal(view, expect)
    assert np.array_equal(in_torch.numpy(), expect)


def test_blocks_outside_the_engine_are_refused_before_anything_is_copied() -> None:
    view = np.zeros((3, 2, 4, 8), np.uint16)
    layer = host_layer(view, paged.PlaneMap.standard(2, 4, 4))
    cell = np.ones((2, 4, 2, 4), np.uint16)
    for ids in ([3], [-1]):
        with pytest.raises(Bug, match="block"):
            paged.scatter(layer, np.array(ids), 0, cell)
    with pytest.raises(Bug, match="heads"):
        paged.scatter(layer, np.array([0]), 1, cell)
    with pytest.raises(Bug, match="does not fit"):
        paged.scatter(layer, np.array([0, 1]), 0, cell)
    assert not view.any()
