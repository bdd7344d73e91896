"""The disk tier's part of `bench tiers`: reading, beside the same bytes read plainly; opening again; being killed."""

from __future__ import annotations

import gc
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lmcache_s3.benchmarks.figures import Figure
from lmcache_s3.benchmarks.in_turn import Race
from lmcache_s3.codecs.checksum import xxh3
from lmcache_s3.errors import Unusable
from lmcache_s3.testing.cells import Cells, make_cells, refs
from lmcache_s3.testing.killing import BUDGET_BYTES, killed_writer
from lmcache_s3.tiers.disk import DiskTier
from lmcache_s3.tiers.eviction.hazard import HazardPolicy

_ROUNDS = 7
_OPENS = 7
_FILES, _FILE_BYTES = 2_000, 64 << 10


def reads(path: Path, prompts: Sequence[Cells]) -> list[Figure]:
    """Prompts of 16 MiB each, got from the tier, beside bare reads of the same files in pieces of as many bytes."""
    tier = DiskTier(path, 1 << 30)
    for prompt in prompts:
        tier.put(prompt)
    os.sync()
    wanted = [refs(prompt) for prompt in prompts]
    piece = memoryview(mmap.mmap(-1, sum(cell.length for cell in wanted[0])))
    files = sorted((path / "segments").iterdir(), key=lambda file: int(file.stem))
    starts = [(file, at) for file in files for at in range(0, file.stat().st_size, len(piece))]

    def plain(i: int, flags: int = 0) -> None:
        file, start = starts[i]
        fd = os.open(file, os.O_RDONLY | flags)
        got = 0
        while got < len(piece):
            got += os.preadv(fd, [piece[got:]], start + got)
        os.close(fd)

    def forget() -> None:
        for file in files:
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    rivals: dict[str, Callable[[int], object]] = {
        "ours": lambda i: tier.get(wanted[i]),
        "plain": plain,
        "direct": lambda i: plain(i, os.O_DIRECT),
    }
    cold, warm = Race(rivals, len(prompts), _ROUNDS, forget), Race(rivals, len(prompts), _ROUNDS)
    tier.close()
    n_bytes = len(piece) * len(prompts)
    return [
        Figure("tiers.disk_get_vs_raw", cold.speed("ours", "plain"), "nothing in the page cache", 0.8, "higher"),
        Figure("tiers.disk_get_vs_o_direct", cold.speed("ours", "direct"), "", None, "higher"),
        Figure("tiers.disk_get_gb_per_s", n_bytes / cold.median_s("ours") / 1e9, "GB/s", None, "higher"),
        Figure("tiers.disk_get_cached_vs_raw", warm.speed("ours", "plain"), "all in it", None, "higher"),
        Figure("tiers.disk_get_cached_gb_per_s", n_bytes / warm.median_s("ours") / 1e9, "GB/s", None, "higher"),
    ]


def bare_files(path: Path) -> list[Figure]:
    """A file a cell (written aside and renamed, read and verified), the plainest disk cache, beside the tier."""
    rng = random.Random(2)
    prompts = [make_cells(rng, [_FILE_BYTES] * 20) for _ in range(_FILES // 20)]
    folder = path / "cells"
    folder.mkdir(parents=True)
    tier = DiskTier(path / "tier", 1 << 30)

    def write(prompt: Cells) -> None:
        for cell, data in prompt:
            temporary = folder / f".{cell.position}"
            temporary.write_bytes(data)
            temporary.rename(folder / f"{cell.extent}.{cell.shard}.{cell.position}")

    def read(prompt: Cells) -> None:
        for cell, _ in prompt:
            data = (folder / f"{cell.extent}.{cell.shard}.{cell.position}").read_bytes()
            if xxh3(data) != cell.checksum:
                raise Unusable("a file changed", kind="checksum")

    puts: dict[str, Callable[[int], object]] = {
        "tier": lambda i: tier.put(prompts[i]),
        "files": lambda i: write(prompts[i]),
    }
    gets: dict[str, Callable[[int], object]] = {
        "tier": lambda i: tier.get(refs(prompts[i])),
        "files": lambda i: read(prompts[i]),
    }
    put, get = Race(puts, len(prompts), 1, warm_up=False), Race(gets, len(prompts), _ROUNDS)
    tier.close()
    return [
        Figure("tiers.disk_put_vs_file_a_cell", put.speed("tier", "files"), "", None, "higher"),
        Figure("tiers.disk_get_vs_file_a_cell", get.speed("tier", "files"), "", None, "higher"),
    ]


def reopening(path: Path, n_cells: int) -> list[Figure]:
    """Seconds from a new tier over a full directory to the first cells it serves."""
    rng = random.Random(3)
    tier = DiskTier(path, 8192 * n_cells + (1 << 20))
    prompt: Cells = []
    for _ in range(n_cells // 50):
        prompt = make_cells(rng, [300] * 50)
        tier.put(prompt)
    tier.close()
    taken = []
    for _ in range(_OPENS):
        gc.collect()
        start = time.perf_counter()
        tier = DiskTier(path, 8192 * n_cells + (1 << 20), eviction=HazardPolicy())
        tier.get(refs(prompt))
        taken.append(time.perf_counter() - start)
        assert tier.stats().cells == n_cells // 50 * 50
        tier.close()
    return [
        Figure("tiers.disk_reopen_100k_s", statistics.median(taken), "s", 1.0, "lower"),
        Figure("tiers.disk_reopen_100k_best_s", min(taken), "s", None, "lower"),
    ]


def kills(path: Path, rounds: int) -> list[Figure]:
    """SIGKILL to a writing process, again and again over one directory: cells that `put` had kept and that are gone."""
    rng = random.Random(4)
    kept: list[Cells] = []
    lost, puts = 0, 0
    for i in range(rounds):
        kept += (new := killed_writer(path, i, after_s=rng.uniform(0.0, 0.15)))
        puts += len(new)
        tier = DiskTier(path, BUDGET_BYTES)
        lost = max(lost, sum(not _has(tier, cells) for cells in kept))
        tier.close()
    return [
        Figure("tiers.disk_lost_at_kill", lost, f"of {puts} puts, {rounds} kills", 0, "lower"),
    ]


def _has(tier: DiskTier, cells: Cells) -> bool:
    try:
        return [bytes(one) for one in tier.get(refs(cells))] == [data for _, data in cells]
    except Unusable:
        return False
