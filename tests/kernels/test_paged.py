"""Gather and scatter: Numba and torch forms against the readable one, for any plane map and any strides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_s3.errors import Bug
from lmcache_s3.kernels import paged, paged_reference

ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)]
"""Physical orders of [block, head, slot, content]: LBHNC, LBNHC, LHBNC."""


def make_views(
    rng: np.random.Generator, layers: int, shape: tuple[int, ...], order: tuple[int, ...], dtype: str
) -> list[np.ndarray]:
    info = np.iinfo(dtype)
    memory = rng.integers(0, info.max, size=[layers, *(shape[i] for i in order)], dtype=dtype, endpoint=True)
    return [memory[i].transpose(np.argsort(order)) for i in rng.permutation(layers)]


def host_layers(views: list[np.ndarray], plane: paged.PlaneMap) -> paged.HostLayers:
    """Layers that lie in one array: views of `memory[layer]`."""
    first, item = views[0], views[0].itemsize
    base = first
    while base.base is not None and isinstance(base.base, np.ndarray):
        base = base.base
    bases = [(view.ctypes.data - base.ctypes.data) // item for view in views]
    sb, sh, sn, sc = (s // item for s in first.strides)
    offsets = plane.offsets(sn, sc)
    return paged.HostLayers(base.reshape(-1), np.array(bases), first.shape[0], first.shape[1], sb, sh, offsets)


@dataclass
class Case:
    views: list[np.ndarray]
    plane: paged.PlaneMap
    ids: list[int]
    first: int
    heads: int
    rng: np.random.Generator


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kv, slots, dim = draw(st.sampled_from([1, 2])), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    blocks, heads = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    shape, order = (blocks, heads, slots, kv * dim), draw(st.sampled_from(ORDERS))
    views = make_views(rng, draw(st.integers(1, 3)), shape, order, draw(st.sampled_from(["uint8", "uint16"])))
    places = np.arange(kv * slots * dim).reshape(kv, slots, dim)
    planes = {
        "any": rng.permutation(kv * slots * dim).reshape(kv, slots, dim),
        "standard": paged.PlaneMap.standard(kv, slots, dim).index,
        "K transposed": np.stack([places[0].reshape(dim, slots).T, *places[1:]]),
    }
    plane = paged.PlaneMap(np.ascontiguousarray(planes[draw(st.sampled_from(sorted(planes)))]))
    ids = draw(st.permutations(range(blocks)))[: draw(st.integers(0, blocks))]
    first = draw(st.integers(0, heads - 1))
    return Case(views, plane, list(ids), first, draw(st.integers(1, heads - first)), rng)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_numba_and_torch_do_what_the_reference_does(case: Case) -> None:
    views, plane, ids, first = case.views, case.plane, case.ids, case.first
    kv, slots, dim = plane.index.shape
    dtype, every = views[0].dtype, range(len(views))
    shape = (kv, len(views), len(ids) * slots, case.heads, dim)
    layers, numbers = host_layers(views, plane), np.array(ids, dtype=np.int64)
    want, got = np.zeros(shape, dtype), np.zeros(shape, dtype)
    for i in every:
        paged_reference.gather(views[i], plane.index, ids, first, want[:, i])
    paged.gather(layers, every, numbers, first, got)
    assert np.array_equal(got, want)

    index, block_ids = torch.from_numpy(plane.index), torch.tensor(ids, dtype=torch.int64)
    whole = paged.gather_torch(torch.from_numpy(views[-1].astype(np.int32)), block_ids, index).numpy()
    assert np.array_equal(whole[:, :, first : first + case.heads], want[:, -1])

    whole_cell = case.rng.integers(0, 200, size=(*shape[:3], case.heads + 2, dim)).astype(dtype)
    cell = whole_cell[:, :, :, 1:-1]  # as other ranks' heads are cut off
    cell.flags.writeable = False
    expect = [view.copy() for view in views]
    for i in every[1:]:  # all but the first, which must stay as it is
        paged_reference.scatter(expect[i], plane.index, ids, first, cell[:, i])
    in_torch = torch.from_numpy(views[-1].astype(np.int32))
    paged.scatter_torch(in_torch, block_ids, index, first, torch.from_numpy(cell[:, -1].astype(np.int32)))
    paged.scatter(layers, every[1:], numbers, first, cell[:, 1:])
    assert all(np.array_equal(view, one) for view, one in zip(views, expect, strict=True))
    if len(views) > 1:
        assert np.array_equal(in_torch.numpy(), expect[-1])


def test_blocks_outside_the_engine_are_refused_before_anything_is_copied() -> None:
    view = np.zeros((3, 2, 4, 8), np.uint16)
    layers = host_layers([view], paged.PlaneMap.standard(2, 4, 4))
    cell = np.ones((2, 1, 4, 2, 4), np.uint16)
    for ids in ([3], [-1]):
        with pytest.raises(Bug, match="block"):
            paged.scatter(layers, range(1), np.array(ids), 0, cell)
    with pytest.raises(Bug, match="heads"):
        paged.scatter(layers, range(1), np.array([0]), 1, cell)
    with pytest.raises(Bug, match="does not fit"):
        paged.scatter(layers, range(1), np.array([0, 1]), 0, cell)
    with pytest.raises(Bug, match="layers"):
        paged.scatter(layers, range(1, 2), np.array([0]), 0, cell)
    assert not view.any()
