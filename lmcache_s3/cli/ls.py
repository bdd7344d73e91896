"""`lmcache-s3 ls`: what is cached, one line a space or an extent."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer

from lmcache_s3.analysis.catalog import FoundSpace, find_space, list_spaces, reading
from lmcache_s3.cli.common import Cli, size_text, table
from lmcache_s3.cli.units import moment_s, time_text
from lmcache_s3.errors import Invalid
from lmcache_s3.index import history
from lmcache_s3.index.manifest import LiveExtent
from lmcache_s3.types import extent_prefix

_BELOW = re.compile(r"(.+?)/(?:spaces|calibrations)/")


def ls(
    cli: Cli,
    extents: Annotated[bool, typer.Option("--extents", help="List every extent.")] = False,
    space: Annotated[str | None, typer.Option(help="Only this space (its id or the start of it).")] = None,
    as_of: Annotated[
        str | None, typer.Option(help="As it was: a version, 2026-11-24T10:00, or 2h for two hours ago.")
    ] = None,
) -> None:
    """List the spaces (one per model and way of storing its KV), or with --extents every array in them."""
    spaces: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    wanted = None if space is None else find_space(cli.store, space)
    for entry in list_spaces(cli.store):
        if wanted is not None and entry.space != wanted:
            continue
        summary, live = _summary(cli, entry, as_of)
        spaces.append(summary)
        if extents and entry.space is not None:
            lines += [extent_row(cli, entry, one) for one in live]
    document: dict[str, Any] = {"url": cli.store.url, "spaces": spaces}
    if extents:
        document["extents"] = lines
        cli.emit(document, _extent_table(lines))
    elif spaces:
        cli.emit(document, _space_table(spaces))
    else:
        cli.emit(document, f"{cli.store.url}: nothing cached yet{_below(cli)}")


def _below(cli: Cli) -> str:
    """Whether somebody forgot the prefix: then a cache lies below."""
    first = next((info.key for info in cli.store.list("", limit=1)), "")
    match = _BELOW.match(first)
    return "" if match is None else f"; there is a cache below, {cli.store.url.rstrip('/')}/{match[1]}"


def _summary(cli: Cli, entry: FoundSpace, as_of: str | None) -> tuple[dict[str, Any], list[LiveExtent]]:
    if entry.space is None:
        return {"space": entry.id, "problem": entry.problem}, []
    space = entry.space
    if as_of is None:
        with reading(cli.store, space) as index:
            live = list(index.extents())
            version = index.version
    else:
        with ThreadPoolExecutor(cli.settings.io_threads, "lmcache-s3-read") as readers:
            state = history.as_of(cli.store, space.id, _version(cli, space.id, as_of), readers=readers)
        live, version = list(state.in_order()), state.version
    return {
        "space": space.id,
        "model": space.model,
        "kv_dtype": space.kv_dtype,
        "fidelity": space.fidelity,
        "chunk_tokens": space.chunk_tokens,
        "extents": len(live),
        "chunks": sum(one.record.n_chunks for one in live),
        "raw_bytes": sum(one.record.raw_bytes for one in live),
        "encoded_bytes": sum(one.record.encoded_bytes for one in live),
        "version": version,
    }, live


def _version(cli: Cli, space_id: str, as_of: str) -> int:
    """The version that is meant."""
    if as_of.isdecimal():
        return int(as_of)
    at_s = moment_s(as_of, time.time)
    versions = history.list_versions(cli.store, space_id)
    version = versions.newest_at(at_s)
    if version == 0 and len(versions.numbers) and versions.numbers[0] > 1:
        raise Invalid(
            f"space {space_id[:16]}: nothing that old is kept; the oldest version is {versions.numbers[0]}, of "
            f"{time_text(float(versions.times_s[0]))}",
            kind="argument",
        )
    return version


def extent_row(cli: Cli, entry: FoundSpace, live: LiveExtent) -> dict[str, Any]:
    """An extent as JSON."""
    record = live.record
    return {
        "space": entry.id,
        "extent": str(record.name),
        "url": f"{cli.store.url.rstrip('/')}/{extent_prefix(entry.id, record.name)}",
        "chunks": record.n_chunks,
        "first_token": record.first_token,
        "codec": record.name.codec,
        "raw_bytes": record.raw_bytes,
        "encoded_bytes": record.encoded_bytes,
        "created": live.created,
    }


def _space_table(rows: list[dict[str, Any]]) -> Any:
    numbers = ("chunk", "chunks", "extents", "stored", "versions")
    made = table("space", "model", "kv", "fidelity", *numbers, right=numbers)
    for r in rows:
        if "problem" in r:
            made.add_row(r["space"][:16], f"[red]{r['problem']}[/red]")
            continue
        made.add_row(
            r["space"][:16], r["model"] or "–", r["kv_dtype"], r["fidelity"], str(r["chunk_tokens"]), str(r["chunks"]),
            str(r["extents"]), size_text(r["encoded_bytes"]), str(r["version"]),
        )  # fmt: skip
    return made


def _extent_table(rows: list[dict[str, Any]]) -> Any:
    numbers = ("first token", "chunks", "raw", "stored", "version")
    made = table("space", "extent", "codec", *numbers, right=numbers)
    for r in rows:
        made.add_row(
            r["space"][:16], r["extent"], r["codec"], str(r["first_token"]), str(r["chunks"]),
            size_text(r["raw_bytes"]), size_text(r["encoded_bytes"]), str(r["created"]),
        )  # fmt: skip
    return made
