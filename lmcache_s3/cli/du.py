"""`lmcache-s3 du`: what the bucket really holds, by space and codec, and what it costs. Lists every object: one LIST
a thousand."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from lmcache_s3.analysis.catalog import FoundSpace, list_spaces, reading
from lmcache_s3.cli.common import Cli, monthly_dollars, size_text, table
from lmcache_s3.types import space_prefix

_BESIDE = ("calibrations", "quality")
"""What lies beside the spaces, for all of them; see FORMAT.md."""


def du(cli: Cli) -> None:
    """Show how many bytes lie in the bucket, encoded and raw, and what they cost a month ($0.023/GB)."""
    rows = [row for entry in list_spaces(cli.store) for row in _space_rows(cli, entry)]
    rows += [row for what in _BESIDE for row in _rows_beside(cli, what)]
    totals = {k: sum(r[k] for r in rows) for k in ("objects", "stored_bytes", "raw_bytes")}
    totals["dollars_per_month"] = monthly_dollars(totals["stored_bytes"])
    numbers = ("objects", "stored", "raw", "ratio", "$ a month")
    made = table("space", "model", "what", *numbers, right=numbers)
    for r in rows:
        made.add_row(r["space"][:16] or "–", r["model"] or "–", r["what"], *_numbers(r))
    made.add_row("[bold]total[/bold]", "", "", *_numbers(totals))
    cli.emit({"url": cli.store.url, "rows": rows, "total": totals}, made)


def _numbers(row: dict[str, Any]) -> tuple[str, ...]:
    stored, raw = row["stored_bytes"], row["raw_bytes"]
    ratio = f"{raw / stored:.2f}" if raw and stored else "–"
    return (
        str(row["objects"]),
        size_text(stored),
        size_text(raw) if raw else "–",
        ratio,
        f"{monthly_dollars(stored):.4f}",
    )


def _space_rows(cli: Cli, entry: FoundSpace) -> list[dict[str, Any]]:
    """A row per codec of live extents, one for what is in no index (uploads under way, and garbage), one for the
    index."""
    raw_bytes: dict[str, int] = defaultdict(int)
    names: dict[str, str] = {}
    if entry.space is not None:
        with reading(cli.store, entry.space) as index:
            for live in index.extents():
                names[str(live.record.name)] = live.record.name.codec
                raw_bytes[live.record.name.codec] += live.record.raw_bytes
    stored: dict[str, int] = defaultdict(int)
    objects: dict[str, int] = defaultdict(int)
    extents = space_prefix(entry.id) + "extents/"
    for found in cli.store.list(space_prefix(entry.id)):
        what = "index"
        if found.key.startswith(extents):
            name = found.key.removeprefix(extents).split("/")[1:2]
            what = names.get(name[0], "not in the index") if name else "not in the index"
        stored[what] += found.size_bytes
        objects[what] += 1
    order = sorted(stored, key=lambda what: (what in ("index", "not in the index"), what))
    model = entry.space.model if entry.space else entry.problem
    return [_row(entry.id, model, what, objects[what], stored[what], raw_bytes.get(what, 0)) for what in order]


def _rows_beside(cli: Cli, what: str) -> list[dict[str, Any]]:
    sizes = [found.size_bytes for found in cli.store.list(f"{what}/")]
    return [_row("", "", what, len(sizes), sum(sizes), 0)] if sizes else []


def _row(space: str, model: str | None, what: str, objects: int, stored: int, raw: int) -> dict[str, Any]:
    return {
        "space": space,
        "model": model,
        "what": what,
        "objects": objects,
        "stored_bytes": stored,
        "raw_bytes": raw,
        "dollars_per_month": monthly_dollars(stored),
    }
