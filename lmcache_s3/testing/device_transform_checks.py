"""Checks of the GPU's decoder of `transform` against the CPU's, bit for bit; as `device_checks.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.codecs.device_transform import decode_transform, plan_of, upload
from lmcache_s3.codecs.device_transform_encode import encode_transform
from lmcache_s3.codecs.transform import Cell, TransformCodec, read_cell
from lmcache_s3.kernels import device_transform, device_transform_encode
from lmcache_s3.kernels.device_cachegen import Places
from lmcache_s3.testing.calibrations import made_calibration
from lmcache_s3.testing.device_checks import (
    UNSIGNED,
    UNTOUCHED,
    Shape,
    check_verdicts,
    damaged,
    decoded_on_cpu,
    host,
    memory,
    some_cell,
)
from lmcache_s3.types import KVDtype

_FEW = 1e-2
"""Share of the coefficients that may be rounded otherwise than on the CPU, which rounds values to 16 bits before it
multiplies."""


def _cell(spec: CellSpec, seed: int, *, broken: bool = False) -> np.ndarray:
    """broken: one of its values is not finite."""
    cell = some_cell(spec, seed, exponent=-1)
    if broken:
        bits = cell.view(UNSIGNED[spec.kv_dtype])
        bits[0, 0, spec.shape[2] // 2, 0, 0] = (1 << (8 * bits.itemsize - 1)) - 1
    return cell


def _stored(spec: CellSpec, calibration: Calibration, level: str, count: int) -> list[bytes]:
    """Cells of which every other begins a prompt and the last has a token that is not finite."""
    codec = TransformCodec(level, calibrations.register(calibration))
    cells = []
    for i in range(count):
        position = CellPosition(bytes(16), 0 if i % 2 == 0 else 977 * i, 0, 0)
        cells.append(codec.encode(_cell(spec, i, broken=i == count - 1), spec, position))
    assert all(isinstance(read_cell(data, spec, None), Cell) for data in cells), f"{spec}: stored raw, nothing to check"
    return cells


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
    wanted = decoded_on_cpu(stored, spec, TransformCodec())
    assert np.array_equal(host(out), wanted), f"{spec}, {level}: other bits than the CPU's"
    assert (host(whole[..., channels:]).view(np.uint8) == UNTOUCHED).all(), "written between the rows"


def check_transform_damage(device: torch.device, mutations: int, seed: int = 0) -> None:
    """Cells that are damaged behind a right checksum, but for the name of their calibration, beside whole ones."""
    spec = CellSpec((2, 2, 12, 1, 16), "bfloat16")
    whole = _stored(spec, made_calibration(spec, streams=(1, 0)), "medium", 2)
    cells = [*damaged(whole, spec, mutations, 36, seed), *whole]
    assert check_verdicts(device, TransformCodec(), decode_transform, cells, spec) >= len(whole)


def check_encode_transform(
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
    """From an array whose axes lie in another order: the CPU's coefficients but for few, which are neighbours; sizes
    alike; read alike by both decoders. Every other cell begins a prompt, and one has a token that is not finite."""
    spec = CellSpec(shape, kv_dtype)
    calibration = made_calibration(
        spec, unit_layers=unit_layers, joint=joint, streams=streams, rotary=rotary, live=live, fewer=0.2
    )
    digest = calibrations.register(calibration)
    raw = [_cell(spec, i, broken=i == 1) for i in range(cells)]
    positions = [CellPosition(bytes(16), 0 if i % 2 == 0 else 977 * i, 0, 0) for i in range(cells)]
    kv, layers, tokens, heads, channels = shape
    whole = memory((layers, cells, heads, tokens, kv, channels + 3), kv_dtype, device)
    there = whole[..., :channels].permute(1, 4, 0, 3, 2, 5)
    there.copy_(torch.from_numpy(np.stack(raw).view(UNSIGNED[kv_dtype])))
    stored = encode_transform(Places.dense(there), spec, positions, level, digest)
    codec = TransformCodec(level, digest)
    by_cpu = [codec.encode(cell, spec, position) for cell, position in zip(raw, positions, strict=True)]
    assert check_verdicts(device, TransformCodec(), decode_transform, stored, spec) == cells
    ours, theirs = (_coefficients(device, some, spec) for some in (stored, by_cpu))
    assert ours.shape == theirs.shape, "other tokens are coded than on the CPU"
    apart = np.abs(ours.astype(np.int32) - theirs)
    assert apart.max(initial=0) <= 1, f"{spec}, {level}: coefficients {apart.max()} steps apart"
    assert np.count_nonzero(apart) <= apart.size * _FEW + 1, f"{np.count_nonzero(apart)} of {apart.size} differ"
    sizes = len(b"".join(stored)), len(b"".join(by_cpu))
    assert abs(sizes[0] - sizes[1]) <= sizes[1] / 1000 + 8, f"{sizes[0]} bytes, {sizes[1]} by the CPU"


def check_product(device: torch.device) -> None:
    """Sums are as good as float32's: TF32's would be wrong by 2⁻¹⁵ of what is added up, float32's by 2⁻²¹."""
    rng = np.random.default_rng(3)
    forward = rng.standard_normal((192, 1024)).astype(np.float16)
    x = (rng.standard_t(4, (70, 1024)) * np.exp(rng.standard_normal(1024))).astype(np.float32)
    found = host(device_transform_encode.product(torch.from_numpy(forward).to(device), torch.from_numpy(x).to(device)))
    wide, of_x = forward.astype(np.float64), x.astype(np.float64).T
    worst = (np.abs(found - wide @ of_x) / (np.abs(wide) @ np.abs(of_x))).max()
    assert worst < 2.0**-19, f"sums are wrong by 2^{np.log2(worst):.1f} of what is added up"


