"""The KVCodec port: one cell's array to bytes and back.

Codecs are synchronous, pure (no I/O, clock or randomness) and thread-safe. They know nothing of tiers, stores or Zarr;
`codecs/zarr_.py` adapts any of them to Zarr v3.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from lmcache_s3.types import ITEM_BYTES, Buffer, Geometry, Grid, KVDtype

JSON = str | int | float | bool | None | list[Any] | dict[str, Any]


@dataclass(frozen=True, slots=True)
class CellSpec:
    """Shape of a cell, axes [kv, layer, token, head, channel], and what its stored bits mean."""

    shape: tuple[int, int, int, int, int]
    kv_dtype: KVDtype

    @classmethod
    def of(cls, geometry: Geometry, grid: Grid) -> CellSpec:
        return cls(geometry.cell_shape(grid), geometry.kv_dtype)


@dataclass(frozen=True, slots=True)
class CellPosition:
    """Where a cell belongs; written in its header and checked when read.

    prefix_hash: 16 bytes, of the cell's chunk. first_token: position in the prompt. first_layer, first_head: offsets in
    the whole model.
    """

    prefix_hash: bytes
    first_token: int
    first_layer: int
    first_head: int


_SPARE_BYTES = 1 << 16
"""For what does not grow with a cell."""


def _raw_bytes(spec: CellSpec) -> int:
    return math.prod(spec.shape) * ITEM_BYTES[spec.kv_dtype]


class KVCodec(ABC):
    """One way to code a cell. Its `config` is what Zarr metadata carries, enough to decode."""

    id: ClassVar[str]
    """`[a-z0-9_-]+`; part of every extent's name."""
    exact: ClassVar[bool]
    """Decodes to the very bits that were encoded."""

    @property
    @abstractmethod
    def config(self) -> Mapping[str, JSON]:
        """JSON configuration, without the kv_dtype (the Zarr adapter adds that)."""

    _measured_kl: float | None = None

    @property
    def measured_kl(self) -> float | None:
        """Measured next-token KL on the space's model, nats per token; 0.0 if exact, None if nobody measured."""
        return 0.0 if self.exact else self._measured_kl

    def measured(self, kl: float) -> Self:
        """This codec, knowing what its next-token KL on the space's model is (nats per token; measured by others)."""
        known = copy.copy(self)
        known._measured_kl = kl
        return known

    @property
    def level(self) -> str:
        """Short name of the setting, for the fidelity class of an unmeasured codec; exact codecs: `exact`."""
        return "exact"

    @abstractmethod
    def max_encoded_bytes(self, spec: CellSpec) -> int:
        """No stored cell of this shape is longer; checked before memory is allocated."""

    @abstractmethod
    def encode(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> bytes:
        """Stored bytes of a cell. `cell`: shape and storage dtype as the spec says, any strides; not kept."""

    def encode_memory_bytes(self, spec: CellSpec) -> int:
        """Most memory `encode` takes meanwhile, its result included, whatever is in the cell."""
        return 4 * _raw_bytes(spec) + _SPARE_BYTES

    def decode_memory_bytes(self, spec: CellSpec, stored_bytes: int) -> int:
        """The same of `decode`, for a stored cell of this length, beside `out`, which is contiguous."""
        return 4 * _raw_bytes(spec) + _SPARE_BYTES

    def fixed_bytes(self, spec: CellSpec) -> int | None:
        """The length of every stored cell of this shape; None where it depends on what is in it."""
        return None

    def encode_into(self, cell: np.ndarray, spec: CellSpec, position: CellPosition, out: memoryview) -> None:
        """`encode`, where `fixed_bytes` says a length: into `out`, which has it."""
        out[:] = self.encode(cell, spec, position)

    def view(self, data: Buffer, spec: CellSpec, position: CellPosition | None) -> np.ndarray | None:
        """What `decode` would give, as a read-only view of `data`, where stored bytes are the bits themselves.

        None: they are not, `decode` them. Raises as `decode` does.
        """
        return None

    @abstractmethod
    def decode(self, data: Buffer, spec: CellSpec, position: CellPosition | None, out: np.ndarray) -> None:
        """Decode into `out` (shape and storage dtype as in `encode`, any strides, caller's).

        `position=None`: not checked (plain Zarr readers have none). Raises `Unusable` for anything else than whole,
        right bytes; never reads past the end, never allocates more than the spec asks for. `out` is then undefined.
        """
