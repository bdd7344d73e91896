"""The device tier: stored cells in the memory of a torch device (a GPU; "cpu" works too), as uint8 tensors.

Cells keep their stored form, so that what is compressed stays so; `get` copies back to host memory. Verified on the way
in. The only module of this room that imports torch. Room is counted as torch's allocator rounds it, to 512 bytes; what
that keeps cached beyond it is torch's.
Raises what the `Tier` port says; `Unavailable(full)` if the device has less memory free than the budget promised, and
`Invalid` for a device that torch does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lmcache_s3.errors import Invalid, Unavailable, Unusable
from lmcache_s3.tiers.budgeted import BudgetedTier
from lmcache_s3.tiers.eviction.base import EvictionPolicy
from lmcache_s3.types import Buffer, CellRef

GRAIN_BYTES = 512


class DeviceTier(BudgetedTier[torch.Tensor]):
    """Cells on `device`, at most `budget_bytes` of them."""

    def __init__(
        self,
        budget_bytes: int,
        device: str | torch.device = "cuda",
        *,
        eviction: EvictionPolicy | None = None,
        chunk_tokens: int = 256,
    ) -> None:
        super().__init__("device", budget_bytes, eviction=eviction, chunk_tokens=chunk_tokens)
        try:
            self._device = torch.device(device)
            torch.empty(1, dtype=torch.uint8, device=self._device)
        except (RuntimeError, AssertionError) as e:  # what torch raises for an unknown device, and without CUDA
            raise Invalid(f"no torch device {device!r} here: {str(e).splitlines()[0]}", kind="setting") from e

    def _room_of(self, length: int) -> int:
        return -(-length // GRAIN_BYTES) * GRAIN_BYTES

    def _allot(self, cell: CellRef, n_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(n_bytes, dtype=torch.uint8, device=self._device)[: cell.length]
        except torch.OutOfMemoryError as e:
            raise Unavailable(f"device {self._device} has no memory left", kind="full", key="device_bytes") from e

    def _write(self, cells: Sequence[tuple[CellRef, torch.Tensor, Buffer]]) -> None:
        for _, held, data in cells:
            source = np.frombuffer(data, np.uint8)
            held.copy_(torch.from_numpy(source if source.flags.writeable else source.copy()))  # torch takes no other

    def _read(self, cells: Sequence[tuple[CellRef, torch.Tensor]]) -> list[Buffer | Unusable]:
        out: list[Buffer | Unusable] = []
        for _, held in cells:
            array: np.ndarray = np.empty(held.numel(), np.uint8)
            torch.from_numpy(array).copy_(held)
            out.append(array.data.toreadonly())
        return out

    def _drop(self, held: torch.Tensor, n_bytes: int) -> int:
        return n_bytes  # the reference in the bookkeeping is the only one that stays
