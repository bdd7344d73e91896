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
    "client": "Our S3 client beside obstore and boto3.",
    "tiers": "The host and disk tiers beside memcpy and plain files.",
    "transfer": "Loads and stores beside the raw client, on a real server.",
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


@app.command()
def codecs(
    json_path: JsonPath = None,
    mutations: Annotated[int, typer.Option(min=1, help="Decode so many mutated cells, over all codecs.")] = 1_000_000,
) -> None:
    """What codecs save and cost on a real model's KV, beside zstd, blosc2 and pcodec."""
    run("codecs", json_path=json_path, mutations=mutations)


@app.command()
def soak(
    json_path: JsonPath = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="How long.")] = 30.0,
    url: Annotated[
        str | None, typer.Option(help="Root of a cache that may be filled; default: an S3 server of its own.")
    ] = None,
) -> None:
    """Stores and loads through all tiers at once, every byte checked, budgets and memory watched."""
    run("soak", json_path=json_path, minutes=minutes, url=url)


@app.command()
def gpu(json_path: JsonPath = None) -> None:
    """Codec cachegen on this machine's GPU: its bits against the CPU's, then its speed. Exit 2 without a GPU."""
    with errors_to_exit():
        module = importlib.import_module("lmcache_s3.benchmarks.gpu")
        status: int = module.main(json_path)
    raise typer.Exit(status)


@app.command()
def quality(
    json_path: JsonPath = None,
    model: Annotated[
        str | None, typer.Option(help="Directory or hub name of a model; default: SmolLM2-135M-Instruct.")
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(help="A codec to measure; may be repeated. Default: cachegen and transform, calibrated first."),
    ] = None,
    level: Annotated[list[str] | None, typer.Option(help="A level; may be repeated. Default: all.")] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="At most so many documents of each kind of text; default: 24 of prose.")
    ] = None,
    context: Annotated[
        int,
        typer.Option(min=256, help="Tokens of the prompts; for more than 1,024 documents of a kind are joined."),
    ] = 1024,
    needles: Annotated[bool, typer.Option(help="Search needles in 4,096 and 8,192 tokens.")] = True,
    save: Annotated[
        str | None, typer.Option(metavar="URL", help="Root of a cache that may rely on what was measured (max_kl).")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw rate and distortion here (.svg, .png).")] = None,
) -> None:
    """What a coded cache costs in the quality of a model's answers (about an hour on two cores)."""
    run(
        "quality",
        json_path=json_path,
        model=model,
        codecs=codec or ("cachegen", "transform"),
        levels=level or (),
        documents=documents,
        context_tokens=context,
        needles=needles,
        save_url=save,
        figure_path=figure,
    )


@app.command()
def policy(
    trace: Annotated[Path, typer.Argument(help="A trace of requests: Mooncake's format, or Qwen-Bailian's.")],
    json_path: JsonPath = None,
) -> None:
    """Eviction, admission and write-behind on a recorded trace (a minute)."""
    run("policy", json_path=json_path, trace_path=trace)
