"""`lmcache-s3 log`: who committed what, when. Reads the kept versions: one GET each, one LIST a thousand."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer

from lmcache_s3.analysis.catalog import chosen_spaces, reading
from lmcache_s3.cli.common import Cli, size_text, table
from lmcache_s3.cli.units import moment_s, time_text
from lmcache_s3.errors import Unusable
from lmcache_s3.identity import Space
from lmcache_s3.index.history import Entry, Versions, entries, list_versions

_LAST = 20


def log(
    cli: Cli,
    space: Annotated[str | None, typer.Option(help="Only this space (its id or the start of it).")] = None,
    last: Annotated[int | None, typer.Option(help=f"So many versions; default {_LAST}.", min=1)] = None,
    since: Annotated[str | None, typer.Option(help="From then on: 2026-11-24T10:00, or 2h for two hours ago.")] = None,
) -> None:
    """Show the newest versions of the index: what each added, removed and raised, and which process made it."""
    since_s = None if since is None else moment_s(since, time.time)
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(cli.settings.io_threads, "lmcache-s3-read") as readers:
        for one in chosen_spaces(cli.store, space):
            if last is None and since_s is None:
                last = _LAST
            versions = _since(_newest(cli, one, last), since_s)
            rows = [entry_row(entry) for entry in entries(cli.store, one.id, versions, readers=readers)]
            found.append({"space": one.id, "model": one.model, "versions": rows})
    shown: list[Any] = []
    for part in found:
        shown += [f"[bold]space {part['space'][:16]}[/bold] {part['model']}", _table(part["versions"])]
    cli.emit({"url": cli.store.url, "spaces": found}, *shown)


def _newest(cli: Cli, space: Space, last: int | None) -> Versions:
    """The newest `last` versions. Where the index can be opened, only these are listed."""
    if last is None:
        return list_versions(cli.store, space.id)
    try:
        with reading(cli.store, space) as index:
            after = max(0, index.version - last)
    except Unusable:  # a version that cannot be read: it shall be shown
        after = 0
    versions = list_versions(cli.store, space.id, after=after)
    return Versions(versions.numbers[-last:], versions.times_s[-last:], versions.sizes[-last:], versions.foreign)


def _since(versions: Versions, since_s: float | None) -> Versions:
    if since_s is None:
        return versions
    kept = versions.times_s >= since_s
    return Versions(versions.numbers[kept], versions.times_s[kept], versions.sizes[kept], versions.foreign)


def entry_row(entry: Entry) -> dict[str, Any]:
    """A version as JSON."""
    row: dict[str, Any] = {"version": entry.version, "time": time_text(entry.time_s), "bytes": entry.size_bytes}
    delta = entry.delta
    if delta is None:
        return row | {"problem": entry.problem}
    return row | {
        "writer": delta.writer,
        "added_extents": len(delta.add),
        "added_chunks": sum(record.n_chunks for record in delta.add),
        "added_bytes": sum(record.encoded_bytes for record in delta.add),
        "removed_extents": len(delta.remove),
        "accessed_extents": len(delta.access),
        "floor": delta.floor or None,
        "lead": delta.lead,
    }


def _table(rows: list[dict[str, Any]]) -> Any:
    numbers = ("version", "added", "chunks", "bytes", "removed", "hit", "floor")
    made = table(
        "version", "time", "writer", "added", "chunks", "bytes", "removed", "hit", "floor", "lead", right=numbers
    )
    for r in rows:
        if "problem" in r:
            made.add_row(str(r["version"]), r["time"], f"[red]{r['problem']}[/red]")
            continue
        lead = {None: "", "": "steps down"}.get(r["lead"], r["lead"])
        made.add_row(
            str(r["version"]), r["time"], r["writer"], str(r["added_extents"]), str(r["added_chunks"]),
            size_text(r["added_bytes"]), str(r["removed_extents"]), str(r["accessed_extents"]),
            str(r["floor"] or ""), lead,
        )  # fmt: skip
    return made if rows else "no versions"
