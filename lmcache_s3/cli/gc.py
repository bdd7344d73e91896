"""`lmcache-s3 gc`: take what should go out of the index, and delete what can never be used again. Run it hourly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any

import typer

from lmcache_s3.analysis.catalog import chosen_spaces, tending
from lmcache_s3.cli.common import Cli, size_text, table
from lmcache_s3.cli.units import size_bytes, span_s, time_text
from lmcache_s3.errors import Invalid
from lmcache_s3.identity import Space
from lmcache_s3.index.gc import Collector, GcReport, GcSettings
from lmcache_s3.index.policy import Why
from lmcache_s3.index.probe import probe

_REASONS = {
    Why.DAMAGED: "damaged",
    Why.COVERED: "stored twice",
    Why.UNREACHABLE: "what comes before is gone",
    Why.UNUSED: "not used for too long",
    Why.TENANT_BUDGET: "over the tenant's budget",
    Why.BUDGET: "over the budget",
}


def gc(
    cli: Cli,
    space: Annotated[str | None, typer.Option(help="Only this space (its id or the start of it).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; change nothing.")] = False,
    max_bytes: Annotated[
        str | None, typer.Option(help="Most bytes of a space's KV, say 1TiB; default: bucket_bytes.")
    ] = None,
    tenant_bytes: Annotated[
        list[str] | None,
        typer.Option(help="Most bytes of one cache_salt: SALT=SIZE. May be repeated; default: tenant_bytes."),
    ] = None,
    default_tenant_bytes: Annotated[str | None, typer.Option(help="Most bytes of every other cache_salt.")] = None,
    ttl: Annotated[
        str | None, typer.Option(help="What was not used for so long goes, say 30d; default: ttl_s.")
    ] = None,
    grace: Annotated[
        str | None, typer.Option(help="How long an upload may take; slower ones are lost. Default: gc_grace_s, 1h.")
    ] = None,
    history: Annotated[
        str | None, typer.Option(help="How far back `log` and `ls --as-of` reach. Default: history_s, 7d.")
    ] = None,
) -> None:
    """Remove what exceeds the budgets or is too old, and delete orphans and what was removed the last time."""
    given: dict[str, Any] = {
        "grace_s": None if grace is None else span_s(grace),
        "history_s": None if history is None else span_s(history),
        "max_bytes": None if max_bytes is None else size_bytes(max_bytes),
        "ttl_s": None if ttl is None else span_s(ttl),
        "tenant_bytes": dict(_tenant(text) for text in tenant_bytes) if tenant_bytes else None,
        "default_tenant_bytes": None if default_tenant_bytes is None else size_bytes(default_tenant_bytes),
    }
    settings = replace(cli.settings.gc_settings(), **{k: v for k, v in given.items() if v is not None})
    if cli.settings.read_only and not dry_run:
        raise Invalid("read_only is set: nothing can be collected; unset it, or add --dry-run", kind="setting")
    spaces = chosen_spaces(cli.store, space)
    if not cli.settings.single_writer and not dry_run:
        probe(cli.store, "")
    with ThreadPoolExecutor(2 * cli.settings.io_threads, "lmcache-s3-gc") as executor:
        reports = [(one, _collect(cli, one, settings, executor, dry_run)) for one in spaces]
    shown: list[Any] = []
    for one, report in reports:
        shown += _shown(one, report)
    cli.emit(
        {"url": cli.store.url, "dry_run": dry_run, "spaces": [_document(one, report) for one, report in reports]},
        *shown,
    )


def _tenant(text: str) -> tuple[str, int]:
    salt, equals, size = text.rpartition("=")
    if not equals:
        raise Invalid(f"--tenant-bytes {text[:80]!r}: write SALT=SIZE, for example team-a=100GiB", kind="argument")
    return salt, size_bytes(size)


def _collect(cli: Cli, space: Space, settings: GcSettings, executor: ThreadPoolExecutor, dry_run: bool) -> GcReport:
    log = tending(cli.store, space, executor)
    return Collector(log, settings, executor=executor).run(dry_run=dry_run)


def _document(space: Space, report: GcReport) -> dict[str, Any]:
    return {
        "space": space.id,
        "version": report.version,
        "floor": report.floor,
        "now": time_text(report.now_s),
        "removed": [
            {"extent": str(r.name), "why": r.why.name.lower(), "encoded_bytes": r.encoded_bytes} for r in report.removed
        ],
        "removed_bytes": report.removed_bytes,
        "deleted": {kind: {"objects": n, "bytes": report.bytes[kind]} for kind, n in sorted(report.objects.items())},
        "deleted_bytes": report.deleted_bytes,
        "plan": [{"kind": d.kind, "key": d.key, "bytes": d.size_bytes} for d in report.deletions],
        "foreign": report.foreign,
        "problem": report.problem,
    }


def _shown(space: Space, report: GcReport) -> Sequence[Any]:
    would = "would be " if report.dry_run else ""
    made = table("", "why", "number", "bytes", right=("number", "bytes"))
    numbers = Counter(r.why for r in report.removed)
    for why, n in sorted(numbers.items()):
        freed = sum(r.encoded_bytes for r in report.removed if r.why is why)
        made.add_row(f"extents {would}removed from the index", _REASONS[why], str(n), size_text(freed))
    for kind, n in sorted(report.objects.items()):
        why_text = {"extent": "in no index, and cannot come into it", "version": "before the kept history"}
        made.add_row(
            f"{kind} objects {would}deleted", why_text.get(kind, "superseded"), str(n), size_text(report.bytes[kind])
        )
    lines: list[Any] = [f"[bold]space {space.id[:16]}[/bold] {space.model}: version {report.version}"]
    lines.append(made if made.row_count else "nothing to do")
    if report.removed and not report.dry_run:
        lines.append("the objects of what was removed are deleted by the next gc that comes after the grace")
    if report.foreign:
        lines.append(f"{report.foreign} objects are not ours and were left alone")
    if report.problem:
        lines.append(f"[red]checkpoints and versions were left alone:[/red] {report.problem}")
    return lines
