"""The disk tier's part of `bench tiers`: reading, beside the same bytes read plainly; opening again; being killed."""

from __future__ import annotations

import gc
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lmcache_s3.benchmarks.figures import Figure
from lmcache_s3.benchmarks.in_turn import in_turn
from lmcache_s3.codecs.checksum import xxh3
from lmcache_s3.errors import Unusable
from lmcache_s3.testing.cells import Cells, make_cells, refs
from lmcache_s3.testing.killing import BUDGET_BYTES, killed_writer
from lmcache_s3.tiers.disk import DiskTier

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
    files = sorted((path / "segments").iterdir())
    sizes = [file.stat().st_size for file in files]
    piece = memoryview(mmap.mmap(-1, sum(cell.length for cell in wanted[0])))

    def ours() -> None:
        for cells in wanted:
            tier.get(cells)

    def plain(flags: int = 0) -> None:
        for file, size in zip(files, sizes, strict=True):
            fd, at = os.open(file, os.O_RDONLY | flags), 0
            while at < size:
                at += os.preadv(fd, [piece], at)
            os.close(fd)

    def forget() -> None:
        for file in files:
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    actions: dict[str, Callable[[], None]] = {
        "ours": ours,
        "plain": plain,
        "past the cache": lambda: plain(os.O_DIRECT),
    }
    cold, warm = in_turn(actions, _ROUNDS, forget), in_turn(actions, _ROUNDS)
    tier.close()
    n_bytes = sum(sizes)
    return [
        Figure("tiers.disk_get_vs_raw", cold["plain"] / cold["ours"], "nothing in the page cache", 0.8, "higher"),
        Figure("tiers.disk_get_vs_o_direct", cold["past the cache"] / cold["ours"], "", None, "higher"),
        Figure("tiers.disk_get_gb_per_s", n_bytes / cold["ours"] / 1e9, "GB/s", None, "higher"),
        Figure("tiers.disk_get_cached_vs_raw", warm["plain"] / warm["ours"], "all in it", None, "higher"),
        Figure("tiers.disk_get_cached_gb_per_s", n_bytes / warm["ours"] / 1e9, "GB/s", None, "higher"),
    ]


def bare_files(path: Path) -> list[Figure]:
    """A file a cell (written aside and renamed, read and verified), the plainest disk cache, beside the tier."""
    rng = random.Random(2)
    prompts = [make_cells(rng, [_FILE_BYTES] * 20) for _ in range(_FILES // 20)]
    folder = path / "cells"
    folder.mkdir(parents=True)
    tier = DiskTier(path / "tier", 1 << 30)
    taken: dict[str, list[float]] = {name: [] for name in ("tier put", "file put", "tier get", "file get")}

    def timed(name: str, action: Callable[[], object]) -> None:
        start = time.perf_counter()
        action()
        taken[name].append(time.perf_counter() - start)

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

    for prompt in prompts:
        timed("tier put", partial(tier.put, prompt))
        timed("file put", partial(write, prompt))
    for prompt in prompts:
        timed("tier get", partial(tier.get, refs(prompt)))
        timed("file get", partial(read, prompt))
    tier.close()
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    return [
        Figure(f"tiers.disk_{how}_vs_file_a_cell", medians[f"file {how}"] / medians[f"tier {how}"], "", None, "higher")
        for how in ("put", "get")
    ]


def reopening(path: Path, n_cells: int) -> list[Figure]:
    """Seconds from a new tier over a full directory to the first cells it serves; beside a scan of as many files."""
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
        tier = DiskTier(path, 8192 * n_cells + (1 << 20))
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
