"""`lmcache-s3 bench tiers`: what the host and disk tiers cost beside plain memory and plain files on this machine.

What is compared runs in this process, in turn, several times; figures are medians. About a minute.
"""

from __future__ import annotations

import mmap
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmcache_s3.benchmarks.figures import Figure, report
from lmcache_s3.benchmarks.in_turn import Race
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.benchmarks.tiers_disk import bare_files, kills, reads, reopening
from lmcache_s3.testing.cells import Cells, make_cells, refs
from lmcache_s3.tiers.host import HostTier

CELL_BYTES, CELLS, PROMPTS = 2 << 20, 8, 8
_ROUNDS = 15
_DRIFT_STEPS = 3_000


def main(json_path: Path | None = None, *, cells: int = 100_000, rounds: int = 20) -> bool:
    """Run it, print the table, write the JSON; whether every goal was met. cells: of the disk tier that is opened
    again; rounds: of killing a writer. Takes 1.5 GB of the temporary directory's disk."""
    steps = Steps()
    rng = random.Random(0)
    prompts = [make_cells(rng, [CELL_BYTES] * CELLS) for _ in range(PROMPTS)]
    with steps("host tier, beside memcpy"):
        figures = _host(prompts)
    with tempfile.TemporaryDirectory(prefix="lmcache-s3-bench-") as folder:
        with steps("disk tier, beside reading its files"):
            figures += reads(Path(folder) / "reads", prompts)
        with steps("disk tier, beside a file a cell"):
            figures += bare_files(Path(folder) / "files")
        with steps(f"opening a disk tier of {cells:,} cells"):
            figures += reopening(Path(folder) / "reopened", cells)
        with steps(f"killing a writer {rounds} times"):
            figures += kills(Path(folder) / "killed", rounds)
    return report(figures, json_path)


def _host(prompts: list[Cells]) -> list[Figure]:
    """All cells got and copied out, beside a copy of as many bytes from memory that lies as they do."""
    tier = HostTier(4 * CELL_BYTES * CELLS * PROMPTS)
    for prompt in prompts:
        tier.put(prompt)
    source = [_as_slabs_lie([data for _, data in prompt]) for prompt in prompts]
    target = np.zeros((CELLS, CELL_BYTES), np.uint8)
    wanted = [refs(prompt) for prompt in prompts]

    def ours(i: int) -> None:
        for k, data in enumerate(tier.get(wanted[i])):
            np.copyto(target[k], np.frombuffer(data, np.uint8))

    def memcpy(i: int) -> None:
        for k, array in enumerate(source[i]):
            np.copyto(target[k], array)

    race = Race({"ours": ours, "memcpy": memcpy}, PROMPTS, _ROUNDS)
    tier.close()
    n_bytes = CELL_BYTES * CELLS * PROMPTS
    return [
        Figure("tiers.host_get_vs_memcpy", race.speed("ours", "memcpy"), "", 0.8, "higher"),
        Figure("tiers.host_get_gb_per_s", n_bytes / race.median_s("ours") / 1e9, "GB/s", None, "higher"),
        *_drift(),
    ]


def _as_slabs_lie(cells: Sequence[bytes]) -> list[np.ndarray]:
    """Copies of them in one mapping, of huge pages where the system has them: memory as good as the tier's."""
    mapping = mmap.mmap(-1, CELL_BYTES * CELLS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    mapping.write(b"".join(cells))
    return list(np.frombuffer(mapping, np.uint8).reshape(CELLS, CELL_BYTES))


def _drift() -> list[Figure]:
    """Cells whose sizes drift, as when codecs change: how much of the budget holds cells' bytes, at worst."""
    budget, rng = 64 << 20, random.Random(1)
    tier, least, most = HostTier(budget), 1.0, 0
    for step in range(_DRIFT_STEPS):
        largest = (60_000, 200_000, 700_000)[step * 10 // _DRIFT_STEPS % 3]
        tier.put(make_cells(rng, [rng.randrange(largest // 2, largest) for _ in range(4)]))
        most = max(most, tier.mapped_bytes)
        if step > _DRIFT_STEPS // 5 and step % 10 == 0:
            least = min(least, tier.stats().used_bytes / budget)
    tier.close()
    return [
        Figure("tiers.host_used_share_under_drift", least, "of the budget", None, "higher"),
        Figure("tiers.host_mapped_over_budget", max(0, most - budget), "bytes", 0, "lower"),
    ]
