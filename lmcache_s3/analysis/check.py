"""Does the bucket hold what the index says? Every byte of an extent: metadata, checksums, decoding, shard index.

Memory: about `_READ_BYTES` a call, or one cell if that is larger. What looks damaged is read a second time before it is
called so. Raises the store's `Unavailable` and `Invalid`; damage is returned, not raised.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lmcache_s3.calibration_store import attached
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.extent import MAX_METADATA_BYTES, record_from_metadata, shard_index
from lmcache_s3.identity import Space
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.verify import verify
from lmcache_s3.types import HASH_BYTES, CellRef, ExtentName, ExtentRecord, extent_prefix, shard_key

_READ_BYTES = 32 << 20
UNSUPPORTED = "unsupported"
"""The codec is not installed, or newer than this package; or the cells' calibration is not at hand."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong. key: of the object. kind: as of `Unusable`, or `UNSUPPORTED`."""

    extent: ExtentName
    key: str
    kind: str
    what: str

    @property
    def is_certain(self) -> bool:
        """The stored bytes are bad. False: this installation cannot tell, so nothing may be removed."""
        return self.kind != UNSUPPORTED


def check_extent(
    store: ObjectStore, space: Space, record: ExtentRecord, *, progress: Callable[[int], None] = lambda _: None
) -> list[Damage]:
    """What is wrong with an extent, the first finding of each object; empty if nothing is.

    progress: called with the number of encoded bytes just checked.
    """
    key = f"{extent_prefix(space.id, record.name)}/zarr.json"
    try:
        make_codec(record.name.codec)
    except Invalid as e:
        return [Damage(record.name, key, UNSUPPORTED, f"not checked: {e}")]
    try:
        codec = _twice(lambda: _codec_of(store, key, space, record))
    except Unusable as e:
        return [Damage(record.name, key, e.kind, str(e))]
    damage = []
    for shard in range(record.grid.shards):
        key = shard_key(space.id, record.name, record.grid, shard)
        try:
            with attached(store):
                _check_shard(store, key, space, record, shard, codec, progress)
        except Unusable as e:
            kind = UNSUPPORTED if e.kind == "calibration" else e.kind
            damage.append(Damage(record.name, key, kind, str(e)))
    return damage


def _twice(read: Callable[[], _Result]) -> _Result:
    """A transfer may have been cut or spoilt; what is stored does not change."""
    try:
        return read()
    except Unusable:
        return read()


def _codec_of(store: ObjectStore, key: str, space: Space, record: ExtentRecord) -> KVCodec:
    """The codec that zarr.json names, once it agrees with the index and the space."""
    data = store.get(key, limit_bytes=MAX_METADATA_BYTES)
    metadata = record_from_metadata(data, name=record.name, space_id=space.id)
    if metadata.record != record:
        raise Unusable("zarr.json and the index disagree", kind="format", key=key)
    if metadata.geometry != space.geometry:
        raise Unusable("zarr.json is of another shape than its space", kind="shape", key=key)
    if metadata.fidelity != space.fidelity:
        raise Unusable(f"zarr.json: fidelity {metadata.fidelity} in a space of {space.fidelity}", kind="codec", key=key)
    return metadata.codec


def _check_shard(
    store: ObjectStore,
    key: str,
    space: Space,
    record: ExtentRecord,
    shard: int,
    codec: KVCodec,
    progress: Callable[[int], None],
) -> None:
    geometry, grid = space.geometry, record.grid
    spec = CellSpec.of(geometry, grid)
    layer, head = geometry.cell_layers(grid, shard).start, geometry.cell_heads(grid, shard).start
    out = np.empty(spec.shape, geometry.storage_dtype)

    def check(cells: list[CellRef]) -> None:
        start = cells[0].offset
        data = memoryview(store.get(key, start, cells[-1].offset + cells[-1].length))
        for cell in cells:
            stored = data[cell.offset - start : cell.offset - start + cell.length]
            verify(cell, stored)
            at = HASH_BYTES * cell.position
            first_token = record.first_token + cell.position * geometry.chunk_tokens
            position = CellPosition(record.hashes[at : at + HASH_BYTES], first_token, layer, head)
            codec.decode(stored, spec, position, out)

    all_cells = record.cells(shard)
    for cells in _batches(all_cells):
        _twice(lambda cells=cells: check(cells))  # type: ignore[misc]
        progress(sum(cell.length for cell in cells))
    _twice(lambda: _check_index(store, key, record, shard, all_cells[-1].offset + all_cells[-1].length))


def _check_index(store: ObjectStore, key: str, record: ExtentRecord, shard: int, end: int) -> None:
    """What Zarr readers go by: the shard's own index, and that nothing follows it."""
    n = record.n_chunks
    expected = shard_index(struct.unpack_from(f"<{n}I", record.lengths, 4 * n * shard))
    if store.get(key, end, limit_bytes=len(expected)) != expected:
        raise Unusable(
            f"shard {shard} of extent {record.name}: its Zarr index is not as written", kind="format", key=key
        )


def _batches(cells: list[CellRef]) -> Iterator[list[CellRef]]:
    """Runs of cells of at most `_READ_BYTES` together, or single ones."""
    batch: list[CellRef] = []
    size = 0
    for cell in cells:
        if batch and size + cell.length > _READ_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(cell)
        size += cell.length
    yield batch
