"""The disk tier beyond the conformance suite: who owns a directory, what full and failing disks do, restarts, kills."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lmcache_s3.errors import Invalid, Missing, Unavailable, Unusable
from lmcache_s3.testing.cells import Cells, make_cells, plain, refs
from lmcache_s3.testing.killing import killed_writer
from lmcache_s3.tiers.disk import FIXED_BYTES, DiskTier
from lmcache_s3.tiers.eviction.base import Item
from lmcache_s3.tiers.eviction.lru import LRUPolicy

MIB = 1 << 20


def on_disk_bytes(path: Path) -> int:
    """What a directory really takes, itself included."""
    return sum(one.lstat().st_blocks * 512 for one in (path, *path.rglob("*")))


def segment_files(path: Path) -> list[Path]:
    return sorted((path / "segments").iterdir())


# --- the directory


def test_one_process_owns_a_directory(tmp_path: Path) -> None:
    first = DiskTier(tmp_path, MIB)
    with pytest.raises(Invalid, match="in use by another process; give each its own directory") as e:
        DiskTier(tmp_path, MIB)
    assert (e.value.kind, e.value.key) == ("setting", "disk_path")
    code = f"from lmcache_s3.tiers.disk import DiskTier; DiskTier({str(tmp_path)!r}, {MIB})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is in use by another process" in other.stderr
    first.close()
    DiskTier(tmp_path, MIB).close()


def test_a_directory_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Invalid, match=r"disk_path=.*give a directory that can be written") as e:
        DiskTier(tmp_path / "file" / "below", MIB)
    assert "\n" not in str(e.value)


def test_a_budget_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="needs more than 128KiB"):
        DiskTier(tmp_path, FIXED_BYTES)


def test_the_old_layout_goes_and_strangers_stay(tmp_path: Path) -> None:
    name = str(make_cells(random.Random(1), [100])[0][0].extent)
    folder = tmp_path / "cells" / name[:2]
    folder.mkdir(parents=True)
    for file in (f"{name}.0.0", f"{name}.11.7", ".writing-1-1"):
        (folder / file).write_bytes(b"x" * 100)
    DiskTier(tmp_path, MIB).close()
    assert not (tmp_path / "cells").exists()
    folder.mkdir(parents=True)
    (folder / f"{name}.0.0").write_bytes(b"x")
    for stranger in (folder / "notes.txt", tmp_path / "segments" / "notes.txt"):
        stranger.write_text("hello")
    DiskTier(tmp_path, MIB).close()
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]
    assert (tmp_path / "segments" / "notes.txt").exists()


# --- full and failing disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB. Skipped where we may not mount one."""
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs privileges")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_file_system_keeps_nothing_new_and_serves_what_it_has(small_disk: Path) -> None:
    rng = random.Random(1)
    tier = DiskTier(small_disk, 8 * MIB)
    kept: list[Cells] = []
    error: Unavailable | None = None
    while error is None:
        cells = make_cells(rng, [60_000, 50_000])
        try:
            tier.put(cells)
        except Unavailable as e:
            error = e
        else:
            kept.append(cells)
    assert error.kind == "full"
    assert 4 < len(kept) < 10
    assert tier.match_prefix(refs(cells)) == 0
    for _ in range(5):
        with pytest.raises(Unavailable):
            tier.put(make_cells(rng, [60_000, 50_000]))
    for cells in kept:
        assert plain(tier.get(refs(cells))) == [data for _, data in cells]
    tier.close()
    tier = DiskTier(small_disk, 8 * MIB)
    assert all(tier.match_prefix(refs(cells)) == 2 for cells in kept)
    tier.evict(200_000)
    assert tier.put(make_cells(rng, [60_000, 50_000])) == 2
    tier.close()


def test_a_read_only_file_system_serves_what_it_has(small_disk: Path) -> None:
    rng = random.Random(1)
    tier = DiskTier(small_disk, 8 * MIB)
    cells = make_cells(rng, [60_000, 50_000])
    tier.put(cells)
    tier._journal.close()  # no file may be open for writing while it becomes read-only
    tier._segments.close()
    os.close(tier._lock_fd)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(Unavailable):
        tier.put(make_cells(rng, [60_000]))
    with pytest.raises(Unavailable):
        tier.evict(1)
    tier.discard(refs(cells)[:1])
    with pytest.raises(Invalid):
        DiskTier(small_disk, 8 * MIB)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    tier = DiskTier(small_disk, 8 * MIB)
    assert plain(tier.get(refs(cells))) == [data for _, data in cells]
    tier.close()


