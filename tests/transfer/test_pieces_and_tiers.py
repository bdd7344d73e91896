"""Where a load's cells come from: requests of a bounded size, the fastest tier that has them; what is promoted when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lmcache_s3.errors import Invalid
from lmcache_s3.testing.small import random_kv, same_bits
from lmcache_s3.testing.whole_arrays import SPACE, MakeTransfer, N, load, upload
from lmcache_s3.tiers.disk import DiskTier
from lmcache_s3.tiers.eviction.base import Item
from lmcache_s3.tiers.eviction.lru import LRUPolicy
from lmcache_s3.tiers.host import HostTier
from lmcache_s3.tiers.stores.counting import CountingStore


def test_pieces_bound_requests_from_both_sides(make: MakeTransfer, store: CountingStore) -> None:
    kv = random_kv(SPACE, 8 * N)
    chunks = upload(make(), kv)
    cell_bytes = chunks[0].cell(0).length
    for piece_bytes, requests in ((64 << 20, 1), (4 * cell_bytes, 2), (1, 8)):
        before = store.counts["get"]
        out, report, _ = load(make(piece_bytes=piece_bytes), chunks)
        assert report.requests == store.counts["get"] - before == requests
        assert report.tier_bytes == {"object": 8 * cell_bytes}
        assert same_bits(out, kv)


def test_the_first_nine_of_sixteen_chunks_are_one_request(make: MakeTransfer, store: CountingStore) -> None:
    kv = random_kv(SPACE, 16 * N)
    chunks = upload(make(), kv)
    store.reset()
    out, report, _ = load(make(), chunks[:9])
    assert (report.requests, store.counts["get"]) == (1, 1)
    assert store.read_bytes == sum(chunk.cell(0).length for chunk in chunks[:9])
    assert same_bits(out, kv[:, :, : 9 * N])


def test_what_was_uploaded_comes_from_the_host_and_what_was_loaded_is_promoted(
    make: MakeTransfer, store: CountingStore, tmp_path: Path
) -> None:
    kv = random_kv(SPACE, 4 * N)
    writer = make(HostTier(1 << 20))
    chunks = upload(writer, kv)
    assert writer.drain(5)
    assert store.counts["get"] == 0
    assert set(load(writer, chunks)[1].tier_bytes) == {"host"}
    host, disk = HostTier(1 << 20), DiskTier(tmp_path, 1 << 20)
    reader = make(host, disk)
    for source in ("object", "host"):
        out, report, _ = load(reader, chunks)
        assert set(report.tier_bytes) == {source}
        assert same_bits(out, kv)
        assert reader.drain(5)
    host.evict(1 << 20)
    out, report, _ = load(reader, chunks)
    assert (set(report.tier_bytes), report.requests) == ({"disk"}, 0)
    assert same_bits(out, kv)
    assert reader.drain(5)
    assert host.stats().cells == 4
    assert reader.budget.held_bytes == 0


def test_each_cell_comes_from_the_fastest_tier_that_has_it(make: MakeTransfer, tmp_path: Path) -> None:
    host, disk = HostTier(1 << 20), DiskTier(tmp_path, 1 << 20)
    transfer = make(host, disk)
    kv = random_kv(SPACE, 6 * N)
    chunks = upload(transfer, kv)
    assert transfer.drain(5)
    cells = [chunk.cell(0) for chunk in chunks]
    host.discard(cells[2:])
    disk.discard([cells[1], cells[4]])
    out, report, _ = load(transfer, chunks)
    n = cells[0].length
    assert report.tier_bytes == {"host": 2 * n, "disk": 3 * n, "object": n}
    assert same_bits(out, kv)


def test_a_damaged_disk_is_passed_over_and_mended(make: MakeTransfer, tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 20)
    transfer = make(disk)
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(transfer, kv)
    assert transfer.drain(5)
    for chunk in (chunks[1], chunks[3]):
        _damage(tmp_path, bytes(disk.get([chunk.cell(0)])[0]))
    out, report, _ = load(transfer, chunks)
    assert not report.failed
    assert report.requests == 2
    assert same_bits(out, kv)
    assert transfer.drain(5)
    assert disk.stats().bad_cells == 2
    assert load(transfer, chunks)[1].requests == 0


def _damage(folder: Path, data: bytes) -> None:
    """Flip a bit of these bytes wherever they lie below a folder."""
    for file in [one for one in folder.rglob("*") if one.is_file()]:
        place = file.read_bytes().find(data)
        if place >= 0:
            with file.open("r+b") as f:
                f.seek(place + 50)
                f.write(bytes([data[50] ^ 4]))


def test_prefetch_brings_cells_into_a_tier(make: MakeTransfer, tmp_path: Path) -> None:
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(make(), kv)
    transfer = make(HostTier(1 << 20), DiskTier(tmp_path, 1 << 20))
    assert transfer.prefetch(chunks, "disk").result(5).loaded_chunks == 4
    assert [transfer.stats()[name].cells for name in ("host", "disk")] == [0, 4]
    assert transfer.prefetch(chunks, "host").result(5).tier_bytes == {"disk": sum(c.cell(0).length for c in chunks)}
    assert transfer.stats()["host"].cells == 4
    for name in ("device", "object"):
        with pytest.raises(Invalid, match="there is: host, disk"):
            transfer.prefetch(chunks, name)


def test_promotions_of_a_load_wait_for_its_end(make: MakeTransfer) -> None:
    chunks = upload(make(), random_kv(SPACE, 8 * N))
    transfer = make(HostTier(1 << 20), io_threads=1, piece_bytes=1)
    kept: list[int] = []

    def sink(chunk: int, layers: range, heads: range, cell: np.ndarray) -> None:
        kept.append(transfer.stats()["host"].cells)

    assert transfer.load(chunks, sink).result(10).loaded_chunks == 8
    assert set(kept) == {0}
    assert transfer.drain(5)
    assert transfer.stats()["host"].cells == len(kept)


class Uses(LRUPolicy):
    """Remembers what it was told of."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[list[int]] = []

    def use(self, items: Sequence[Item], now_s: float) -> None:
        self.told.append([item.depth_tokens // N for item in items])
        super().use(items, now_s)


def test_a_tier_hears_of_a_load_once_and_whole(make: MakeTransfer, store: CountingStore) -> None:
    """However many pieces it is read and promoted in: policies learn from whole prompts."""
    chunks = upload(make(), random_kv(SPACE, 8 * N))
    uses = Uses()
    reader = make(HostTier(1 << 20, eviction=uses, chunk_tokens=N), piece_bytes=1)
    for _ in range(2):
        load(reader, chunks)
        assert reader.drain(5)
    assert uses.told == [list(range(8))] * 2
    reader.prefetch(chunks).result(5)
    assert len(uses.told) == 2, "nobody has asked for it yet"
