"""The four tiers, by the conformance suite; and what only one of them does."""

from __future__ import annotations

import os
import random
import resource
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache_s3.errors import Invalid, Unavailable, Unusable
from lmcache_s3.extent import shard_index
from lmcache_s3.testing.tier import TierTests, make_cells, plain, refs
from lmcache_s3.tiers.base import Tier
from lmcache_s3.tiers.device import DeviceTier
from lmcache_s3.tiers.disk import DiskTier
from lmcache_s3.tiers.host import HostTier
from lmcache_s3.tiers.lru import LRU, key_of
from lmcache_s3.tiers.object import ObjectTier
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import CellRef, shard_key


class TestHostTier(TierTests):
    def make_tier(self, budget_bytes: int, path: Path) -> HostTier:
        return HostTier(budget_bytes)

    def peek(self, tier: Tier, cell: CellRef) -> bytes | None:
        assert isinstance(tier, HostTier)
        held = tier._lru.held(key_of(cell))
        return None if held is None else bytes(held)


class TestDeviceTier(TierTests):
    def make_tier(self, budget_bytes: int, path: Path) -> DeviceTier:
        return DeviceTier(budget_bytes, "cpu")

    def peek(self, tier: Tier, cell: CellRef) -> bytes | None:
        assert isinstance(tier, DeviceTier)
        held = tier._lru.held(key_of(cell))
        return None if held is None else bytes(held.cpu().numpy())


class TestDiskTier(TierTests):
    durable = True
    rereads = True

    def make_tier(self, budget_bytes: int, path: Path) -> DiskTier:
        return DiskTier(path, budget_bytes)

    def file(self, tier: Tier, cell: CellRef) -> Path:
        assert isinstance(tier, DiskTier)
        name = str(cell.extent)
        return tier._root / "cells" / name[:2] / f"{name}.{cell.shard}.{cell.position}"

    def plant(self, tier: Tier, cell: CellRef, data: bytes | None) -> None:
        if data is None:
            self.file(tier, cell).unlink()
        else:
            self.file(tier, cell).write_bytes(data)

    def peek(self, tier: Tier, cell: CellRef) -> bytes | None:
        file = self.file(tier, cell)
        return file.read_bytes() if file.exists() else None


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


# --- disk


def test_one_process_owns_a_directory(tmp_path: Path) -> None:
    first = DiskTier(tmp_path, 1_000)
    with pytest.raises(Invalid, match="in use by another process; give each its own directory") as e:
        DiskTier(tmp_path, 1_000)
    assert (e.value.kind, e.value.key) == ("setting", "disk_path")
    code = f"from lmcache_s3.tiers.disk import DiskTier; DiskTier({str(tmp_path)!r}, 1000)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is in use by another process" in other.stderr
    first.close()
    DiskTier(tmp_path, 1_000).close()


def test_a_directory_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Invalid, match=r"disk_path=.*give a directory that can be written") as e:
        DiskTier(tmp_path / "file" / "below", 1_000)
    assert "\n" not in str(e.value)


def test_half_written_files_go_at_start_and_strangers_stay(tmp_path: Path) -> None:
    rng = random.Random(1)
    tier = DiskTier(tmp_path, 1_000)
    cells = make_cells(rng, [100])
    tier.put(cells)
    folder = tmp_path / "cells" / str(cells[0][0].extent)[:2]
    tier.close()
    half, stranger, misplaced = folder / ".writing-1-1", folder / "notes.txt", tmp_path / "cells" / "zz"
    half.write_bytes(b"x" * 900)
    stranger.write_text("hello")
    misplaced.mkdir()
    (misplaced / (folder / f"{cells[0][0].extent}.0.0").name).write_bytes(b"x")
    tier = DiskTier(tmp_path, 1_000)
    assert not half.exists()
    assert stranger.exists()
    assert tier.stats().used_bytes == 100
    assert plain(tier.get(refs(cells))) == [cells[0][1]]
    tier.close()


def test_a_full_disk_is_unavailable_and_leaves_no_trace(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1 << 20)
    cells = make_cells(random.Random(1), [100, 100, 5_000])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))  # the kernel then refuses longer files (EFBIG)
    try:
        with pytest.raises(Unavailable) as e:
            tier.put(cells)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert e.value.kind == "full"
    assert [file for file in (tmp_path / "cells").rglob("*") if file.is_file()] == []
    assert tier.stats().used_bytes == 0
    assert tier.put(cells) == 3
    tier.close()


def test_a_directory_that_breaks_later_is_unavailable(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1 << 20)
    cells = make_cells(random.Random(1), [100])
    (tmp_path / "cells" / str(cells[0][0].extent)[:2]).write_text("a file where a directory should be")
    with pytest.raises(Unavailable) as e:
        tier.put(cells)
    assert e.value.kind == "io"
    assert tier.stats().used_bytes == 0
    tier.close()


def test_oversized_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1 << 20)
    cells = make_cells(random.Random(1), [100])
    tier.put(cells)
    [file] = [file for file in (tmp_path / "cells").rglob("*") if file.is_file()]
    os.truncate(file, 1 << 40)  # sparse; reading it would not end well
    with pytest.raises(Unusable) as e:
        tier.get(refs(cells))
    assert e.value.kind == "oversized"
    tier.close()


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


# --- device, budgets


def test_an_unknown_device_is_refused() -> None:
    for device in ("tpu", "cuda:99"):
        with pytest.raises(Invalid, match="no torch device"):
            DeviceTier(1_000, device)


@pytest.mark.parametrize("budget_bytes", [0, -1])
def test_a_budget_must_be_positive(budget_bytes: int) -> None:
    with pytest.raises(Invalid, match="must be positive"):
        LRU[bytes](budget_bytes)