def check_encode_raw(device: torch.device) -> None:
    """What codes to no less than itself is stored raw: the CPU's bytes."""
    spec = CellSpec((2, 1, 12, 1, 16), "bfloat16")
    digest = calibrations.register(made_calibration(spec))
    bits = np.random.default_rng(5).integers(0, 1 << 16, (1, *spec.shape), np.uint16)
    positions = [CellPosition(bytes(16), 0, 0, 0)]
    there = torch.from_numpy(bits).to(device)
    (stored,) = encode_transform(Places.dense(there), spec, positions, "medium", digest)
    assert stored == TransformCodec("medium", digest).encode(bits[0], spec, positions[0])
    assert not isinstance(read_cell(stored, spec, None), Cell)


def _coefficients(device: torch.device, stored: Sequence[bytes], spec: CellSpec) -> np.ndarray:
    """i8, those of all coded tokens, one after another."""
    cells = [read_cell(data, spec, None) for data in stored]
    coded = [cell for cell in cells if isinstance(cell, Cell)]
    assert len(coded) == len(cells), f"{spec}: stored raw, nothing to check"
    plan, streams = plan_of(coded[0], spec, device), upload(coded, spec, device)
    q = host(device_transform.read_streams(plan, streams).q)[: len(cells) * plan.coefficients]
    q = q.reshape(len(cells), plan.coefficients, -1)
    live = [placed.unit.tables[coded[0].level].size for placed in coded[0].layout.units]
    counts = np.repeat(host(streams.counts), live, axis=1)
    return q[np.arange(q.shape[2]) < counts[:, :, None]]


def all_checks() -> dict[str, Callable[[torch.device], None]]:
    """What `bench gpu` runs of `transform`, by what it shows."""

    def shapes_and_levels(device: torch.device) -> None:
        for check in (check_decode_transform, check_encode_transform):
            for level in ("fine", "medium", "coarse"):
                check(device, (2, 2, 256, 4, 128), level=level)
                check(device, (2, 3, 64, 2, 64), level=level, joint=True, unit_layers=3, streams=(2,))
                check(device, (1, 2, 65, 1, 72), "float32", level=level, rotary=16)
                check(device, (1, 1, 33, 1, 576), "float32", level=level, rotary=64)
        check_encode_raw(device)

    def with_tf32(device: torch.device) -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            check_product(device)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def dtypes(device: torch.device) -> None:
        names: tuple[KVDtype, ...] = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")
        for kv_dtype in names:
            check_decode_transform(device, (2, 2, 64, 2, 64), kv_dtype, level="coarse")
            check_encode_transform(device, (2, 2, 64, 2, 64), kv_dtype, level="coarse")

    return {
        "transform, units and levels": shapes_and_levels,
        "transform, dtypes": dtypes,
        "transform, sums where TF32 is allowed": with_tf32,
        "transform, 1,000 damaged cells": lambda device: check_transform_damage(device, 1000),
    }
