"""`lmcache-s3 info`: everything known about the root, one space, or one extent."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lmcache_s3.analysis.catalog import find_space, list_spaces, reading
from lmcache_s3.cli.common import Cli, size_text, table
from lmcache_s3.cli.ls import ls
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.identity import Space
from lmcache_s3.index.manifest import LiveExtent
from lmcache_s3.types import ExtentName, extent_prefix, shard_key


def info(
    cli: Cli, name: Annotated[str | None, typer.Argument(help="A space's id or its start, or an extent's name.")] = None
) -> None:
    """Show everything about a space or an extent; without a name, list the spaces."""
    if name is None:
        ls(cli)
        return
    try:
        extent = ExtentName.parse(name)
    except Unusable:
        _space(cli, find_space(cli.store, name))
    else:
        _extent(cli, extent)


def _space(cli: Cli, space: Space) -> None:
    with reading(cli.store, space) as index:
        live = list(index.extents())
        version, floor = index.version, index.floor
    group_texts = [
        f"{g.layers} {g.kind} layers × {g.heads} heads × {g.head_dim}" + (f", window {g.window}" if g.window else "")
        for g in space.groups
    ]
    encoded = sum(one.record.encoded_bytes for one in live)
    facts: dict[str, Any] = {
        "space": space.id,
        "model": space.model,
        **space.identity(),
        "extents": len(live),
        "chunks": sum(one.record.n_chunks for one in live),
        "encoded_bytes": encoded,
        "version": version,
        "floor": floor,
    }
    shown = facts | {"groups": "; ".join(group_texts), "encoded_bytes": size_text(encoded)}
    cli.emit(facts, _fact_table(shown))


def _extent(cli: Cli, name: ExtentName) -> None:
    for entry in list_spaces(cli.store):
        if entry.space is None:
            continue
        with reading(cli.store, entry.space) as index:
            live = next((one for one in index.extents() if one.record.name == name), None)
        if live is not None:
            _show_extent(cli, entry.space, live)
            return
    raise Invalid(f"no live extent {name} in {cli.store.url}; see lmcache-s3 ls --extents", kind="argument")


def _show_extent(cli: Cli, space: Space, live: LiveExtent) -> None:
    record = live.record
    tokens = record.n_chunks * space.chunk_tokens
    url = f"{cli.store.url.rstrip('/')}/{extent_prefix(space.id, record.name)}"
    facts: dict[str, Any] = {
        "extent": str(record.name),
        "space": space.id,
        "model": space.model,
        "url": url,
        "codec": record.name.codec,
        "tokens": [record.first_token, record.first_token + tokens],
        "chunks": record.n_chunks,
        "stages": record.grid.stages,
        "head_groups": record.grid.head_groups,
        "raw_bytes": record.raw_bytes,
        "encoded_bytes": record.encoded_bytes,
        "parent": record.parent.hex(),
        "hashes": [h.hex() for h in record.chunk_hashes()],
        "shards": [shard_key(space.id, record.name, record.grid, s) for s in range(record.grid.shards)],
        "created": live.created,
        "last_access": live.last_access,
        "born": record.name.born,
    }
    ratio = record.raw_bytes / record.encoded_bytes
    shown = facts | {
        "tokens": f"{record.first_token} to {record.first_token + tokens}",
        "raw_bytes": size_text(record.raw_bytes),
        "encoded_bytes": f"{size_text(record.encoded_bytes)} (raw ÷ stored: {ratio:.2f})",
        "hashes": "\n".join(facts["hashes"]),
        "shards": "\n".join(facts["shards"]),
        "read it with": f'lmcache_s3.open_extent("{url}"{_options_text(cli, url)})',
    }
    cli.emit(facts, _fact_table(shown))


def _options_text(cli: Cli, url: str) -> str:
    """What the command line said of the store, as an argument; what environment and file say is found again."""
    options = cli.settings.store_options().for_fsspec(url) if cli.given else {}
    return f", storage_options={options}" if options else ""


def _fact_table(facts: dict[str, Any]) -> Any:
    made = table("", "")
    made.show_header = False
    for key, value in facts.items():
        made.add_row(f"[bold]{key.replace('_', ' ')}[/bold]", str(value))
    return made
