"""A process that fills a disk tier until it is killed, and what it had been told was kept.

Run as a module it is the writer: `python -m lmcache_s3.testing.killing <path> <seed>` writes a line for each `put` that
has returned. Cells are made from the seed, so that both sides know them.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lmcache_s3.testing.cells import Cells, make_cells
from lmcache_s3.tiers.disk import DiskTier

BUDGET_BYTES = 1 << 30


def prompts(seed: int) -> Iterator[Cells]:
    """Cells to put, one call after another."""
    rng = random.Random(seed)
    while True:
        yield make_cells(rng, [rng.randrange(1, 60_000) for _ in range(rng.randrange(1, 6))])


def killed_writer(path: Path, seed: int, after_s: float) -> list[Cells]:
    """Let a writer write, kill it (SIGKILL) `after_s` after its first put; the cells of all puts that had returned."""
    command = [sys.executable, "-m", "lmcache_s3.testing.killing", str(path), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        first = writer.stdout.readline()
        time.sleep(after_s)
        writer.kill()
        returned = (first + writer.stdout.read()).count(b"\n")
    return [cells for _, cells in zip(range(returned), prompts(seed), strict=False)]


def main(path: str, seed: str) -> None:
    tier = DiskTier(path, BUDGET_BYTES)
    for cells in prompts(int(seed)):
        assert tier.put(cells) == len(cells)
        sys.stdout.write("kept\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
