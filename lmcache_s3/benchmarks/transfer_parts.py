"""What the parts of `bench transfer` share: an engine's blocks, extents to move, stores that behave like a network."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.extent import array_metadata
from lmcache_s3.kernels import paged
from lmcache_s3.publish import make_record
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.transfer import Transfer
from lmcache_s3.types import Buffer, ChunkRef, ExtentName, Geometry, Grid, ObjectInfo, Outcome, extent_prefix

SPACE_ID = "ab" * 32
LLAMA_8B = Geometry(kv=2, layers=32, heads=8, head_dim=128, kv_dtype="bfloat16", chunk_tokens=256)
LLAMA_1B = Geometry(kv=2, layers=16, heads=8, head_dim=64, kv_dtype="bfloat16", chunk_tokens=256)
BLOCK_TOKENS = 16
WHOLE = Grid()


def made_up_kv(geometry: Geometry, chunks: int, seed: int = 0) -> np.ndarray:
    """bfloat16 bits [kv, layer, token, head, channel] that code like KV: normal, channels of different sizes."""
    rng = np.random.default_rng(seed)
    shape = (geometry.kv, geometry.layers, chunks * geometry.chunk_tokens, geometry.heads, geometry.head_dim)
    values = rng.standard_normal(shape, np.float32)
    values *= np.exp(rng.standard_normal(shape[3:], np.float32))
    kv: np.ndarray = (values.view(np.uint32) >> 16).astype(np.uint16)
    return kv


class Engine:
    """Paged blocks of an engine, `[layer][block, head, slot, K and V]`, and the sink that writes loads into them.

    chunks: room for so many; later ones take the places of earlier ones.
    """

    def __init__(self, geometry: Geometry, chunks: int) -> None:
        self._per_chunk = geometry.chunk_tokens // BLOCK_TOKENS
        self._blocks = chunks * self._per_chunk
        content = geometry.kv * geometry.head_dim
        layers = np.ones((geometry.layers, self._blocks, geometry.heads, BLOCK_TOKENS, content), np.uint16)
        plane = paged.PlaneMap.standard(geometry.kv, BLOCK_TOKENS, geometry.head_dim)
        self._where = paged.HostLayers(
            layers.reshape(-1),
            np.arange(geometry.layers, dtype=np.int64) * layers[0].size,
            self._blocks,
            geometry.heads,
            geometry.heads * BLOCK_TOKENS * content,
            BLOCK_TOKENS * content,
            plane.offsets(content, 1),
        )

    def sink(self, chunk: int, layers: range, heads: range, cell: np.ndarray) -> None:
        paged.scatter(self._where, layers, self._ids(chunk), heads.start, cell)

    def read(self, chunk: int, out: np.ndarray) -> None:
        """Copy a chunk out again."""
        paged.gather(self._where, range(out.shape[1]), self._ids(chunk), 0, out)

    def _ids(self, chunk: int) -> np.ndarray:
        first = chunk * self._per_chunk % self._blocks
        return np.arange(first, first + self._per_chunk, dtype=np.int64)


def upload(
    transfer: Transfer, kv: np.ndarray, chunks: int, grid: Grid = WHOLE, *, seed: int = 0, timeout_s: float = 120.0
) -> list[ChunkRef]:
    """Store one extent of so many chunks, whose cells repeat those of `kv`."""
    geometry, rng = transfer.geometry, np.random.default_rng(seed)
    n, held = geometry.chunk_tokens, kv.shape[2] // geometry.chunk_tokens
    hashes = [rng.bytes(16) for _ in range(chunks)]
    name = ExtentName.fresh(hashes[-1], chunks, transfer.codec.id, 0)
    uploads = []
    for shard in range(grid.shards):
        layers, heads = geometry.cell_layers(grid, shard), geometry.cell_heads(grid, shard)
        mine = kv[:, layers.start : layers.stop, :, heads.start : heads.stop]
        cells = [mine[:, :, i % held * n : (i % held + 1) * n] for i in range(chunks)]
        uploads.append(transfer.upload_shard(name, grid, shard, 0, b"".join(hashes), cells, deadline_s=timeout_s))
    shards = [upload.result(timeout_s) for upload in uploads]
    record = make_record(name, grid, bytes(16), 0, b"".join(hashes), geometry.chunk_bytes * chunks, shards)
    return [ChunkRef(hashes[i], record, i) for i in range(chunks)]


def publish(store: ObjectStore, geometry: Geometry, codec: KVCodec, chunks: list[ChunkRef]) -> str:
    """PUT the extent's zarr.json; returns its key prefix."""
    record = chunks[0].extent
    prefix = extent_prefix(SPACE_ID, record.name)
    store.put(
        f"{prefix}/zarr.json",
        array_metadata(record, geometry, codec, space_id=SPACE_ID, fidelity="exact", writer="bench"),
    )
    return prefix


@dataclass(frozen=True)
class LinkSpeed:
    """latency_s: of each request. bytes_per_s: of all requests together, shared fairly."""

    latency_s: float
    bytes_per_s: float


_SLICE_BYTES = 256 << 10


class LinkedStore:
    """A store behind one link: reads take as long as on a network of that speed. Waiting takes no processor time."""

    def __init__(self, inner: ObjectStore, speed: LinkSpeed) -> None:
        self.inner, self.speed = inner, speed
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    @property
    def url(self) -> str:
        return self.inner.url

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        time.sleep(self.speed.latency_s)
        self.inner.get_into(key, start, into)
        left = into.nbytes
        while left > 0:
            with self._lock:
                now_s = time.perf_counter()
                self._free_at_s = max(self._free_at_s, now_s) + min(left, _SLICE_BYTES) / self.speed.bytes_per_s
                wait_s = self._free_at_s - now_s
            time.sleep(wait_s)
            left -= _SLICE_BYTES

    def get(self, key: str, start: int = 0, end: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        return self.inner.get(key, start, end, limit_bytes=limit_bytes)

    def put(self, key: str, data: Buffer) -> None:
        self.inner.put(key, data)

    def create(self, key: str, data: Buffer) -> Outcome:
        return self.inner.create(key, data)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        return self.inner.list(prefix, start_after, limit)

    def check(self) -> None:
        self.inner.check()

    def close(self) -> None:
        self.inner.close()
