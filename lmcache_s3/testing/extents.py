"""Whole extents made from seeded random values, as the cache would write them. For tests and benchmarks."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.checksum import xxh3
from lmcache_s3.codecs.dtypes import from_float32
from lmcache_s3.extent import array_metadata, build_shard
from lmcache_s3.types import HASH_BYTES, ExtentName, ExtentRecord, Geometry, Grid

SPACE_ID = hashlib.sha256(b'{"a":1}').hexdigest()


@dataclass(frozen=True, slots=True)
class MadeExtent:
    """bits: what was stored, [kv, layer, token, head, channel]. objects: path below the extent → bytes."""

    record: ExtentRecord
    geometry: Geometry
    bits: np.ndarray
    objects: Mapping[str, bytes]

    def write(self, directory: Path) -> Path:
        """Lay the objects out below `directory`; returns it."""
        for path, data in self.objects.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(data)
        return directory


def random_bits(shape: tuple[int, ...], kv_dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Stored bits of normally distributed values, with channels and layers of different widths, as a KV cache has."""
    widths = np.exp(rng.standard_normal((*shape[:2], 1, *shape[3:])))
    offsets = 2 * rng.standard_normal((*shape[:2], 1, *shape[3:]))
    return from_float32((rng.standard_normal(shape) * widths + offsets).astype(np.float32), kv_dtype)


def any_bits(shape: tuple[int, ...], kv_dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Any bit patterns at all: NaN, infinities, denormals too."""
    template = from_float32(np.zeros(shape, np.float32), kv_dtype)
    return np.frombuffer(rng.bytes(template.nbytes), template.dtype).reshape(shape)


def make_extent(
    codec: KVCodec, geometry: Geometry, grid: Grid, n_chunks: int, *, seed: int = 0, first_token: int = 0
) -> MadeExtent:
    """Encode `n_chunks` chunks of seeded random values into a whole extent."""
    rng = np.random.default_rng(seed)
    shape = (geometry.kv, geometry.layers, n_chunks * geometry.chunk_tokens, geometry.heads, geometry.head_dim)
    bits = random_bits(shape, geometry.kv_dtype, rng)
    hashes = [hashlib.sha256(b"%d %d" % (seed, chunk)).digest()[:HASH_BYTES] for chunk in range(n_chunks + 1)]
    name = ExtentName(hashes[-1], n_chunks, codec.id, 7, hashlib.sha256(b"%d" % seed).hexdigest()[:32])
    spec = CellSpec.of(geometry, grid)
    objects: dict[str, bytes] = {}
    lengths: list[int] = []
    sums: list[int] = []
    for shard in range(grid.shards):
        layers, heads = geometry.cell_layers(grid, shard), geometry.cell_heads(grid, shard)
        cells = []
        for chunk in range(n_chunks):
            start = chunk * geometry.chunk_tokens
            cell = bits[:, layers.start : layers.stop, start : start + geometry.chunk_tokens, heads.start : heads.stop]
            position = CellPosition(hashes[chunk + 1], first_token + start, layers.start, heads.start)
            cells.append(codec.encode(cell, spec, position))
        stage, group = grid.stage_and_group(shard)
        objects[f"c/0/{stage}/0/{group}/0"] = build_shard(cells)
        lengths += map(len, cells)
        sums += map(xxh3, cells)
    record = ExtentRecord(
        name=name,
        grid=grid,
        parent=hashes[0],
        first_token=first_token,
        hashes=b"".join(hashes[1:]),
        lengths=struct.pack(f"<{len(lengths)}I", *lengths),
        sums=struct.pack(f"<{len(sums)}Q", *sums),
        raw_bytes=geometry.chunk_bytes * n_chunks,
    )
    fidelity = "exact" if codec.exact else f"unmeasured-{codec.id}-{codec.level}"
    objects["zarr.json"] = array_metadata(record, geometry, codec, space_id=SPACE_ID, fidelity=fidelity, writer="test")
    return MadeExtent(record, geometry, bits, objects)
