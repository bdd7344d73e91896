"""The part of `bench gpu` that measures codec `transform`, in layer-wise units, by a calibration of its own.

No model is needed: the transform is a random orthogonal one of full size, of which half the coefficients are coded, so
that the product has the shape it has in earnest; the bits a value have not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lmcache_s3.benchmarks.gpu_timing import device_s, wall_s
from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.codecs.transform import Cell, TransformCodec, read_cell
from lmcache_s3.testing.calibrations import LEVELS, made_unit

if TYPE_CHECKING:
    import torch

    from lmcache_s3.kernels.device_cachegen import Places
    from lmcache_s3.kernels.device_transform import DeviceStreams

_STREAMS_OF_UNITS = (1, 0, 0, 0)
"""Four units a stream: what side information costs."""
_LEVEL = "coarse"


def layerwise(spec: CellSpec) -> Calibration:
    """A calibration of one unit a layer and plane, all of the same transform, half of its coefficients kept."""
    kv, layers, _, heads, channels = spec.shape
    rng = np.random.default_rng(0)
    one = made_unit((0,), range(1), range(heads), channels, rng, live=heads * channels // 2)
    units = tuple(
        replace(one, planes=(plane,), first_layer=layer, streams=_STREAMS_OF_UNITS[layer % 4])
        for plane in range(kv)
        for layer in range(layers)
    )
    turns = np.geomspace(0.159, 1e-5, channels // 2)
    return Calibration(spec.kv_dtype, kv, layers, heads, channels, LEVELS, turns, units, {"made": "for bench gpu"})


def measure_transform(
    device: torch.device, spec: CellSpec, raw: Sequence[np.ndarray], batches: Sequence[int]
) -> dict[int, tuple[float, float]]:
    """Cells in flight → gigabytes of bfloat16 a second: decoded, of the kernels alone; encoded, from device memory to
    stored cells in host memory. raw: distinct cells."""
    import torch

    from lmcache_s3.codecs.device_transform import plan_of, upload
    from lmcache_s3.codecs.device_transform_encode import encode_transform
    from lmcache_s3.kernels import device_transform
    from lmcache_s3.kernels.device_cachegen import Places

    digest = calibrations.register(layerwise(spec))
    codec = TransformCodec(_LEVEL, digest)
    position = CellPosition(bytes(16), spec.shape[2], 0, 0)
    cells = [read_cell(codec.encode(cell, spec, position), spec, None) for cell in raw]
    coded = [cell for cell in cells if isinstance(cell, Cell)]
    assert coded, "every cell was stored raw: nothing to measure"
    plan = plan_of(coded[0], spec, device)
    there = torch.from_numpy(np.stack(raw)).to(device)
    speeds = {}
    for n in batches:
        out = torch.empty((n, *spec.shape), dtype=torch.uint16, device=device)
        places = Places.dense(out)
        streams = upload([coded[i % len(coded)] for i in range(n)], spec, device)
        some = there[[i % len(raw) for i in range(n)]]

        def decode(streams: DeviceStreams = streams, places: Places = places) -> None:
            device_transform.decode(plan, streams, places, spec.kv_dtype)

        def encode(some: torch.Tensor = some) -> None:
            encode_transform(Places.dense(some), spec, [position] * len(some), _LEVEL, digest)

        n_bytes = out.numel() * out.element_size()
        speeds[n] = n_bytes / device_s(device, decode) / 1e9, n_bytes / wall_s(device, encode) / 1e9
    return speeds
