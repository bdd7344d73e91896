"""What all commands share: the store's options, output for people or programs, and errors as one line.

Exit codes: 0 done, 1 something is not as it should be (verify, doctor), 2 an error of ours, 130 Ctrl-C.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from lmcache_s3.config import Settings, load_settings
from lmcache_s3.errors import LMCacheS3Error
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store

_PIPE_WIDTH = 200
"""Columns of output that goes to no terminal: wide enough that names are not cut."""
DOLLARS_PER_GB_MONTH = 0.023
"""S3 Standard."""


@dataclass
class Cli:
    """One command's surroundings: settings, the store (opened on first use), and where output goes."""

    settings: Settings
    given: dict[str, Any]
    """Store settings given on the command line: what a line to copy must repeat."""
    as_json: bool

    @cached_property
    def store(self) -> CountingStore:
        return CountingStore(open_store(self.settings.url, options=self.settings.store_options()))

    @cached_property
    def console(self) -> Console:
        return console(sys.stdout)

    @cached_property
    def progress_console(self) -> Console:
        """For progress bars; on stderr, so that stdout stays what was asked for."""
        return console(sys.stderr)

    def emit(self, data: dict[str, Any], *renderables: RenderableType) -> None:
        """Print `data` with --json, else the renderables."""
        if self.as_json:
            print(json.dumps(data, indent=2, default=str))
            return
        for renderable in renderables:
            self.console.print(renderable)

    def close(self) -> None:
        if "store" in self.__dict__:
            self.store.close()


def console(file: Any) -> Console:
    return Console(file=file, width=None if file.isatty() else _PIPE_WIDTH, highlight=False, emoji=False)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    made = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def size_text(n_bytes: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} PiB"


def monthly_dollars(n_bytes: float) -> float:
    return n_bytes / 1e9 * DOLLARS_PER_GB_MONTH


def looks_like_url(text: str) -> bool:
    return "://" in text or text.startswith(("/", "."))


def _common(
    url: Annotated[str | None, typer.Argument(help="Root of the cache; default: LMCACHE_S3_URL.")] = None,
    endpoint_url: Annotated[str | None, typer.Option(help="S3-compatible service; default: AWS.")] = None,
    region: Annotated[str | None, typer.Option(help="Region of the bucket.")] = None,
    addressing_style: Annotated[str | None, typer.Option(help="auto, path or virtual.")] = None,
    profile: Annotated[str | None, typer.Option(help="Profile of the AWS configuration.")] = None,
    ca_bundle: Annotated[Path | None, typer.Option(help="File of CA certificates.")] = None,
    settings_file: Annotated[
        Path | None, typer.Option(help="YAML file of settings; default: LMCACHE_S3_CONFIG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only, for programs.")] = False,
) -> None:
    """Only its signature is used."""


def command(function: Callable[..., None], *, url_is_option: bool = False) -> Callable[..., None]:
    """Make `function(cli, …)` a command of its own arguments, after URL, and the common options.

    url_is_option: it is given as `--url`, where another argument comes first.
    """
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    url, *options = inspect.signature(_common, eval_str=True).parameters.values()
    if url_is_option:
        help_text = "Root of the cache; default: LMCACHE_S3_URL."
        url = url.replace(annotation=Annotated[str | None, typer.Option("--url", help=help_text)])

    def run(**arguments: Any) -> None:
        with errors_to_exit():
            cli = _open({p.name: arguments.pop(p.name) for p in (url, *options)}, arguments)
            try:
                function(cli, **arguments)
            finally:
                cli.close()

    parameters = [*own, url, *options] if url_is_option else [url, *own, *options]
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by inspect, so by typer
    return run


def _open(common: dict[str, Any], own: dict[str, Any]) -> Cli:
    as_json = common.pop("as_json")
    url = common["url"]
    if url is not None and not looks_like_url(url) and own.get("name", "") is None:
        # `info NAME` where the environment has the URL.
        own["name"], common["url"] = url, None
    given = {k: v for k, v in common.items() if v is not None}
    unused = {"url": "memory://unused"} if url is None and own.get("out") is not None else {}
    settings = load_settings(**unused, **given)
    store_settings = {k: str(v) for k, v in given.items() if k not in ("url", "settings_file")}
    return Cli(settings, store_settings, as_json)


@contextmanager
def errors_to_exit() -> Iterator[None]:
    """Our errors become one line on stderr and exit code 2; Ctrl-C becomes 130."""
    try:
        yield
    except LMCacheS3Error as e:
        print(f"lmcache-s3: {' '.join(str(e).split())}", file=sys.stderr)
        raise typer.Exit(2) from e
    except KeyboardInterrupt as e:
        print("lmcache-s3: interrupted", file=sys.stderr)
        raise typer.Exit(130) from e
