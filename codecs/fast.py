"""Codec `fast`: the cell's bits as they are, and a crc32c.

Zarr's standard `bytes` + `crc32c`, so any Zarr reader reads it.

Stored cell: the bits in C order, little-endian, then crc32c of them as u32 little-endian. No header: a cell's place is
guarded by the index's XXH3-64. `decode` checks the crc only where no position is given: the cache has verified the
XXH3-64 of the whole cell before it decodes with one, a plain reader has verified nothing.
Raises `Unusable` (truncated, oversized, checksum) when decoding, `Invalid` for arrays that are not as their spec says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from lmcache_s3.codecs.arrays import check_array, raw_bytes, storage_dtype
from lmcache_s3.codecs.base import JSON, CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.checksum import crc32c
from lmcache_s3.errors import Unusable
from lmcache_s3.types import Buffer

CRC_BYTES = 4


class FastCodec(KVCodec):
    """Raw bits and a crc32c."""

    id: ClassVar[str] = "fast"
    exact: ClassVar[bool] = True

    @property
    def config(self) -> Mapping[str, JSON]:
        return {}

    def max_encoded_bytes(self, spec: CellSpec) -> int:
        """Exact: every `fast` cell of a shape has this length."""
        return raw_bytes(spec) + CRC_BYTES

    def encode_memory_bytes(self, spec: CellSpec) -> int:
        return 2 * self.max_encoded_bytes(spec)

    def decode_memory_bytes(self, spec: CellSpec, stored_bytes: int) -> int:
        return 0

    def fixed_bytes(self, spec: CellSpec) -> int:
        return self.max_encoded_bytes(spec)

    def encode(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> bytes:
        out = bytearray(self.max_encoded_bytes(spec))
        self.encode_into(cell, spec, position, memoryview(out))
        return bytes(out)

    def encode_into(self, cell: np.ndarray, spec: CellSpec, position: CellPosition, out: memoryview) -> None:
        """One copy, from the cell into `out`."""
        check_array(cell, spec, what="cell")
        bits = out[:-CRC_BYTES]
        np.copyto(np.frombuffer(bits, storage_dtype(spec)).reshape(spec.shape), cell)
        out[-CRC_BYTES:] = crc32c(bits).to_bytes(CRC_BYTES, "little")

    def view(self, data: Buffer, spec: CellSpec, position: CellPosition | None) -> np.ndarray:
        wanted = self.max_encoded_bytes(spec)
        if len(data) != wanted:
            kind = "truncated" if len(data) < wanted else "oversized"
            raise Unusable(f"fast cell of {len(data)} bytes, its shape makes {wanted}", kind=kind)
        bits = memoryview(data).toreadonly()[:-CRC_BYTES]
        if position is None and crc32c(bits) != int.from_bytes(data[-CRC_BYTES:], "little"):
            raise Unusable("cell's crc32c does not match", kind="checksum")
        return np.frombuffer(bits, storage_dtype(spec)).reshape(spec.shape)

    def decode(self, data: Buffer, spec: CellSpec, position: CellPosition | None, out: np.ndarray) -> None:
        check_array(out, spec, what="out")
        np.copyto(out, self.view(data, spec, position))
