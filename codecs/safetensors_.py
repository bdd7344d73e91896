"""Codec `safetensors`: a cell header, then a safetensors file of one tensor, `kv`, in its true dtype.

Written and read by the safetensors library without torch, so bfloat16 and fp8 work where there is none.
Raises `Unusable` (header's kinds, payload, shape) when decoding, `Invalid` for arrays that are not as their spec says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from lmcache_s3.codecs.arrays import check_array, contiguous, raw_bytes, storage_dtype
from lmcache_s3.codecs.base import JSON, CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.header import HEADER_BYTES, unwrap, wrap
from lmcache_s3.errors import Unusable
from lmcache_s3.types import Buffer

TENSOR = "kv"
_DTYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_LENGTH_BYTES = 8
_deserialize: Any = deserialize  # untyped in the library's stubs
_MAX_JSON_BYTES = 1024
"""One tensor's description takes about a hundred bytes; longer ones are refused before they are parsed."""


class SafetensorsCodec(KVCodec):
    """A safetensors file of one tensor."""

    id: ClassVar[str] = "safetensors"
    exact: ClassVar[bool] = True

    @property
    def config(self) -> Mapping[str, JSON]:
        return {}

    def max_encoded_bytes(self, spec: CellSpec) -> int:
        return HEADER_BYTES + _LENGTH_BYTES + _MAX_JSON_BYTES + raw_bytes(spec)

    def decode_memory_bytes(self, spec: CellSpec, stored_bytes: int) -> int:
        """The library copies the file before it takes it apart."""
        return 3 * self.max_encoded_bytes(spec)

    def encode(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> bytes:
        check_array(cell, spec, what="cell")
        bits = contiguous(cell, spec)
        tensor = TensorSpec(dtype=spec.kv_dtype, shape=spec.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes)
        return wrap(serialize({TENSOR: tensor}), spec, position)

    def decode(self, data: Buffer, spec: CellSpec, position: CellPosition | None, out: np.ndarray) -> None:
        check_array(out, spec, what="out")
        payload = unwrap(data, spec, position, max_bytes=self.max_encoded_bytes(spec))
        json_bytes = int.from_bytes(payload[:_LENGTH_BYTES], "little")
        if json_bytes > _MAX_JSON_BYTES:
            raise Unusable(f"safetensors description of {json_bytes} bytes", kind="payload")
        try:
            tensors = _deserialize(bytes(payload))
        except SafetensorError as error:
            raise Unusable(f"payload is no safetensors file: {error}", kind="payload") from error
        if [name for name, _ in tensors] != [TENSOR]:
            raise Unusable(f"safetensors file without exactly one tensor {TENSOR!r}", kind="payload")
        tensor = tensors[0][1]
        if tensor["dtype"] != _DTYPES[spec.kv_dtype] or tuple(tensor["shape"]) != spec.shape:
            raise Unusable(
                f"tensor is {tensor['dtype']}{tensor['shape']}, wanted {_DTYPES[spec.kv_dtype]}{list(spec.shape)}",
                kind="shape",
            )
        np.copyto(out, np.frombuffer(tensor["data"], storage_dtype(spec)).reshape(spec.shape))
