"""The other adapter: any KVCodec as a numcodecs codec, named `lmcache_s3.<codec>`, for plain arrays and Zarr format 2.

Registered by entry points, so `numcodecs.get_codec` and a `.zarray` find it where this package is merely installed.
Numcodecs tells a codec neither the shape nor the meaning of its bytes, so both are configuration:

    numcodecs.get_codec({"id": "lmcache_s3.lossless", "kv_dtype": "bfloat16", "shape": [2, 30, 256, 3, 64]})

`shape` is that of what is encoded, axes [kv, layer, token, head, channel]; an array of fewer axes is one where the
first ones are 1. What it writes are cells like the cache's own whose header says position zero, since a plain array has
none; so a lossy codec keeps the first token of each exact. Raises `Unusable` for bytes that cannot be decoded,
`Invalid` for a configuration or array that does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import numpy as np
from numcodecs.abc import Codec
from numcodecs.compat import ndarray_copy

from lmcache_s3.codecs.base import JSON, CellPosition, CellSpec
from lmcache_s3.codecs.dtypes import TRUE_DTYPE
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Invalid
from lmcache_s3.types import HASH_BYTES, STORAGE_DTYPE, KVDtype

_AXES = 5
_NOWHERE = CellPosition(bytes(HASH_BYTES), 0, 0, 0)


class NumcodecsKVCodec(Codec):
    """Encodes and decodes one chunk. Immutable; safe to use from many threads.

    kv_dtype: what the bits mean. shape: of a chunk. config: the KVCodec's own. Raises `Invalid`.
    """

    kv_codec_id: ClassVar[str]
    codec_id: ClassVar[str]

    def __init__(self, kv_dtype: KVDtype, shape: Sequence[int], **config: JSON) -> None:
        if kv_dtype not in STORAGE_DTYPE:
            raise Invalid(f"codec {self.codec_id}: kv_dtype is {kv_dtype!r}", kind="argument")
        sizes = tuple(shape)
        if not 0 < len(sizes) <= _AXES or not all(type(n) is int and n > 0 for n in sizes):
            raise Invalid(
                f"codec {self.codec_id}: shape is {list(sizes)}, of [kv, layer, token, head, channel]", kind="argument"
            )
        whole = cast(tuple[int, int, int, int, int], (1,) * (_AXES - len(sizes)) + sizes)
        self._shape, self._spec = sizes, CellSpec(whole, kv_dtype)
        self._codec = make_codec(self.kv_codec_id, config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        settings = {key: value for key, value in config.items() if key != "id"}
        if not {"kv_dtype", "shape"} <= settings.keys():
            raise Invalid(f"codec {cls.codec_id} needs kv_dtype and shape in its configuration", kind="argument")
        return cls(**settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_config()})"

    def get_config(self) -> dict[str, JSON]:
        of_chunk: dict[str, JSON] = {"kv_dtype": self._spec.kv_dtype, "shape": list(self._shape)}
        return {"id": self.codec_id, **of_chunk, **self._codec.config}

    def encode(self, buf: Any) -> bytes:
        """The chunk's cell. buf: an array of the storage or the true dtype, or its bytes; C order, of that size."""
        return self._codec.encode(self._cell(buf), self._spec, _NOWHERE)

    def decode(self, buf: Any, out: Any | None = None) -> Any:
        """The chunk, in the storage dtype and the configured shape; written to `out`, of that many bytes, if given."""
        cell = np.empty(self._spec.shape, STORAGE_DTYPE[self._spec.kv_dtype])
        self._codec.decode(memoryview(buf).cast("B"), self._spec, None, cell)
        chunk = cell.reshape(self._shape)
        return chunk if out is None else ndarray_copy(chunk, out)

    def _cell(self, buf: Any) -> np.ndarray:
        array, kv_dtype = np.asarray(buf), self._spec.kv_dtype
        if isinstance(buf, bytes | bytearray | memoryview):
            array = np.frombuffer(buf, np.uint8)
            if array.size % TRUE_DTYPE[kv_dtype].itemsize == 0:
                array = array.view(STORAGE_DTYPE[kv_dtype])
        fits = array.dtype in (np.dtype(STORAGE_DTYPE[kv_dtype]), TRUE_DTYPE[kv_dtype]) and array.flags.c_contiguous
        if not fits or array.size != math.prod(self._shape):
            raise Invalid(
                f"codec {self.codec_id} of {kv_dtype}{list(self._shape)} cannot take {array.dtype}{list(array.shape)}: "
                f"{STORAGE_DTYPE[kv_dtype]} or {kv_dtype} in C order, as many values",
                kind="argument",
            )
        return array.view(STORAGE_DTYPE[kv_dtype]).reshape(self._spec.shape)


class FastNumcodec(NumcodecsKVCodec):
    kv_codec_id, codec_id = "fast", "lmcache_s3.fast"


class TorchNumcodec(NumcodecsKVCodec):
    kv_codec_id, codec_id = "torch", "lmcache_s3.torch"


class SafetensorsNumcodec(NumcodecsKVCodec):
    kv_codec_id, codec_id = "safetensors", "lmcache_s3.safetensors"


class LosslessNumcodec(NumcodecsKVCodec):
    kv_codec_id, codec_id = "lossless", "lmcache_s3.lossless"


class CachegenNumcodec(NumcodecsKVCodec):
    kv_codec_id, codec_id = "cachegen", "lmcache_s3.cachegen"


class TransformNumcodec(NumcodecsKVCodec):
    kv_codec_id, codec_id = "transform", "lmcache_s3.transform"
