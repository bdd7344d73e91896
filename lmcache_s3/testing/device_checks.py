"""Checks of the GPU kernels against the CPU's, bit for bit: on a GPU, or in Triton's interpreter on a CPU.

The interpreter wants TRITON_INTERPRET=1 in the environment before Triton is first imported, so tests run these in
processes of their own; `lmcache-s3 bench gpu` runs them on the GPU before it measures anything. Each raises
`AssertionError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.cachegen import LEVELS, CachegenCodec, read_cell
from lmcache_s3.codecs.device import decode_cachegen, encode_cachegen
from lmcache_s3.codecs.dtypes import from_float32
from lmcache_s3.codecs.header import HEADER_BYTES, wrap
from lmcache_s3.errors import LMCacheS3Error, Unusable
from lmcache_s3.kernels.device_cachegen import Places
from lmcache_s3.kernels.paged import PlaneMap
from lmcache_s3.types import STORAGE_DTYPE, KVDtype

Shape = tuple[int, int, int, int, int]
Decode = Callable[[Sequence[bytes], CellSpec, Sequence[CellPosition | None], Places], Sequence[LMCacheS3Error | None]]
UNSIGNED = {name: np.dtype(f"u{np.dtype(stored).itemsize}") for name, stored in STORAGE_DTYPE.items()}
UNTOUCHED = 0xA5
"""What memory holds before; what is still there afterwards was not written."""


def some_cell(spec: CellSpec, seed: int, exponent: int = 0) -> np.ndarray:
    """Storage dtype, the spec's shape: heavy tails, an offset and a scale for each channel, all times 2^exponent."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal((*spec.shape[:2], 1, *spec.shape[3:])))
    values = rng.standard_t(4, spec.shape) * scale + rng.standard_normal(scale.shape)
    return from_float32(np.asarray(values * 2.0**exponent, np.float32), spec.kv_dtype)


def position_of(cell: int) -> CellPosition:
    """Every other cell begins a prompt, and so keeps its first token exact."""
    return CellPosition(bytes(16), cell % 2, 0, 0)


def memory(shape: tuple[int, ...], kv_dtype: KVDtype, device: torch.device) -> torch.Tensor:
    """Unsigned integers as wide as the kv dtype's, all of them marked as untouched."""
    bits = UNSIGNED[kv_dtype]
    return torch.from_numpy(np.full((*shape, bits.itemsize), UNTOUCHED, np.uint8).view(bits)[..., 0]).to(device)


