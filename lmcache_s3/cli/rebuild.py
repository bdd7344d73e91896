"""`lmcache-s3 rebuild`: make the index again from the extents, when it was lost. Stop the engines first."""

from __future__ import annotations

import secrets
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from ulid import ULID

from lmcache_s3.analysis.catalog import chosen_spaces
from lmcache_s3.cli.common import Cli, size_text, table
from lmcache_s3.errors import Invalid
from lmcache_s3.identity import Space
from lmcache_s3.index.rebuild import RebuildReport
from lmcache_s3.index.rebuild import rebuild as rebuild_space

_SHOWN = 10


def rebuild(
    cli: Cli,
    space: Annotated[str | None, typer.Option(help="Only this space (its id or the start of it).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be found; change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Make the index again from every whole extent in the bucket; engines must be stopped. Costs a GET an extent."""
    if cli.settings.read_only and not dry_run:
        raise Invalid("read_only is set: no index can be written; unset it, or add --dry-run", kind="setting")
    spaces = chosen_spaces(cli.store, space)
    if not dry_run and not yes:
        _ask(cli, spaces)
    reports = [(one, _rebuild(cli, one, dry_run)) for one in spaces]
    document = {
        "url": cli.store.url,
        "spaces": [{"space": one.id, "model": one.model, **asdict(report)} for one, report in reports],
    }
    shown: list[Any] = []
    for one, report in reports:
        shown += _shown(one, report)
    cli.emit(document, *shown)


def _ask(cli: Cli, spaces: list[Space]) -> None:
    if not sys.stdin.isatty():
        raise Invalid("rebuild replaces the index: stop all engines, then add --yes", kind="argument")
    names = ", ".join(f"{one.id[:16]} {one.model}" for one in spaces)
    typer.confirm(f"Replace the index of {names} at {cli.store.url}? Are all engines stopped?", abort=True)


def _rebuild(cli: Cli, space: Space, dry_run: bool) -> RebuildReport:
    threads = 4 * cli.settings.io_threads
    with (
        ThreadPoolExecutor(threads, "lmcache-s3-rebuild") as executor,
        Progress(
            TextColumn(f"{space.id[:16]} {space.model}"),
            BarColumn(),
            TextColumn("{task.fields[extents]} extents"),
            TimeRemainingColumn(),
            console=cli.progress_console,
            disable=cli.as_json or not cli.progress_console.is_terminal,
        ) as bar,
    ):
        task = bar.add_task("", total=256, extents=0)

        def seen(extents: int) -> None:
            bar.update(task, advance=1, extents=bar.tasks[task].fields["extents"] + extents)

        return rebuild_space(
            cli.store,
            space,
            writer=str(ULID()),
            nonce=secrets.token_hex(16),
            executor=executor,
            progress=seen,
            dry_run=dry_run,
        )


def _shown(space: Space, report: RebuildReport) -> list[Any]:
    would = "would be" if report.dry_run else "are"
    numbers = ("extents", "chunks", "stored", "covered", "given up", "left out", "version")
    made = table(*numbers, right=numbers)
    made.add_row(
        str(report.extents), str(report.chunks), size_text(report.encoded_bytes), str(report.covered), str(report.dead),
        str(len(report.rejected)), str(report.version),
    )  # fmt: skip
    lines: list[Any] = [f"[bold]space {space.id[:16]}[/bold] {space.model}: these {would} in the index", made]
    reasons = Counter(r.why for r in report.rejected)
    lines += [f"left out: {n} × {why}" for why, n in reasons.most_common(_SHOWN)]
    if report.rejected:
        lines.append("gc deletes what was left out")
    return lines
