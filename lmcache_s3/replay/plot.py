"""The chart of a replay: one bar a policy, divided by the tier the tokens came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmcache_s3.errors import Invalid
from lmcache_s3.replay.run import Outcome


def draw(path: Path, outcomes: Sequence[Outcome], tiers: Sequence[str], title: str) -> None:
    """Raises `Invalid` without matplotlib, and for a path that cannot be written."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        mpl.rcParams["svg.hashsalt"] = "lmcache-s3"  # the same picture gives the same file
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise Invalid("drawing needs matplotlib: pip install 'lmcache-s3[analysis]'", kind="setting") from e
    figure, axes = plt.subplots(figsize=(7.0, 0.9 + 0.45 * len(outcomes)), layout="constrained")
    names = [one.policy for one in outcomes]
    left = [0.0] * len(outcomes)
    for tier in tiers:
        shares = [100 * one.hit_tokens[tier] / max(1, one.input_tokens) for one in outcomes]
        axes.barh(names, shares, left=left, label=tier)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for i, total in enumerate(left):
        axes.annotate(f"{total:.1f} %", (total, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="prompt tokens from the cache, %", title=title, xlim=(0, 1.12 * max(left, default=1.0) or 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as e:
        raise Invalid(f"{path}: cannot be drawn ({e})", kind="argument") from e
    finally:
        plt.close(figure)