def test_files_that_may_not_grow_leave_no_trace(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, MIB)
    cells = make_cells(random.Random(1), [100, 100, 50_000])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the kernel then refuses longer files (EFBIG)
    try:
        with pytest.raises(Unavailable) as e:
            tier.put(cells)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert e.value.kind == "full"
    assert tier.stats().used_bytes == 0
    assert on_disk_bytes(tmp_path) <= FIXED_BYTES
    assert tier.put(cells) == 3
    tier.close()


def test_a_directory_that_breaks_later_is_unavailable(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, MIB)
    (tmp_path / "segments").rmdir()
    with pytest.raises(Unavailable) as e:
        tier.put(make_cells(random.Random(1), [100]))
    assert e.value.kind == "io"
    assert tier.stats().used_bytes == 0
    tier.close()


# --- the budget


@pytest.mark.parametrize("segment_bytes", [1, 300_000])
def test_what_lies_on_disk_never_exceeds_the_budget(tmp_path: Path, segment_bytes: int) -> None:
    rng, budget = random.Random(3), 2 * MIB
    known: list[Cells] = []
    tier = DiskTier(tmp_path, budget, segment_bytes=segment_bytes)
    for i in range(300):
        cells = make_cells(rng, [rng.randrange(1, 60_000) for _ in range(rng.randrange(1, 5))])
        tier.put(cells)
        known.append(cells)
        if i % 7 == 0:
            tier.discard(refs(rng.choice(known)))
        if i % 60 == 59:
            tier.close()
            budget = rng.choice([MIB, 2 * MIB])
            tier = DiskTier(tmp_path, budget, segment_bytes=segment_bytes)
        assert tier.stats().used_bytes <= budget
        assert on_disk_bytes(tmp_path) <= budget
    held = [cells for cells in known if tier.match_prefix(refs(cells)) == len(cells)]
    assert len(held) > 5
    for cells in held:
        assert plain(tier.get(refs(cells))) == [data for _, data in cells]
    tier.evict(budget)
    assert on_disk_bytes(tmp_path) <= FIXED_BYTES
    tier.close()


def test_the_journal_stays_short(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 2 * MIB)
    cells = make_cells(random.Random(1), [10] * 20)
    for _ in range(300):
        tier.put(cells)
        tier.get(refs(cells))
        tier.discard(refs(cells))
    assert (tmp_path / "journal").stat().st_size < 100_000
    tier.close()


def test_the_journal_stays_short_where_cells_are_only_read(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 2 * MIB)
    cells = make_cells(random.Random(1), [10] * 250)
    tier.put(cells)
    for i in range(12_000):
        tier.get(refs(cells)[i % 250 :][:1])
    assert (tmp_path / "journal").stat().st_size < 200_000
    tier.discard(refs(cells)[10:])
    tier.close()
    again = DiskTier(tmp_path, 2 * MIB)
    assert plain(again.get(refs(cells)[:10])) == [data for _, data in cells[:10]]
    assert again.match_prefix(refs(cells)[10:]) == 0
    again.close()


def test_what_goes_while_the_journal_is_rewritten_is_not_in_the_new_one(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 4 * MIB)
    rng = random.Random(1)
    tier.put(kept := make_cells(rng, [10] * 4))
    for i in range(2000):
        tier.put(cells := make_cells(rng, [10]))
        for _ in range(i % 3):
            tier.get(refs(kept))
        tier.discard(refs(cells))
    os.close(tier._lock_fd)  # as a kill would
    again = DiskTier(tmp_path, 4 * MIB)
    # What went since the last note is still named: so many at most.
    assert again.stats().cells <= 4 + 256
    assert again.match_prefix(refs(kept)) == 4
    again.close()


# --- restarts


