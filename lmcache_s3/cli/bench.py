"""`lmcache-s3 bench`: measure, print a table, write figures as JSON."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcache_s3.cli.common import errors_to_exit

app = typer.Typer(no_args_is_help=True, help="Run a benchmark; exit 1 if a figure misses its goal.")

BENCHMARKS = {
    "e2e": "Two real engines share one S3 bucket.",
    "index": "The index alone, up to 10 million entries.",
    "fleet": "64 writers on a real cluster.",
    "simulate": "1,000 instances, one day, in virtual time.",
}
"""Each is a module of `lmcache_s3.benchmarks` with `main(json_path)`, imported when it is asked for."""

JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the figures here as JSON.")]


def run(name: str, **arguments: Any) -> None:
    """`main` of a benchmark's module; its verdict becomes the exit code."""
    with errors_to_exit():
        met = importlib.import_module(f"lmcache_s3.benchmarks.{name}").main(**arguments)
    if met is False:
        raise typer.Exit(1)


def _plain(name: str) -> Callable[..., None]:
    def benchmark(json_path: JsonPath = None) -> None:
        run(name, json_path=json_path)

    return benchmark


for _name, _help in BENCHMARKS.items():
    app.command(_name, help=_help)(_plain(_name))
