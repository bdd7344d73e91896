"""`lmcache-s3 verify`: read everything that is cached and compare it with the index. Costs a GET per 32 MiB."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lmcache_s3.analysis.catalog import find_space, list_spaces, reading
from lmcache_s3.analysis.check import Damage, check_extent
from lmcache_s3.cli.common import Cli
from lmcache_s3.errors import Unavailable
from lmcache_s3.identity import Space
from lmcache_s3.index.service import Index
from lmcache_s3.types import ExtentName, ExtentRecord

_REMOVE_WITHIN_S = 60.0


def verify(
    cli: Cli,
    name: Annotated[str | None, typer.Argument(help="Only this space (its id or the start of it).")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what is damaged from the index.")] = False,
) -> None:
    """Read every cached byte and check it; one line per damaged extent, exit 1 if there is any."""
    work: list[tuple[Space, list[ExtentRecord]]] = []
    unreadable: list[dict[str, Any]] = []
    for entry in list_spaces(cli.store):
        if entry.space is None:
            unreadable.append({"space": entry.id, "problem": entry.problem})
        elif name is None or entry.space == find_space(cli.store, name):
            with reading(cli.store, entry.space) as index:
                work.append((entry.space, [live.record for live in index.extents()]))
    damaged = {space.id: _check(cli, space, records) for space, records in work} if work else {}
    removed = []
    if repair:
        for space, _ in work:
            removed += _remove(cli, space, sorted({d.extent for d in damaged[space.id] if d.is_certain}, key=str))
    _report(cli, work, damaged, unreadable, removed)
    if unreadable or any(damaged.values()):
        raise typer.Exit(1)


def _check(cli: Cli, space: Space, records: list[ExtentRecord]) -> list[Damage]:
    damage: list[Damage] = []
    with Progress(
        TextColumn(f"{space.id[:16]} {space.model}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=cli.progress_console,
        disable=cli.as_json or not cli.progress_console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=sum(r.encoded_bytes for r in records))
        for record in records:
            try:
                damage += check_extent(cli.store, space, record, progress=lambda n: bar.advance(task, n))
            except Unavailable as e:
                # Not damage: nothing was read. Whoever runs this wants to know where it ended.
                raise Unavailable(f"extent {record.name}: {e}", kind=e.kind, key=str(record.name)) from e
    return damage


def _remove(cli: Cli, space: Space, names: list[ExtentName]) -> list[str]:
    if not names:
        return []
    index = Index.open(cli.store, space, settings=cli.settings.index_settings())
    try:
        index.remove(names, why="verify").result(_REMOVE_WITHIN_S)
    finally:
        index.close()
    return [str(n) for n in names]


def _report(
    cli: Cli,
    work: list[tuple[Space, list[ExtentRecord]]],
    damaged: dict[str, list[Damage]],
    unreadable: list[dict[str, Any]],
    removed: list[str],
) -> None:
    found = [d for per_space in damaged.values() for d in per_space]
    extents = sum(len(records) for _, records in work)
    document = {
        "url": cli.store.url,
        "extents": extents,
        "encoded_bytes": sum(r.encoded_bytes for _, records in work for r in records),
        "damaged": [{"extent": str(d.extent), "key": d.key, "kind": d.kind, "what": d.what} for d in found],
        "unreadable_spaces": unreadable,
        "removed": removed,
    }
    lines = [f"[red]{'damaged' if d.is_certain else 'unknown'}[/red] {d.extent}: {d.kind}: {d.what}" for d in found]
    lines += [f"[red]unreadable[/red] space {u['space']}: {u['problem']}" for u in unreadable]
    lines += [f"removed from the index: {name}" for name in removed]
    if not removed and any(d.is_certain for d in found):
        lines.append("run it again with --repair to remove them from the index")
    if not work and not unreadable:
        lines.append(f"{cli.store.url}: nothing cached yet")
    elif not found and not unreadable:
        lines.append(f"[green]ok[/green] {extents} extent{'s' * (extents != 1)}, every byte as the index says")
    cli.emit(document, *lines)
