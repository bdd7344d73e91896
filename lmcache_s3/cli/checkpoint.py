"""`lmcache-s3 checkpoint`: write the index as of now in one piece, so that whoever opens it reads few versions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer

from lmcache_s3.analysis.catalog import chosen_spaces, tending
from lmcache_s3.cli.common import Cli, table
from lmcache_s3.errors import Invalid


def checkpoint(
    cli: Cli, space: Annotated[str | None, typer.Option(help="Only this space (its id or the start of it).")] = None
) -> None:
    """Write a checkpoint now; engines write one each 256 versions by themselves."""
    if cli.settings.read_only:
        raise Invalid("read_only is set: no checkpoint can be written; unset it", kind="setting", key="read_only")
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(cli.settings.io_threads, "lmcache-s3-read") as executor:
        for one in chosen_spaces(cli.store, space):
            log = tending(cli.store, one, executor)
            version = log.checkpoint() if log.state.version else None
            rows.append({"space": one.id, "model": one.model, "version": version, "extents": len(log.state.extents)})
    made = table("space", "model", "version", "extents", right=("version", "extents"))
    for r in rows:
        version_text = "empty" if r["version"] is None else str(r["version"])
        made.add_row(r["space"][:16], r["model"] or "–", version_text, str(r["extents"]))
    cli.emit({"url": cli.store.url, "checkpoints": rows}, made)
