"""`lmcache-s3 bench`: measure, print a table, write figures as JSON."""

from __future__ import annotations

import importlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lmcache_s3.cli.common import errors_to_exit


class Benchmark(StrEnum):
    """Each is a module of `lmcache_s3.benchmarks` with `main(json_path)`, imported when it is asked for."""

    E2E = "e2e"
    INDEX = "index"
    FLEET = "fleet"
    SIMULATE = "simulate"


def bench(
    name: Annotated[
        Benchmark,
        typer.Argument(
            help="e2e: two real engines share one S3 bucket. index: the index alone, up to 10 million entries. "
            "fleet: 64 writers on a real cluster. simulate: 1,000 instances, one day, in virtual time."
        ),
    ],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here as JSON.")] = None,
) -> None:
    """Run a benchmark; exit 1 if a figure misses its goal."""
    with errors_to_exit():
        module = importlib.import_module(f"lmcache_s3.benchmarks.{name.value}")
        met = module.main(json_path)
    if met is False:
        raise typer.Exit(1)