def test_order_of_use_survives_without_a_proper_end(tmp_path: Path) -> None:
    """Uses are written down in batches: after a kill the last few hundred are forgotten, and nothing else."""
    rng = random.Random(1)
    tier = DiskTier(tmp_path, 8 * MIB)
    old, new = [make_cells(rng, [5_000]) for _ in range(100)], [make_cells(rng, [5_000]) for _ in range(100)]
    for cells in old + new:
        tier.put(cells)
    for cells in old * 3:
        tier.get(refs(cells))
    os.close(tier._lock_fd)  # as a kill would
    again = DiskTier(tmp_path, FIXED_BYTES + 150 * 8192)
    assert sum(again.match_prefix(refs(cells)) for cells in old) == 100
    assert sum(again.match_prefix(refs(cells)) for cells in new) == 50
    again.close()


def test_times_to_come_count_as_now(tmp_path: Path) -> None:
    """A clock that was wrong for a while must not leave the order of use standing still until it is that late."""
    rng = random.Random(1)
    tier = DiskTier(tmp_path, MIB, clock=lambda: 5_000.0)
    first, second = make_cells(rng, [5_000]), make_cells(rng, [5_000])
    tier.put(first)
    tier.put(second)
    tier.close()
    seen: list[float] = []

    class Policy(LRUPolicy):
        def use(self, items: Sequence[Item], now_s: float) -> None:
            seen.append(now_s)
            super().use(items, now_s)

    now_s = [1_000.0]
    tier = DiskTier(tmp_path, MIB, eviction=Policy(), clock=lambda: now_s[0])
    now_s[0] += 10.0
    tier.get(refs(first))
    assert seen == [1_000.0, 1_000.0, 1_010.0]
    tier.evict(1)
    assert (tier.match_prefix(refs(first)), tier.match_prefix(refs(second))) == (1, 0)
    tier.close()


def test_a_torn_journal_loses_only_what_is_torn(tmp_path: Path) -> None:
    rng = random.Random(1)
    tier = DiskTier(tmp_path, 8 * MIB)
    sets = [make_cells(rng, [3_000, 5_000]) for _ in range(10)]
    ends = []
    for cells in sets:
        tier.put(cells)
        ends.append((tmp_path / "journal").stat().st_size)
    tier.close()
    whole = (tmp_path / "journal").read_bytes()
    torn = whole[: ends[3] + 10] + whole[ends[4] :]  # the fifth's frame is cut off, the others follow
    (tmp_path / "journal").write_bytes(torn[: ends[9] - ends[4] + ends[3] + 10 - 7])  # and the last one's as well
    for _ in range(2):
        tier = DiskTier(tmp_path, 8 * MIB)
        assert [tier.match_prefix(refs(cells)) for cells in sets] == [2, 2, 2, 2, 0, 2, 2, 2, 2, 0]
        taken = sum(file.stat().st_blocks * 512 for file in segment_files(tmp_path))
        assert taken == 8 * (4096 + 8192), "what is in no journal is freed"
        tier.close()


def test_any_damage_is_a_miss(tmp_path: Path) -> None:
    """Bytes changed, cut off, taken away or put in anywhere in the directory: never wrong bytes, never an exception."""
    for seed in range(60):
        rng, path = random.Random(seed), tmp_path / str(seed)
        tier = DiskTier(path, 8 * MIB, segment_bytes=40_000)
        sets = [make_cells(rng, [rng.randrange(1, 9_000) for _ in range(3)]) for _ in range(6)]
        for cells in sets:
            tier.put(cells)
        tier.close()
        file = rng.choice([path / "journal", path / "journal", *segment_files(path)])
        data = bytearray(file.read_bytes())
        at = rng.randrange(len(data))
        how = rng.randrange(4)
        if how == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            del data[at : at + rng.randrange(1, 5_000)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 5_000))
        file.write_bytes(data)
        tier = DiskTier(path, 8 * MIB, segment_bytes=40_000)
        for cells in sets:
            for ref, right in cells:
                try:
                    assert plain(tier.get([ref])) == [right]
                except (Missing, Unusable):
                    assert tier.match_prefix([ref]) == 0
            assert tier.put(cells) == 3
            assert plain(tier.get(refs(cells))) == [right for _, right in cells]
        tier.close()


def test_what_was_kept_is_there_after_a_kill(tmp_path: Path) -> None:
    for seed in range(3):
        kept = killed_writer(tmp_path, seed, after_s=0.1)
        assert kept
        tier = DiskTier(tmp_path, 1 << 30)
        for cells in kept:
            assert plain(tier.get(refs(cells))) == [data for _, data in cells]
        assert on_disk_bytes(tmp_path) <= FIXED_BYTES + tier.stats().used_bytes
        tier.close()
