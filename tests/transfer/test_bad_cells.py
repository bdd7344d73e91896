"""Cells that are missing, damaged or not what they should be: their chunk fails, the prefix before it is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lmcache_s3.errors import Unavailable, Unusable
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.small import random_kv, same_bits
from lmcache_s3.testing.whole_arrays import GETS, SPACE, MakeTransfer, N, load, upload
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.types import ChunkRef, Grid, shard_key


@pytest.mark.parametrize("kind", ["missing", "truncated", "checksum", "swapped"])
def test_damage_fails_its_chunk_and_leaves_the_prefix(make: MakeTransfer, store: CountingStore, kind: str) -> None:
    transfer = make()
    kv = random_kv(SPACE, 6 * N)
    chunks = upload(transfer, kv)
    key = shard_key(SPACE.id, chunks[0].extent.name, Grid(), 0)
    body = bytearray(store.get(key))
    a, b = chunks[3].cell(0), chunks[4].cell(0)
    if kind == "missing":
        store.delete(key)
    else:
        if kind == "truncated":
            del body[a.offset + 100 :]
        elif kind == "checksum":
            body[a.offset + 5] ^= 16
        else:
            first, second = body[a.offset : b.offset], body[b.offset : b.offset + b.length]
            body[a.offset : b.offset + b.length] = second + first
        store.put(key, body)
    out, report, _ = load(transfer, chunks)
    loaded = 0 if kind == "missing" else 3
    assert report.loaded_chunks == loaded
    assert same_bits(out[:, :, : loaded * N], kv[:, :, : loaded * N])
    index, name, error = report.failed[0]
    assert (index, name) == (loaded, chunks[0].extent.name)
    assert isinstance(error, Unusable)
    assert error.kind == ("checksum" if kind == "swapped" else kind)


def test_a_valid_cell_of_another_place_is_refused_by_its_position(make: MakeTransfer) -> None:
    """The index's checksum matches, but the cell says that it belongs elsewhere."""
    transfer = make(codec="safetensors")
    chunks = upload(transfer, random_kv(SPACE, 2 * N))
    lie = [ChunkRef(bytes(16), chunks[0].extent, 0), chunks[1]]
    _, report, calls = load(transfer, lie)
    assert report.loaded_chunks == 0
    assert report.failed[0][2].kind == "position"
    assert not [call for call in calls if call[0] == 0]


def test_what_cannot_be_right_is_not_asked_for(make: MakeTransfer, store: CountingStore) -> None:
    transfer = make()
    [chunk] = upload(transfer, random_kv(SPACE, N))
    record = chunk.extent
    lies = {
        "oversized": replace(record, lengths=(2**32 - 1).to_bytes(4, "little")),
        "truncated": replace(record, lengths=bytes(4)),
        "codec": replace(record, name=replace(record.name, codec="zstd")),
        "shape": replace(record, grid=Grid(3, 1), lengths=record.lengths * 3, sums=record.sums * 3),
    }
    before = store.counts["get"]
    for kind, lie in lies.items():
        _, report, _ = load(transfer, [ChunkRef(chunk.prefix_hash, lie, 0)])
        [(index, name, error)] = report.failed
        assert (index, name, error.kind, type(error)) == (0, lie.name, kind, Unusable)
    assert store.counts["get"] == before


def test_chunks_behind_the_first_failure_are_not_fetched(make: MakeTransfer, store: CountingStore) -> None:
    kv = random_kv(SPACE, 30 * N)
    chunks = upload(make(), kv)
    faulty = FaultyStore(store, [Fault(mode="error", verbs=GETS, times=1)])
    transfer = make(over=faulty, io_threads=1, piece_bytes=1)
    _, report, _ = load(transfer, chunks)
    assert (report.loaded_chunks, report.requests) == (0, 1)
    assert [index for index, _, _ in report.failed] == [0]
    assert isinstance(report.failed[0][2], Unavailable)
