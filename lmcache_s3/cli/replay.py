"""`lmcache-s3 replay`: what tiers of some sizes would have saved on a recorded trace of requests, by policy."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcache_s3.cli.common import console, errors_to_exit, monthly_dollars, size_text, table
from lmcache_s3.cli.units import size_bytes
from lmcache_s3.errors import Invalid
from lmcache_s3.replay.plot import draw
from lmcache_s3.replay.run import OBJECT, Outcome, TierPlan, replay
from lmcache_s3.replay.tiers import POLICIES
from lmcache_s3.replay.trace import read_trace
from lmcache_s3.tiers.eviction.admission import SecondTouch

_LLAMA_8B_BYTES = 131_072


def replay_command(
    trace: Annotated[Path, typer.Argument(help="A trace of requests: Mooncake's format, or Qwen-Bailian's.")],
    tiers: Annotated[
        str, typer.Option(help="Fast to slow, with their sizes; `object`, the bucket, last and without a size.")
    ] = "host=40GB,disk=400GB,object",
    policy: Annotated[
        list[str] | None, typer.Option(help=f"May be repeated: {', '.join(POLICIES)}. Default: hazard and lru.")
    ] = None,
    bytes_per_token: Annotated[
        int, typer.Option(min=1, help="Stored KV of a token, in bytes; an 8B model's, not coded, unless given.")
    ] = _LLAMA_8B_BYTES,
    block_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a hashed block; default: 512 or 16, as the format has it.")
    ] = None,
    second_touch: Annotated[bool, typer.Option(help="Store in the bucket only what was used before.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the hit rates here (.svg, .png, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only, for programs.")] = False,
) -> None:
    """Replay a trace: hit rate by tier, bytes moved and dollars, for each eviction policy."""
    with errors_to_exit():
        plans = parse_tiers(tiers)
        names = [plan.name for plan in plans]
        policies = policy or ["hazard", "lru"]
        _check(policies, plot)
        read = read_trace(trace, block_tokens)
        _check_sizes(plans, read.chunk_tokens * bytes_per_token)
        outcomes = [
            replay(read, one, plans, bytes_per_token, admission=SecondTouch() if second_touch else None)
            for one in policies
        ]
        if plot is not None:
            draw(plot, outcomes, names, f"{trace.name}: {tiers}")
        rows = [_row(one, names) for one in outcomes]
        hours = (read.uses[-1].time_s - read.uses[0].time_s) / 3600
        if as_json:
            head = {"trace": str(trace), "requests": len(read.uses), "input_tokens": read.input_tokens, "hours": hours}
            print(json.dumps(head | {"policies": rows}, indent=2))
        else:
            _print(rows, names)
            print(f"{len(read.uses)} requests of {read.input_tokens} prompt tokens in {hours:.2f} hours")
            print(
                "hits: share of the prompt tokens; $ requests: of those hours; $ a month: for what is kept at the end"
            )


def _check(policies: Sequence[str], plot: Path | None) -> None:
    """What can be known to be wrong before a replay of minutes. Raises `Invalid`."""
    for one in policies:
        if one not in POLICIES:
            raise Invalid(f"{one!r} is no policy; there are {', '.join(POLICIES)}", kind="argument")
    if plot is not None and plot.suffix not in (".svg", ".png", ".pdf"):
        raise Invalid(f"{plot}: write a file name that ends in .svg, .png or .pdf", kind="argument")
    if plot is not None and not plot.parent.is_dir():
        raise Invalid(f"{plot}: there is no directory {plot.parent}", kind="argument")


def _check_sizes(plans: Sequence[TierPlan], chunk_bytes: int) -> None:
    """Raises `Invalid`."""
    for one in plans:
        if one.capacity_bytes is not None and one.capacity_bytes < chunk_bytes:
            raise Invalid(
                f"tier {one.name}: {one.capacity_bytes} bytes hold no chunk of {size_text(chunk_bytes)}; write for "
                f"example {one.name}=40GB, or mend --bytes-per-token",
                kind="argument",
            )


def parse_tiers(text: str) -> list[TierPlan]:
    """`host=40GB,disk=400GB,object`. Raises `Invalid`."""
    plans: list[TierPlan] = []
    for part in text.split(","):
        name, given, size = part.strip().partition("=")
        if not name or bool(given) == (name == OBJECT) or name in [plan.name for plan in plans]:
            raise Invalid(f"tiers {text!r}: write for example host=40GB,disk=400GB,object", kind="argument")
        plans.append(TierPlan(name, size_bytes(size) if given else None))
    if any(plan.capacity_bytes is None for plan in plans[:-1]):
        raise Invalid(f"tiers {text!r}: object, the bucket, comes last", kind="argument")
    return plans


def _row(one: Outcome, names: Sequence[str]) -> dict[str, Any]:
    return {
        "policy": one.policy,
        "hit_rate": one.hit_rate,
        "tiers": {
            name: {
                "hit_rate": one.hit_tokens[name] / max(1, one.input_tokens),
                "read_bytes": one.read_bytes[name],
                "written_bytes": one.written_bytes[name],
            }
            for name in names
        },
        "puts": one.puts,
        "gets": one.gets,
        "request_dollars": one.request_dollars,
        "stored_bytes": one.stored_bytes,
        "storage_dollars_per_month": monthly_dollars(one.stored_bytes),
    }


def _print(rows: list[dict[str, Any]], names: Sequence[str]) -> None:
    numbers = ["hits", *(f"{name} {what}" for name in names for what in ("hits", "read", "written"))]
    if OBJECT in names:
        numbers += ["PUTs", "GETs", "$ requests", "$ a month"]
    made = table("policy", *numbers, right=tuple(numbers))
    for row in rows:
        cells = [f"{row['hit_rate']:.1%}"]
        for name in names:
            tier = row["tiers"][name]
            cells += [f"{tier['hit_rate']:.1%}", size_text(tier["read_bytes"]), size_text(tier["written_bytes"])]
        if OBJECT in names:
            cells += [str(row["puts"]), str(row["gets"]), f"{row['request_dollars']:.2f}"]
            cells.append(f"{row['storage_dollars_per_month']:.2f}")
        made.add_row(row["policy"], *cells)
    console(sys.stdout).print(made)
