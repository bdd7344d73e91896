"""The one adapter: any KVCodec with a cell header as a Zarr v3 codec, named `lmcache_s3.<codec>`.

Registered by entry points, so plain `zarr.open_array(url)` finds it where this package is merely installed. Works in
zarr 3.1 (`_decode_single`, asynchronous) and later (`_decode_sync`). Zarr says no position, so `decode` gets none; the
header's crc32c is checked. Writing is the cache's alone: encoding through zarr is refused with `Invalid`.
Its configuration is the codec's own plus `kv_dtype`. Raises `Unusable` for bytes that cannot be decoded, `Invalid` for
a configuration or array that does not fit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON, parse_named_configuration

from lmcache_s3.codecs import base
from lmcache_s3.codecs.base import CellSpec, KVCodec
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Invalid
from lmcache_s3.types import STORAGE_DTYPE, KVDtype

_AXES = 5


@dataclass(frozen=True)
class ZarrKVCodec(ArrayBytesCodec):
    """Decodes one cell. Immutable; safe to use from many threads and tasks."""

    codec: KVCodec
    kv_dtype: KVDtype

    codec_id: ClassVar[str]
    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        _, configuration = parse_named_configuration(data, f"lmcache_s3.{cls.codec_id}")
        config = cast(dict[str, base.JSON], dict(configuration))
        kv_dtype = config.pop("kv_dtype", None)
        if kv_dtype not in STORAGE_DTYPE:
            raise Invalid(f"codec lmcache_s3.{cls.codec_id}: kv_dtype is {kv_dtype!r}", kind="argument")
        return cls(make_codec(cls.codec_id, config), cast(KVDtype, kv_dtype))

    def to_dict(self) -> dict[str, JSON]:
        configuration = cast(Mapping[str, JSON], {**self.codec.config, "kv_dtype": self.kv_dtype})
        return {"name": f"lmcache_s3.{self.codec_id}", "configuration": configuration}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """The longest a cell can be; zarr asks this only of codecs of fixed size."""
        return self.codec.max_encoded_bytes(self._spec(chunk_spec))

    def _spec(self, chunk_spec: ArraySpec) -> CellSpec:
        dtype = chunk_spec.dtype.to_native_dtype()
        if len(chunk_spec.shape) != _AXES or dtype != np.dtype(STORAGE_DTYPE[self.kv_dtype]):
            raise Invalid(
                f"codec lmcache_s3.{self.codec_id} of {self.kv_dtype} on chunks of {dtype}{list(chunk_spec.shape)}: "
                "it codes [kv, layer, token, head, channel] in the storage dtype",
                kind="argument",
            )
        return CellSpec(cast(tuple[int, int, int, int, int], tuple(chunk_spec.shape)), self.kv_dtype)

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        spec = self._spec(chunk_spec)
        out = np.empty(spec.shape, STORAGE_DTYPE[self.kv_dtype])
        self.codec.decode(chunk_bytes.to_bytes(), spec, None, out)
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(cast(Any, out))

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _encode_sync(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        raise Invalid(
            f"codec lmcache_s3.{self.codec_id} cannot be written through zarr, which knows no cell's position: "
            "only lmcache_s3.Cache writes it",
            kind="argument",
        )

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        return self._encode_sync(chunk_array, chunk_spec)


class TorchZarr(ZarrKVCodec):
    codec_id: ClassVar[str] = "torch"


class SafetensorsZarr(ZarrKVCodec):
    codec_id: ClassVar[str] = "safetensors"


class LosslessZarr(ZarrKVCodec):
    codec_id: ClassVar[str] = "lossless"


class CachegenZarr(ZarrKVCodec):
    codec_id: ClassVar[str] = "cachegen"


class TransformZarr(ZarrKVCodec):
    codec_id: ClassVar[str] = "transform"
