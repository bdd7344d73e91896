"""The device tier: stored cells in the memory of a torch device (a GPU; "cpu" works too), as uint8 tensors.

Cells keep their stored form, so that what is compressed stays so; `get` copies back to host memory. Verified on the way
in. The only module of this room that imports torch.
Raises what the `Tier` port says; `Unavailable(full)` if the device has less memory free than the budget promised, and
`Invalid` for a device that torch does not have.
"""

from __future__ import annotations

import numpy as np
import torch

from lmcache_s3.errors import Invalid, Unavailable
from lmcache_s3.tiers.lru import CellKey, LRUTier
from lmcache_s3.types import Buffer, CellRef


class DeviceTier(LRUTier[torch.Tensor]):
    """Cells on `device`, at most `budget_bytes` of them."""

    def __init__(self, budget_bytes: int, device: str | torch.device = "cuda") -> None:
        super().__init__("device", budget_bytes)
        try:
            self._device = torch.device(device)
            torch.empty(1, dtype=torch.uint8, device=self._device)
        except (RuntimeError, AssertionError) as e:  # what torch raises for an unknown device, and without CUDA
            raise Invalid(f"no torch device {device!r} here: {str(e).splitlines()[0]}", kind="setting") from e

    def _write(self, cell: CellRef, data: Buffer) -> torch.Tensor:
        source = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch wants it writeable
        try:
            return source.to(self._device)
        except torch.OutOfMemoryError as e:
            raise Unavailable(f"device {self._device} has no memory left", kind="full", key="device_bytes") from e

    def _read(self, cell: CellRef, held: torch.Tensor) -> Buffer:
        array: np.ndarray = held.cpu().numpy()
        return array.data.toreadonly()

    def _drop(self, key: CellKey, held: torch.Tensor) -> None:
        pass  # the reference in the bookkeeping is the only one
