"""`lmcache-s3 bench e2e`: the main job on real engines, against vLLM without us, in one run.

SeaweedFS on loopback, SmolLM2-135M-Instruct, four vLLM processes: A stores; B (fresh, empty tiers) loads and is timed;
N has no connector and gives the cold time and vLLM's own prefix hit, asked turn and turn about with B; C (fresh) loads
once more with the audit on, which costs time, and so proves what B cannot prove while it is timed.
The run fails if B read fewer bytes from S3 than the KV it was given has. Raises `EngineFailed`.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from lmcache_s3.benchmarks.figures import Figure, report
from lmcache_s3.benchmarks.prompts import WARM_UP, documents, long_prompts
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.testing.engine import Answer, EngineFailed, EngineProcess
from lmcache_s3.testing.models import smollm2_apart
from lmcache_s3.testing.servers import SeaweedFS
from lmcache_s3.types import ITEM_BYTES

CHUNK_TOKENS = 256
BLOCK_TOKENS = 128
LONG_TOKENS = 4096
LONG_PROMPTS = 5
TAIL_TOKENS = 24
TAILED_PROMPTS = 3
"""Prompts with a tail behind the last full chunk, so that vLLM's own hit and ours leave the same tokens to compute; of
a prompt of full chunks alone ours leaves one token, and vLLM's own a block."""
SHORT_TOKENS = (300, 340, 360, 513, 560, 600, 769, 820, 880, 1025, 1100, 1281, 1300, 1400, 1537, 1600, 1800, 2050)
"""Each less than a block beyond full chunks: vLLM's own hit is then as long as ours, and both must answer alike."""
OUT_TOKENS = 16
NEAR_TIE = 0.05
"""Two tokens this close in log-probability (nats) may change places by rounding alone."""
EXEMPT_SHARE = 0.05
TOKEN_BYTES = 2 * 30 * 3 * 64 * ITEM_BYTES["bfloat16"]
"""KV of one token of SmolLM2-135M: K and V, 30 layers, 3 heads of 64."""
_NEVER_S = 3600.0
"""A's pause between looks at the log: so that every GET it makes is a commit's own."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One long prompt. cold, native: N's answers without and with its own prefix cache. shared: B's, from S3."""

    cold: Answer
    native: Answer
    shared: Answer
    read_bytes: int

    @property
    def speedup(self) -> float:
        return self.cold.ttft_s / self.shared.ttft_s

    @property
    def against_native(self) -> float:
        return self.shared.ttft_s / self.native.ttft_s


@dataclass
class Identity:
    """Shared hits held against native hits of the same cached length."""

    compared: int = 0
    to_the_bit: int = 0
    """Answers whose every log-probability is the same number."""
    near_ties: list[str] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)

    def compare(self, what: str, got: Answer, want: Answer) -> None:
        self.compared += 1
        self.to_the_bit += got.logprobs == want.logprobs
        for step, (a, b) in enumerate(zip(got.tokens, want.tokens, strict=False)):
            if a != b:
                (_, first), (_, second) = want.logprobs[step][:2]
                gap = first - second
                tie = gap <= NEAR_TIE and {a, b} <= {token for token, _ in want.logprobs[step][:2]}
                where = self.near_ties if tie else self.differ
                where.append(f"{what}, token {step}: {a} for {b}, gap {gap:.3f}")
                return
        if len(got.tokens) != len(want.tokens):
            self.differ.append(f"{what}: {len(got.tokens)} tokens for {len(want.tokens)}")

    @property
    def holds(self) -> bool:
        return not self.differ and len(self.near_ties) <= EXEMPT_SHARE * self.compared


def full_tokens(prompt: Sequence[int]) -> int:
    """Tokens in full chunks."""
    return len(prompt) // CHUNK_TOKENS * CHUNK_TOKENS


