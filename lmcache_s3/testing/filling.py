"""Put a prompt's random KV into a store, without threads, tiers or an engine. For tests and for trying things out.

Writes the very objects the cache writes, and commits them. Raises what the store and the index raise.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.checksum import xxh3
from lmcache_s3.codecs.registry import fidelity_class, make_codec
from lmcache_s3.extent import array_metadata, build_shard
from lmcache_s3.identity import PrefixHasher, Space
from lmcache_s3.index.service import Index, IndexSettings
from lmcache_s3.testing.extents import random_bits
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import ExtentName, ExtentRecord, Grid, extent_prefix, shard_key


def space_of(space: Space, codec: KVCodec) -> Space:
    """The same space, of the fidelity that this codec gives."""
    return replace(space, fidelity=fidelity_class(codec, None))


def fill(
    store: ObjectStore,
    space: Space,
    tokens: Sequence[int],
    *,
    codec: KVCodec | None = None,
    grid: Grid | None = None,
    salt: str = "",
    seed: int = 0,
) -> ExtentRecord | None:
    """Store the prompt's full chunks that are not there yet, as one extent; None if nothing is new."""
    codec, grid = codec or make_codec("fast"), grid or Grid()
    settings = IndexSettings(single_writer=True)
    with Index.open(store, space, settings=settings, background=False) as index:
        hasher = PrefixHasher(space.id, space.chunk_tokens, salt)
        hasher.extend(tokens)
        known = len(index.match(hasher.hashes))
        new = hasher.hashes[known:]
        if not new:
            return None
        parent = hasher.hashes[known - 1] if known else hasher.root
        record = upload(
            store, space, new, parent, known * space.chunk_tokens, born=index.version, codec=codec, grid=grid, seed=seed
        )
        index.commit([record]).result(60)
        return record


def upload(
    store: ObjectStore,
    space: Space,
    hashes: Sequence[bytes],
    parent: bytes,
    first_token: int,
    *,
    born: int,
    codec: KVCodec | None = None,
    grid: Grid | None = None,
    seed: int = 0,
) -> ExtentRecord:
    """Put an extent's objects, `zarr.json` last; to be committed. hashes: of its chunks; parent: of the chunk before.
    born: the writer's replica version before this call."""
    codec, grid = codec or make_codec("fast"), grid or Grid()
    name = ExtentName.fresh(hashes[-1], len(hashes), codec.id, born)
    objects, lengths, sums = _encode(space, codec, grid, hashes, first_token, seed)
    record = ExtentRecord(
        name=name,
        grid=grid,
        parent=parent,
        first_token=first_token,
        hashes=b"".join(hashes),
        lengths=struct.pack(f"<{len(lengths)}I", *lengths),
        sums=struct.pack(f"<{len(sums)}Q", *sums),
        raw_bytes=space.geometry.chunk_bytes * len(hashes),
    )
    for shard, data in enumerate(objects):
        store.put(shard_key(space.id, name, grid, shard), data)
    metadata = array_metadata(
        record, space.geometry, codec, space_id=space.id, fidelity=space.fidelity, writer="testing"
    )
    store.put(f"{extent_prefix(space.id, name)}/zarr.json", metadata)
    return record


def _encode(
    space: Space, codec: KVCodec, grid: Grid, hashes: Sequence[bytes], first_token: int, seed: int
) -> tuple[list[bytes], list[int], list[int]]:
    """Shard objects, and lengths and sums of their cells, [shard][chunk]."""
    geometry = space.geometry
    spec = CellSpec.of(geometry, grid)
    rng = np.random.default_rng(seed)
    bits = [random_bits(geometry.chunk_shape, geometry.kv_dtype, rng) for _ in hashes]
    objects: list[bytes] = []
    lengths: list[int] = []
    sums: list[int] = []
    for shard in range(grid.shards):
        layers, heads = geometry.cell_layers(grid, shard), geometry.cell_heads(grid, shard)
        cells = []
        for i, prefix_hash in enumerate(hashes):
            cell = bits[i][:, layers.start : layers.stop, :, heads.start : heads.stop]
            at = first_token + i * geometry.chunk_tokens
            cells.append(codec.encode(cell, spec, CellPosition(prefix_hash, at, layers.start, heads.start)))
        objects.append(build_shard(cells))
        lengths += map(len, cells)
        sums += map(xxh3, cells)
    return objects, lengths, sums
