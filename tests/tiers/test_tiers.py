"""The four tiers, by the conformance suite; and what only one of them does."""

from __future__ import annotations

import errno
import random
import secrets
from pathlib import Path

import pytest

from lmcache_s3.errors import Invalid, Unavailable
from lmcache_s3.extent import shard_index
from lmcache_s3.testing.cells import make_cells, refs
from lmcache_s3.testing.tier import TierTests
from lmcache_s3.tiers import segments
from lmcache_s3.tiers.base import Tier
from lmcache_s3.tiers.device import DeviceTier
from lmcache_s3.tiers.disk import CELL_BYTES, FIXED_BYTES, DiskTier
from lmcache_s3.tiers.host import HostTier
from lmcache_s3.tiers.journal import Place
from lmcache_s3.tiers.object import ObjectTier
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import CellRef, shard_key

MIB = 1 << 20


class TestHostTier(TierTests):
    lends = True
    unit_bytes = 4096

    def make_tier(self, budget_bytes: int, path: Path) -> HostTier:
        return HostTier(budget_bytes)

    def peek(self, tier: Tier, cell: CellRef) -> bytes | None:
        assert isinstance(tier, HostTier)
        entry = tier._find(cell)
        return None if entry is None else bytes(entry.held.memory(cell.length))


class TestDeviceTier(TierTests):
    unit_bytes = 512

    def make_tier(self, budget_bytes: int, path: Path) -> DeviceTier:
        return DeviceTier(budget_bytes, "cpu")

    def peek(self, tier: Tier, cell: CellRef) -> bytes | None:
        assert isinstance(tier, DeviceTier)
        entry = tier._find(cell)
        return None if entry is None else bytes(entry.held.cpu().numpy())


class TestDiskTier(TierTests):
    """Cells share segments, as where the file system can punch holes."""

    durable = True
    rereads = True
    cuts = False
    unit_bytes = 4096
    cell_bytes = CELL_BYTES
    fixed_bytes = FIXED_BYTES

    def make_tier(self, budget_bytes: int, path: Path) -> DiskTier:
        return DiskTier(path, budget_bytes, segment_bytes=40_000)

    def file(self, tier: Tier, cell: CellRef) -> tuple[Path, Place] | None:
        assert isinstance(tier, DiskTier)
        entry = tier._find(cell)
        return None if entry is None else (tier._segments.path(entry.held.place.segment), entry.held.place)

    def plant(self, tier: Tier, cell: CellRef, data: bytes | None) -> None:
        found = self.file(tier, cell)
        assert found is not None
        assert data is not None
        with found[0].open("r+b") as f:
            f.seek(found[1].start)
            f.write(data)

    def peek(self, tier: Tier, cell: CellRef) -> bytes | None:
        found = self.file(tier, cell)
        return None if found is None else found[0].read_bytes()[found[1].start :][: cell.length]


class TestDiskTierWithoutHoles(TestDiskTier):
    """Every cell has a segment of its own, as where it cannot."""

    cuts = True

    @pytest.fixture(autouse=True)
    def no_holes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(segments, "_punches", lambda folder: False)

    def plant(self, tier: Tier, cell: CellRef, data: bytes | None) -> None:
        found = self.file(tier, cell)
        assert found is not None
        if data is None:
            found[0].unlink()
            assert isinstance(tier, DiskTier)
            tier._segments.close()  # it would still read the file that it has open
        else:
            found[0].write_bytes(data)


class TestObjectTier(TierTests):
    durable = True
    evictable = False
    rereads = True

    def make_tier(self, budget_bytes: int, path: Path) -> ObjectTier:
        return ObjectTier(open_store(str(path / "bucket")), "ab" * 32, shard_index)

    def plant(self, tier: Tier, cell: CellRef, data: bytes | None) -> None:
        assert isinstance(tier, ObjectTier)
        key = shard_key("ab" * 32, cell.extent, cell.grid, cell.shard)
        if data is None:
            tier._store.delete(key)
            return
        body = tier._store.get(key)
        if len(data) < cell.length:  # shorter: the object ends there
            tier._store.put(key, body[: cell.offset] + data)
        else:
            tier._store.put(key, body[: cell.offset] + data + body[cell.offset + len(data) :])

    def peek(self, tier: Tier, cell: CellRef) -> bytes | None:
        assert isinstance(tier, ObjectTier)
        keys = [one.key for one in tier._store.list("")]
        key = shard_key("ab" * 32, cell.extent, cell.grid, cell.shard)
        return tier._store.get(key, cell.offset, cell.offset + cell.length) if key in keys else None


# --- object


def test_consecutive_cells_are_one_request() -> None:
    store = CountingStore(open_store(f"memory://tier-{secrets.token_hex(4)}"))
    tier = ObjectTier(store, "ab" * 32, shard_index)
    a, b = (make_cells(random.Random(i), [100] * 8) for i in range(2))
    tier.put(a)
    tier.put(b)
    assert store.counts["put"] == 2
    tier.get(refs(a))
    assert sum(store.counts.values()) - 2 == 1
    tier.get([*refs(a)[2:5], *refs(a)[6:8], *refs(b)])
    assert sum(store.counts.values()) - 3 == 3
    assert store.read_bytes == 800 + 500 + 800


def test_only_whole_shards_are_put() -> None:
    tier = ObjectTier(open_store(f"memory://tier-{secrets.token_hex(4)}"), "ab" * 32, shard_index)
    cells = make_cells(random.Random(1), [100] * 3)
    for part in (cells[1:], cells[:2], [cells[0], cells[2], cells[1]]):
        with pytest.raises(Invalid):
            tier.put(part)
    assert tier.put([]) == 0


# --- host


def test_where_the_system_has_less_memory_than_the_budget_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = HostTier(MIB)
    cells = make_cells(random.Random(1), [4_000, 20_000])
    taken = tier._slabs._map

    def second_fails(size_bytes: int, size: object) -> object:
        if tier._slabs.mapped_bytes:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return taken(size_bytes, size)  # type: ignore[arg-type]

    monkeypatch.setattr(tier._slabs, "_map", second_fails)
    for _ in range(3):
        with pytest.raises(Unavailable, match="no memory left"):
            tier.put(cells)
        assert (tier.stats().cells, tier.stats().used_bytes) == (0, 0)
    assert tier.put(cells[:1]) == 1


def test_a_write_that_fails_unforeseen_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = HostTier(MIB)
    cells = make_cells(random.Random(1), [4_000, 20_000])

    def fails(cells: object) -> None:
        raise RuntimeError("CUDA error")

    with monkeypatch.context() as broken:
        broken.setattr(tier, "_write", fails)
        with pytest.raises(RuntimeError):
            tier.put(cells)
    assert (tier.stats().cells, tier.stats().used_bytes) == (0, 0)
    assert tier.put(cells) == 2


# --- device, budgets


def test_an_unknown_device_is_refused() -> None:
    for device in ("tpu", "cuda:99"):
        with pytest.raises(Invalid, match="no torch device"):
            DeviceTier(1_000, device)


@pytest.mark.parametrize("budget_bytes", [0, -1])
def test_a_budget_must_be_positive(budget_bytes: int) -> None:
    with pytest.raises(Invalid, match="must be positive"):
        HostTier(budget_bytes)
