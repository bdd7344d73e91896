"""Checks of the GPU's decoder of `transform` against the CPU's, bit for bit; as `device_checks.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.codecs.device_transform import decode_transform
from lmcache_s3.codecs.header import HEADER_BYTES, wrap
from lmcache_s3.codecs.transform import Cell, TransformCodec, read_cell
from lmcache_s3.errors import Unusable
from lmcache_s3.kernels.device_cachegen import Places
from lmcache_s3.testing.calibrations import made_calibration
from lmcache_s3.testing.device_checks import UNSIGNED, UNTOUCHED, Shape, host, memory, position_of, some_cell
from lmcache_s3.types import STORAGE_DTYPE, KVDtype


def _stored(spec: CellSpec, calibration: Calibration, level: str, count: int) -> list[bytes]:
    """Cells of which every other begins a prompt and the last has a token that is not finite."""
    codec = TransformCodec(level, calibrations.register(calibration))
    cells = []
    for i in range(count):
        cell = some_cell(spec, i, exponent=-1)
        if i == count - 1:
            bits = cell.view(UNSIGNED[spec.kv_dtype])
            bits[0, 0, spec.shape[2] // 2, 0, 0] = (1 << (8 * bits.itemsize - 1)) - 1
        cells.append(codec.encode(cell, spec, CellPosition(bytes(16), 0 if i % 2 == 0 else 977 * i, 0, 0)))
    assert all(isinstance(read_cell(data, spec, None), Cell) for data in cells), f"{spec}: stored raw, nothing to check"
    return cells


def _on_cpu(data: bytes, spec: CellSpec) -> np.ndarray:
    out = np.empty(spec.shape, STORAGE_DTYPE[spec.kv_dtype])
    TransformCodec().decode(data, spec, None, out)
    return out.view(UNSIGNED[spec.kv_dtype])


def check_decode_transform(
    device: torch.device,
    shape: Shape,
    kv_dtype: KVDtype = "bfloat16",
    *,
    level: str = "medium",
    joint: bool = False,
    unit_layers: int = 1,
    streams: Sequence[int] = (1, 0),
    rotary: int | None = None,
    live: int | None = None,
    cells: int = 3,
) -> None:
    """Into an array whose axes lie in another order, with gaps: the CPU's bits, and nothing in the gaps."""
    spec = CellSpec(shape, kv_dtype)
    calibration = made_calibration(
        spec, unit_layers=unit_layers, joint=joint, streams=streams, rotary=rotary, live=live, fewer=0.2
    )
    stored = _stored(spec, calibration, level, cells)
    kv, layers, tokens, heads, channels = shape
    whole = memory((layers, cells, heads, tokens, kv, channels + 3), kv_dtype, device)
    out = whole[..., :channels].permute(1, 4, 0, 3, 2, 5)
    outcomes = decode_transform(stored, spec, [None] * cells, Places.dense(out))
    assert outcomes == [None] * cells, outcomes
    found = host(out)
    for i, data in enumerate(stored):
        assert np.array_equal(found[i], _on_cpu(data, spec)), f"{spec}, {level}, cell {i}: other bits than the CPU's"
    assert (host(whole[..., channels:]).view(np.uint8) == UNTOUCHED).all(), "written between the rows"


def check_transform_damage(device: torch.device, mutations: int, seed: int = 0) -> None:
    """Cells of which bytes are wrong behind a right checksum: the CPU's verdict, the CPU's bits, no more."""
    rng = np.random.default_rng(seed)
    spec = CellSpec((2, 2, 12, 1, 16), "bfloat16")
    whole = _stored(spec, made_calibration(spec, streams=(1, 0)), "medium", 2)
    cells: list[bytes] = []
    for _ in range(mutations):
        payload = bytearray(whole[int(rng.integers(2))][HEADER_BYTES:])
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(36, len(payload)))
            payload[at] = int(rng.integers(256))
        cells.append(wrap(bytes(payload), spec, position_of(int(rng.integers(2)))))
    cells += whole
    padded = memory((len(cells), 3, *spec.shape), spec.kv_dtype, device)
    outcomes = decode_transform(cells, spec, [None] * len(cells), Places.dense(padded[:, 1]))
    assert (host(padded[:, ::2]).view(np.uint8) == UNTOUCHED).all(), "written outside a cell"
    assert outcomes[-2:] == [None, None]
    for i, (data, outcome) in enumerate(zip(cells, outcomes, strict=True)):
        wanted = _usable_on_cpu(data, spec)
        assert (outcome is None) == (wanted is not None), f"cell {i}: {outcome or 'usable'}, but not so on the CPU"
        if wanted is not None:
            assert np.array_equal(host(padded[i, 1]), wanted), f"cell {i}: other bits than the CPU's"


def _usable_on_cpu(data: bytes, spec: CellSpec) -> np.ndarray | None:
    try:
        bits = _on_cpu(data, spec)
    except Unusable:
        return None
    return bits


def all_checks() -> dict[str, Callable[[torch.device], None]]:
    """What `bench gpu` runs of `transform`, by what it shows."""

    def shapes_and_levels(device: torch.device) -> None:
        for level in ("fine", "medium", "coarse"):
            check_decode_transform(device, (2, 2, 256, 4, 128), level=level)
            check_decode_transform(device, (2, 3, 64, 2, 64), level=level, joint=True, unit_layers=3, streams=(2,))
            check_decode_transform(device, (1, 2, 65, 1, 72), "float32", level=level, rotary=16)
            check_decode_transform(device, (1, 1, 33, 1, 576), "float32", level=level, rotary=64)

    def dtypes(device: torch.device) -> None:
        names: tuple[KVDtype, ...] = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")
        for kv_dtype in names:
            check_decode_transform(device, (2, 2, 64, 2, 64), kv_dtype, level="coarse")

    return {
        "transform, units and levels": shapes_and_levels,
        "transform, dtypes": dtypes,
        "transform, 1,000 damaged cells": lambda device: check_transform_damage(device, 1000),
    }