def host(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array


def decoded_on_cpu(cells: Sequence[bytes], spec: CellSpec, codec: KVCodec | None = None) -> np.ndarray:
    """Bits as `memory` holds them, [cell, kv, layer, token, head, channel]; codec: `cachegen` if None."""
    out = np.empty((len(cells), *spec.shape), STORAGE_DTYPE[spec.kv_dtype])
    for i, data in enumerate(cells):
        (codec or CachegenCodec()).decode(data, spec, None, out[i])
    return out.view(UNSIGNED[spec.kv_dtype])


def check_verdicts(device: torch.device, codec: KVCodec, decode: Decode, cells: Sequence[bytes], spec: CellSpec) -> int:
    """Cells between untouched memory: each gets the CPU's verdict and bits, and no more. How many are usable."""
    padded = memory((len(cells), 3, *spec.shape), spec.kv_dtype, device)
    outcomes = decode(cells, spec, [None] * len(cells), Places.dense(padded[:, 1]))
    assert (host(padded[:, ::2]).view(np.uint8) == UNTOUCHED).all(), "written outside a cell"
    found = host(padded[:, 1])
    usable = 0
    for i, (data, outcome) in enumerate(zip(cells, outcomes, strict=True)):
        try:
            wanted = decoded_on_cpu([data], spec, codec)[0]
        except Unusable:
            assert outcome is not None, f"cell {i}: usable, but not so on the CPU"
            continue
        assert outcome is None, f"cell {i}: {outcome}, but usable on the CPU"
        assert np.array_equal(found[i], wanted), f"cell {i}: other bits than the CPU's"
        usable += 1
    return usable


def damaged(cells: Sequence[bytes], spec: CellSpec, mutations: int, first: int, seed: int) -> list[bytes]:
    """Copies of the cells in which up to three bytes from `first` of the payload on are wrong, the checksum right."""
    rng = np.random.default_rng(seed)
    out: list[bytes] = []
    for _ in range(mutations):
        payload = bytearray(cells[int(rng.integers(len(cells)))][HEADER_BYTES:])
        for _ in range(int(rng.integers(1, 4))):
            payload[int(rng.integers(first, len(payload)))] = int(rng.integers(256))
        out.append(wrap(bytes(payload), spec, position_of(int(rng.integers(2)))))
    return out


def stored_cells(spec: CellSpec, level: str, count: int, seed: int, exponent: int = 0) -> list[bytes]:
    codec = CachegenCodec(level)
    cells = [codec.encode(some_cell(spec, seed + i, exponent), spec, position_of(i)) for i in range(count)]
    assert all(read_cell(data, spec, None)[1] is not None for data in cells), f"{spec}: stored raw, nothing to check"
    return cells


def check_decode_dense(
    device: torch.device,
    shape: Shape,
    kv_dtype: KVDtype = "bfloat16",
    *,
    level: str = "medium",
    cells: int = 2,
    exponent: int = 0,
) -> None:
    """Into an array whose axes lie in another order, with gaps: the CPU's bits, and nothing in the gaps."""
    spec = CellSpec(shape, kv_dtype)
    stored = stored_cells(spec, level, cells, seed=1, exponent=exponent)
    kv, layers, tokens, heads, channels = shape
    whole = memory((layers, cells, heads, tokens, kv, channels + 3), kv_dtype, device)
    out = whole[..., :channels].permute(1, 4, 0, 3, 2, 5)
    outcomes = decode_cachegen(stored, spec, [position_of(i) for i in range(cells)], Places.dense(out))
    assert outcomes == [None] * cells, outcomes
    assert np.array_equal(host(out), decoded_on_cpu(stored, spec)), f"{spec}, {level}: other bits than the CPU's"
    assert (host(whole[..., channels:]).view(np.uint8) == UNTOUCHED).all(), "written between the rows"


def check_decode_raw(device: torch.device, kv_dtype: KVDtype) -> None:
    """Cells that were stored raw (here for a NaN) beside coded ones."""
    spec = CellSpec((2, 1, 24, 2, 16), kv_dtype)
    broken = some_cell(spec, 1)
    broken.view(UNSIGNED[kv_dtype])[0, 0, 2, 0, 3] = (1 << (8 * broken.itemsize - 1)) - 1
    codec = CachegenCodec("coarse")
    stored = [codec.encode(broken, spec, position_of(0)), *stored_cells(spec, "coarse", 1, seed=2)]
    out = memory((2, *spec.shape), kv_dtype, device)
    assert decode_cachegen(stored, spec, [None, None], Places.dense(out)) == [None, None]
    assert np.array_equal(host(out), decoded_on_cpu(stored, spec))


def check_decode_paged(device: torch.device, *, transposed: bool) -> None:
    """Into an engine's blocks, some heads of them; `transposed`: K lies channel by channel inside a block."""
    kv, layers, slots, heads, channels, first_head = 2, 2, 4, 2, 16, 1
    spec = CellSpec((kv, layers, 2 * slots, heads, channels), "bfloat16")
    blocks = np.array([[5, 2], [0, 3]])
    plane = PlaneMap.standard(kv, slots, channels)
    if transposed:
        index = plane.index.copy()
        index[0] = np.arange(slots * channels).reshape(channels, slots).T
        index[1] = slots * channels + np.arange(slots * channels).reshape(slots, channels)
        plane = PlaneMap(index)
    shape = (7, heads + first_head, slots, kv * channels)
    views = [memory(shape, "bfloat16", device) for _ in range(layers)]
    stored = stored_cells(spec, "medium", len(blocks), seed=5)
    places = Places.paged(views, blocks, plane, range(first_head, first_head + heads))
    assert places is not None
    assert decode_cachegen(stored, spec, [None, None], places) == [None, None]
    cells = decoded_on_cpu(stored, spec)
    for layer, view in enumerate(views):
        wanted = host(memory(shape, "bfloat16", device)).reshape(*shape[:2], -1)
        for (cell, b), block in np.ndenumerate(blocks):
            for head in range(heads):
                values = cells[cell, :, layer, b * slots : (b + 1) * slots, head]
                wanted[block, first_head + head, plane.index.reshape(-1)] = values.reshape(-1)
        assert np.array_equal(host(view).reshape(wanted.shape), wanted), f"layer {layer}: other bits than the CPU's"


def check_encode(
    device: torch.device,
    shape: Shape,
    kv_dtype: KVDtype = "bfloat16",
    *,
    level: str = "medium",
    exponent: int = 0,
) -> None:
    """From an array whose axes lie in another order: the CPU's bytes, of cells that are coded and one that is raw."""
    spec = CellSpec(shape, kv_dtype)
    kv, layers, tokens, heads, channels = shape
    cells = [some_cell(spec, seed, exponent).view(UNSIGNED[kv_dtype]) for seed in range(3)]
    cells[2][0, 0, 0, 0, 0] = (1 << (8 * cells[2].itemsize - 1)) - 1  # NaN
    whole = memory((layers, 3, heads, tokens, kv, channels + 3), kv_dtype, device)
    there = whole[..., :channels].permute(1, 4, 0, 3, 2, 5)
    there.copy_(torch.from_numpy(np.stack(cells)))
    positions = [position_of(1), position_of(0), position_of(1)]
    stored = encode_cachegen(Places.dense(there), spec, positions, level)
    assert [read_cell(data, spec, None)[1] is None for data in stored] == [False, False, True]
    for cell, position, data in zip(cells, positions, stored, strict=True):
        wanted = CachegenCodec(level).encode(cell.view(STORAGE_DTYPE[kv_dtype]), spec, position)
        assert data == wanted, f"{spec}, {level}: other bytes than the CPU's"


def check_damage(device: torch.device, mutations: int, seed: int = 0) -> None:
    """Cells that are damaged behind a right checksum, beside whole ones."""
    spec = CellSpec((2, 1, 8, 2, 16), "bfloat16")
    whole = stored_cells(spec, "fine", 2, seed=9)
    cells = damaged(whole, spec, mutations, 4, seed)
    assert check_verdicts(device, CachegenCodec(), decode_cachegen, [*cells, *whole], spec) >= len(whole)


def all_checks() -> dict[str, Callable[[torch.device], None]]:
    """What `bench gpu` runs before it measures, by what it shows: larger than what an interpreter could do."""
    large: Shape = (2, 4, 256, 8, 128)
    shapes: tuple[Shape, ...] = (large, (1, 3, 33, 1, 576), (2, 2, 64, 3, 64), (2, 2, 40, 5, 96), (2, 1, 65, 1, 5))
    dtypes: tuple[KVDtype, ...] = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")

    def both(device: torch.device, shape: Shape, kv_dtype: KVDtype, level: str, exponent: int = 0) -> None:
        check_decode_dense(device, shape, kv_dtype, level=level, exponent=exponent)
        check_encode(device, shape, kv_dtype, level=level, exponent=exponent)

    def shapes_and_levels(device: torch.device) -> None:
        for shape in shapes:
            for level in LEVELS:
                both(device, shape, "float32", level)

    def dtypes_and_ranges(device: torch.device) -> None:
        for kv_dtype in dtypes:
            for exponent in (-17, -5, 0, 8):
                both(device, (2, 2, 64, 2, 64), kv_dtype, "coarse", exponent)
            check_decode_raw(device, kv_dtype)

    def engine_blocks(device: torch.device) -> None:
        for transposed in (False, True):
            check_decode_paged(device, transposed=transposed)

    return {
        "shapes and levels": shapes_and_levels,
        "dtypes and ranges": dtypes_and_ranges,
        "an engine's blocks": engine_blocks,
        "2,000 damaged cells": lambda device: check_damage(device, 2000),
    }
