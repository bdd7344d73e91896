"""The rate–distortion figure of the documentation, from what `bench quality` wrote.

    python -m lmcache_s3.benchmarks.rate_distortion FIGURES.json … docs/rate-distortion.svg

Several files are of the same model and texts, with other codecs.
Needs `pip install 'lmcache-s3[analysis]'`. Raises `Invalid` for a missing package or a file that is not of that bench.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmcache_s3.errors import Invalid, LMCacheS3Error
from lmcache_s3.quality.measure import Score, summary


def draw(rows: Sequence[dict[str, Any]], model: str, path: Path) -> None:
    """KL against bits per value on prose: a line for each codec's levels, a point for each that has one."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        mpl.rcParams["svg.hashsalt"] = "lmcache-s3"  # the same figures give the same file
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise Invalid("drawing needs matplotlib: pip install 'lmcache-s3[analysis]'", kind="setting") from error
    scores = [Score(**row) for row in rows]
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for coder in dict.fromkeys(s.coder for s in scores):
        mean = summary(scores, coder, "prose")
        if mean is not None and mean["kl"].value > 0:
            point = (mean["bits"].value, mean["kl"].value, mean["kl"].error)
            lines.setdefault(_family(coder), []).append(point)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in lines.items():
        bits, kl, spread = zip(*sorted(points), strict=True)
        axes.errorbar(bits, kl, yerr=spread, marker="o", markersize=5, linewidth=1.2, capsize=2, label=name)
    axes.set(xscale="log", yscale="log", xlabel="bits per value, everything counted (bf16: 16)")
    axes.set_ylabel("KL of the next token, nats")
    ticks = [0.5, 1, 2, 4, 8, 16]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_title(f"{model}, {len({s.document for s in scores if s.kind == 'prose'})} documents of prose", fontsize=10)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _family(coder: str) -> str:
    """`cachegen-fine` and `cachegen-coarse` are points of one line."""
    return coder.rpartition("-")[0] if coder.startswith(("cachegen-", "transform-")) else coder


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    *sources, target = map(Path, arguments)
    source = sources[0]
    try:
        rows: list[dict[str, Any]] = []
        for source in sources:
            document = json.loads(source.read_text("utf-8"))
            rows += document["rows"]
        draw(rows, document["model"], target)
    except LMCacheS3Error as error:
        print(f"lmcache-s3: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"lmcache-s3: {source} is not what bench quality --json writes ({error})", file=sys.stderr)
        return 2
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