class Run:
    """The benchmark, part by part."""

    def __init__(self, stack: ExitStack, steps: Steps) -> None:
        self._stack, self._steps = stack, steps
        self._home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lmcache-s3-bench-")))
        with steps("unpacking SmolLM2-135M-Instruct (about 30 s the first time)"):
            self._model = smollm2_apart()
        with steps("starting an S3 server (SeaweedFS, loopback)"):
            self._server = stack.enter_context(SeaweedFS())
            self._url = self._server.make_bucket("lmcache-bench") + "/kv"
        self.identity = Identity()
        self.answers: list[tuple[list[int], Answer]] = []
        """What B was asked, and what it answered."""

    def engine(self, name: str, seed: int, **settings: object) -> EngineProcess:
        connector = name != "N"
        return self._stack.enter_context(
            EngineProcess(
                self._model,
                url=self._url if connector else None,
                connector=connector,
                extra_config={"endpoint_url": self._server.endpoint_url, "chunk_tokens": CHUNK_TOKENS, **settings},
                env=self._server.env(),
                hash_seed=seed,
                name=name,
                directory=self._home,
                audit=name in "AC",
            )
        )

    def start(self, *engines: EngineProcess) -> None:
        names = ", ".join(e.name for e in engines)
        with self._steps(f"starting {names} (half a minute to a minute)") as tick:
            for e in engines:
                e.ready(tick=tick)
            for e in engines:
                if e.name == "N":
                    e.ask(WARM_UP, 1, logprobs=2, tick=tick)
                else:
                    e.warm_up(WARM_UP, tick=tick)

    def prompts(self, engine: EngineProcess) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """(long, long with a tail, short) prompts of real prose; no two begin alike."""
        texts = [engine.encode(d.text) for d in documents()]
        prose = list(itertools.chain.from_iterable(texts))
        longs = long_prompts(texts, LONG_TOKENS + TAIL_TOKENS, LONG_PROMPTS + TAILED_PROMPTS)
        shorts = [prose[61 * (i + 1) : 61 * (i + 1) + n] for i, n in enumerate(SHORT_TOKENS)]
        return [p[:LONG_TOKENS] for p in longs[:LONG_PROMPTS]], longs[LONG_PROMPTS:], shorts

    def store(self, a: EngineProcess, prompts: Sequence[list[int]], what: str) -> Mapping[str, float]:
        """A reads the prompts and stores them; requests made meanwhile, by kind."""
        before = _requests(a)
        want = a.stat("scheduler", "stored_extents") + len(prompts)
        with self._steps(f"A reads and stores {len(prompts)} {what} prompts") as tick:
            for prompt in prompts:
                a.ask([prompt], 1, tick=tick)
            a.wait_stats(lambda s: s["scheduler"].get("stored_extents", 0) >= want, what="the stores", tick=tick)
        after = _requests(a)
        return {kind: after[kind] - before[kind] for kind in after}

    def time_one(self, b: EngineProcess, n: EngineProcess, prompt: list[int]) -> Timed:
        """Cold, native hit and shared hit of one long prompt, one after the other."""
        n.reset_prefix_cache()
        (cold,) = n.ask([prompt], 1)
        (native,) = n.ask([prompt], OUT_TOKENS, logprobs=2)
        before = b.stats()["worker"]
        shared = self.shared(b, prompt)
        loads = before.get("loaded_requests", 0)
        after = b.wait_stats(lambda s: s["worker"].get("loaded_requests", 0) > loads, what="B's load")["worker"]
        read = int(after["loaded_bytes"] - before.get("loaded_bytes", 0))
        wanted = full_tokens(prompt) * TOKEN_BYTES
        if read < wanted:
            raise EngineFailed(f"B read {read} bytes from S3 for KV of {wanted}: this was no load from S3")
        own = (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        if cold.cached_tokens or native.cached_tokens != own:
            raise EngineFailed(f"N cached {cold.cached_tokens} cold, {native.cached_tokens} then: no fair comparison")
        if own == full_tokens(prompt):
            self.identity.compare(f"{len(prompt)} tokens", shared, native)
        return Timed(cold, native, shared, read)

    def shared(self, b: EngineProcess, prompt: list[int]) -> Answer:
        b.reset_prefix_cache()
        (answer,) = b.ask([prompt], OUT_TOKENS, logprobs=2)
        self.answers.append((prompt, answer))
        return answer

    def compare_short(self, b: EngineProcess, n: EngineProcess, prompts: Sequence[list[int]]) -> None:
        for prompt in prompts:
            n.reset_prefix_cache()
            n.ask([prompt], 1)  # all at once, as A computed it
            (native,) = n.ask([prompt], OUT_TOKENS, logprobs=2)
            self.identity.compare(f"{len(prompt)} tokens", self.shared(b, prompt), native)


def _requests(a: EngineProcess) -> dict[str, float]:
    stats = a.stats()
    scheduler, worker = stats["scheduler"], stats["worker"]
    puts = sum(scheduler.get(k, 0) for k in ("index_puts", "store_puts")) + worker.get("store_puts", 0)
    gets = sum(scheduler.get(k, 0) for k in ("index_gets", "index_lists")) + worker.get("load_requests", 0)
    return {"puts": puts, "gets": gets}


def _hit_fraction(answers: Sequence[tuple[list[int], Answer]]) -> float:
    return sum(a.cached_tokens for _, a in answers) / sum(full_tokens(p) for p, _ in answers)


def _same_tokens(timed: Sequence[Timed]) -> float:
    """Of prompts of full chunks alone: vLLM's own hit computes a block where ours computes a token, and rounds so."""
    return sum(t.shared.tokens == t.native.tokens for t in timed) / len(timed)


def _loaded_is_stored(stored: Sequence[Mapping[str, str]], loaded: Sequence[Mapping[str, str]], chunks: int) -> bool:
    """Was every chunk loaded, each with the bits that were stored under its hash?"""
    bits = {(line["hash"], line["shard"]): line["xxh3"] for line in stored if line["op"] == "store"}
    loads = [line for line in loaded if line["op"] == "load"]
    return len(loads) == chunks and all(bits.get((line["hash"], line["shard"])) == line["xxh3"] for line in loads)


def measure(steps: Steps) -> list[Figure]:
    """Run it all."""
    with ExitStack() as stack:
        run = Run(stack, steps)
        a, n = run.engine("A", 1, poll_s=_NEVER_S), run.engine("N", 3)
        run.start(a, n)
        longs, tailed, shorts = run.prompts(a)
        requests = run.store(a, longs, "long")
        run.store(a, [*tailed, *shorts], "other")
        a.close()
        stored = a.audit()
        b = run.engine("B", 2)
        run.start(b)
        timed = []
        for i, prompt in enumerate([*longs, *tailed], 1):
            what = f"{i} of {len(longs) + len(tailed)}: cold, native hit, shared hit of {len(prompt):,} tokens"
            with steps(what):
                timed.append(run.time_one(b, n, prompt))
        with steps(f"{len(shorts)} short prompts: shared hits against native hits"):
            run.compare_short(b, n, shorts)
        scheduler = b.stats()["scheduler"]
        b.close()
        n.close()
        c = run.engine("C", 4)
        run.start(c)
        every = [*longs, *tailed, *shorts]
        with steps("C loads everything once more and reads it back, bit for bit"):
            for prompt in every:
                c.ask([prompt], 1)
            c.close()
        identical = _loaded_is_stored(stored, c.audit(), sum(full_tokens(p) // CHUNK_TOKENS for p in every))
    identity = run.identity
    for line in identity.near_ties:
        steps.console.print(f"near-tie let pass: {line}")
    for line in identity.differ:
        steps.console.print(f"[red]differs:[/red] {line}")
    plain, with_tail = timed[: len(longs)], timed[len(longs) :]
    per = len(longs) * LONG_TOKENS / 4096
    return [
        Figure("e2e.kv_identical", float(identical), "1 = bit for bit", 1, "higher"),
        Figure("e2e.tokens_identical", float(identity.holds), "1 = the same", 1, "higher"),
        Figure("e2e.answers_compared", identity.compared, "answers", 20, "higher"),
        Figure("e2e.near_ties", len(identity.near_ties), "answers", None, "lower"),
        Figure("e2e.logprobs_identical", identity.to_the_bit / identity.compared, "of answers", None, "higher"),
        Figure("e2e.full_prompts_same_tokens", _same_tokens(plain), "of answers", None, "higher"),
        Figure("e2e.hit_fraction", _hit_fraction(run.answers), "of tokens in full chunks", 0.99, "higher"),
        Figure("e2e.ttft_speedup", _median(t.speedup for t in plain), "×", 8, "higher"),
        Figure("e2e.ttft_vs_native_hit", _median(t.against_native for t in plain), "×", 1.8, "lower"),
        Figure("e2e.ttft_vs_native_hit_same_work", _median(t.against_native for t in with_tail), "×", None, "lower"),
        Figure("e2e.store_puts_per_4096_tokens", requests["puts"] / per, "requests", 3, "lower"),
        Figure("e2e.store_gets_per_4096_tokens", requests["gets"] / per, "requests", 2, "lower"),
        Figure("e2e.lookup_requests", scheduler["lookup_requests"], "requests", 0, "lower"),
        Figure("e2e.cold_ttft_s", _median(t.cold.ttft_s for t in plain), "s", None, "lower"),
        Figure("e2e.native_hit_ttft_s", _median(t.native.ttft_s for t in plain), "s", None, "lower"),
        Figure("e2e.shared_hit_ttft_s", _median(t.shared.ttft_s for t in plain), "s", None, "lower"),
        Figure("e2e.read_bytes_per_prompt", _median(t.read_bytes for t in plain), "bytes", None, "lower"),
    ]


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def main(json_path: Path | None = None) -> bool:
    """Measure, print the table, write the JSON; whether every goal was met."""
    console = Console(highlight=False)
    figures = measure(Steps(console))
    return report(figures, json_path, console=console)
