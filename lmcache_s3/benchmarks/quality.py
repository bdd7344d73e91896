"""`lmcache-s3 bench quality`: what coded caches cost in the quality of answers, on a real model.

Every level of the codec, LMCache's `cachegen` and fp8 code the KV of the same documents (`quality/texts.py`); what the
model then says is held against what it says uncoded (`quality/measure.py`). From these:

- `codec.cachegen_bits`: bits per value of the cheapest level whose KL on prose is within 0.018 (16, uncoded, if none);
- `codec.cachegen_vs_lmcache`: bytes of the cheapest level no worse than LMCache's default ÷ that one's bytes;
- `codec.transform_bits`, `_bits_fine`, `_layerwise_bits`: the same of `transform`, calibrated in the same run on other
  texts (`calibrated.py`), within 0.01 and 0.004, and within 0.0125 where units are one layer;
- `codec.needle_found`: needles found behind the cheapest of all within 0.01, ÷ those found uncoded.

The goals are for SmolLM2 behind 1,024 tokens. Other models (`--model`), and longer prompts (`--context`, of documents
joined to such a length), are reported without.

What is measured is kept in the user's cache directory until the run ends, so that one that was interrupted goes on.
`--save` puts what was measured of each level into a bucket, where `max_kl` looks for it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lmcache_s3.benchmarks.figures import Figure, document
from lmcache_s3.benchmarks.figures import report as report_figures
from lmcache_s3.benchmarks.peers import Fp8, LMCacheCacheGen
from lmcache_s3.benchmarks.quality_state import State
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Invalid
from lmcache_s3.extent import package_version
from lmcache_s3.fidelity import Measurement, Subject, save
from lmcache_s3.quality import needle
from lmcache_s3.quality.coding import CodecCoder, Coder, through
from lmcache_s3.quality.long_texts import context_within, joined
from lmcache_s3.quality.measure import CHUNK_TOKENS, CONTEXT_TOKENS, Mean, Score, Trial, context_of, summary
from lmcache_s3.quality.model import Model
from lmcache_s3.quality.texts import KINDS, Document, digest, held_out

CACHEGEN_KL = 0.018
"""Nats per token."""
TRANSFORM_GOALS = (
    ("codec.transform_bits", "transform-", 0.01, 0.60),
    ("codec.transform_bits_fine", "transform-", 0.004, 1.0),
    ("codec.transform_layerwise_bits", "transform-layerwise-", 0.0125, 1.25),
)
"""Figure, whose coders, within which KL, goal in bits per value."""
RECOMMENDED_KL = 0.01
CODECS = ("cachegen", "transform")
NEEDLE_TOKENS = (4096, 8192)
OTHER_KINDS_MOST = 4
HAYSTACKS = 3
"""Of each length; one has 16 needles, so few that luck decides."""
UNCODED_BITS = 16.0
_PIPE_WIDTH = 160
_LMCACHE = LMCacheCacheGen()


@dataclass(frozen=True, slots=True)
class Found:
    """Needles found of those asked for, by coder (`uncoded` among them)."""

    length_tokens: int
    asked: int
    found: dict[str, int]


@dataclass
class Results:
    """One model's. scores: of all coders and documents."""

    model: str
    texts: str
    scores: list[Score] = field(default_factory=list)
    needles: list[Found] = field(default_factory=list)

    def mean(self, coder: str, kind: str | None, figure: str) -> float | None:
        found = summary(self.scores, coder, kind)
        return None if found is None else found[figure].value


def levels_of(codec: str) -> list[str]:
    """Every level of a codec, from fine to coarse; empty for one without."""
    if codec == "cachegen":
        from lmcache_s3.codecs.cachegen import LEVELS

        return list(LEVELS)
    return []


def coders(codec: str, levels: Sequence[str]) -> list[CodecCoder]:
    """The codec at these levels, at all of its own if none are given. Raises `Invalid` for names it does not know."""
    chosen = list(levels) or levels_of(codec)
    return [CodecCoder(make_codec(codec, {"level": level})) for level in chosen] or [CodecCoder(make_codec(codec))]


def cheapest(results: Results, ours: Sequence[Coder], most_kl: float, kind: str = "prose") -> tuple[str, float] | None:
    """Name and bits of the coder with the fewest bits among those within `most_kl` on that kind of text."""
    good = []
    for coder in ours:
        kl, bits = (results.mean(coder.name, kind, figure) for figure in ("kl", "bits"))
        if kl is not None and bits is not None and kl <= most_kl:
            good.append((bits, coder.name))
    return (min(good)[1], min(good)[0]) if good else None


# --- measuring --------------------------------------------------------------------------------------------------------


def score_documents(
    model: Model,
    documents: Sequence[Document],
    measured: Sequence[Coder],
    state: State,
    console: Console,
    context_tokens: int = CONTEXT_TOKENS,
) -> list[Score]:
    """Every coder on every document, with a line of progress; documents in `state` are not measured again."""
    scores: list[Score] = []
    with _progress(console) as progress:
        task = progress.add_task("documents", total=len(documents))
        for one in documents:
            rows = state.rows(one.name, one.kind)
            if rows is None:
                tokens = one.tokens(model)
                if not context_of(len(tokens)):
                    console.print(f"{one.name}: {len(tokens)} tokens are too few, left out", markup=False)
                    progress.advance(task)
                    continue
                trial = Trial(model, tokens, context_tokens=context_tokens)
                rows = [trial.score(coder, one.name, one.kind).row() for coder in measured]
                state.add(one.name, one.kind, rows)
            scores += [Score(**row) for row in rows]
            progress.advance(task)
            if not console.is_terminal:
                said = ", ".join(f"{row['coder']} {row['kl']:.4f}" for row in rows)
                console.print(f"{one.kind} {one.name}: KL {said}", markup=False)
    return scores


def find_needles(
    model: Model, prose: Sequence[str], length_tokens: int, tried: Sequence[Coder], console: Console
) -> Found:
    """Needles behind the model's own cache and behind each coder's, in haystacks of other prose and other needles."""
    asked = 0
    counts = dict.fromkeys(("uncoded", *(coder.name for coder in tried)), 0)
    with _progress(console) as progress:
        task = progress.add_task(f"needles in {length_tokens} tokens", total=HAYSTACKS * (2 + len(tried)))
        for seed in range(HAYSTACKS):
            first = seed * len(prose) // HAYSTACKS
            hay = needle.haystack(model, [*prose[first:], *prose[:first]], length_tokens, seed=seed)
            asked += len(hay.asked)
            kv = model.prefill(hay.prompt)
            progress.advance(task)
            counts["uncoded"] += needle.found(model.primed(kv), hay.asked)
            progress.advance(task)
            for coder in tried:
                coded, _ = through(coder, kv, model.groups, hay.prompt, model.kv_dtype, chunk_tokens=CHUNK_TOKENS)
                counts[coder.name] += needle.found(model.primed(coded), hay.asked)
                progress.advance(task)
    return Found(length_tokens, asked, counts)


def _progress(console: Console) -> Progress:
    text = TextColumn("{task.description} {task.completed:.0f}/{task.total:.0f}")
    return Progress(text, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)


# --- saying -----------------------------------------------------------------------------------------------------------


def print_tables(results: Results, measured: Sequence[Coder], console: Console) -> None:
    table = Table(title=f"{results.model}, texts {results.texts}", box=None, header_style="bold", title_justify="left")
    for name in ("text", "coder", "bits/value", "× vs 16", "KL", "± se", "ΔNLL", "± se", "same top-1", "greedy of 64"):
        table.add_column(name, justify="left" if name in ("text", "coder") else "right")
    for kind in KINDS:
        for coder in measured:
            mean = summary(results.scores, coder.name, kind)
            if mean is not None:
                table.add_row(kind, coder.name, *_cells(mean))
    console.print(table)
    for one in results.needles:
        said = ", ".join(f"{name} {count}" for name, count in one.found.items())
        console.print(f"needles found of {one.asked} in {one.length_tokens} tokens: {said}", markup=False)


def _cells(mean: dict[str, Mean]) -> list[str]:
    kl, change = mean["kl"], mean["delta_nll"]
    return [
        f"{mean['bits'].value:.3f}",
        f"{UNCODED_BITS / mean['bits'].value:.1f}",
        *(f"{kl.value:.4f}", f"{kl.error:.4f}", f"{change.value:+.4f}", f"{change.error:.4f}"),
        f"{mean['top1'].value:.3f}",
        f"{mean['greedy_tokens'].value:.1f}",
    ]


def figures_of(results: Results, ours: Sequence[CodecCoder]) -> list[Figure]:
    """Every figure: those with goals first, then each coder's on each kind of text."""
    made: list[Figure] = []
    cachegen = [coder for coder in ours if coder.codec.id == "cachegen"]
    if cachegen:
        made += _cachegen_figures(results, cachegen)
    for name, prefix, most_kl, goal in TRANSFORM_GOALS:
        these = [coder for coder in ours if coder.name.startswith(prefix)]
        if these:
            best = cheapest(results, these, most_kl)
            made.append(Figure(name, best[1] if best else UNCODED_BITS, f"bits at KL ≤ {most_kl}", goal, "lower"))
    made += _needle_figures(results, ours)
    everybody: list[Coder] = [*ours, _LMCACHE, Fp8()]
    for coder in everybody:
        for kind in KINDS:
            mean = summary(results.scores, coder.name, kind)
            if mean is not None:
                name = f"quality.{coder.name}.{kind}"
                made += [
                    Figure(f"{name}.bits", mean["bits"].value, "bits/value", None, "lower"),
                    Figure(f"{name}.kl", max(mean["kl"].value, 0.0), "nats/token", None, "lower"),
                    Figure(f"{name}.delta_nll", mean["delta_nll"].value, "nats/token", None, "lower"),
                    Figure(f"{name}.top1", mean["top1"].value, "share", None, "higher"),
                    Figure(f"{name}.greedy_tokens", mean["greedy_tokens"].value, "tokens of 64", None, "higher"),
                ]
    return made


def _cachegen_figures(results: Results, ours: Sequence[CodecCoder]) -> list[Figure]:
    best = cheapest(results, ours, CACHEGEN_KL)
    made = [
        Figure("codec.cachegen_bits", best[1] if best else UNCODED_BITS, f"bits at KL ≤ {CACHEGEN_KL}", 2.3, "lower")
    ]
    for kind in KINDS:
        bound = results.mean(_LMCACHE.name, kind, "kl")
        theirs = results.mean(_LMCACHE.name, kind, "bits")
        if bound is None or theirs is None:
            continue
        equal = cheapest(results, ours, bound, kind)
        ratio = (equal[1] if equal else UNCODED_BITS) / theirs
        name = "codec.cachegen_vs_lmcache" + ("" if kind == "prose" else f".{kind}")
        made.append(Figure(name, ratio, "bytes ÷ bytes", 0.5 if kind == "prose" else None, "lower"))
    return made


def recommended(results: Results, ours: Sequence[Coder]) -> str | None:
    """The coder that one would choose: the cheapest within `RECOMMENDED_KL`, else within cachegen's bound."""
    best = cheapest(results, ours, RECOMMENDED_KL) or cheapest(results, ours, CACHEGEN_KL)
    return None if best is None else best[0]


def _needle_figures(results: Results, ours: Sequence[Coder]) -> list[Figure]:
    made: list[Figure] = []
    best = recommended(results, [coder for coder in ours if all(coder.name in one.found for one in results.needles)])
    if best is not None and results.needles:
        got = sum(one.found[best] for one in results.needles)
        uncoded = sum(one.found["uncoded"] for one in results.needles)
        made.append(Figure("codec.needle_found", got / max(1, uncoded), f"{got} ÷ {uncoded}, {best}", 0.99, "higher"))
    for one in results.needles:
        for coder, count in one.found.items():
            name = f"quality.needles_{one.length_tokens}.{coder}"
            made.append(Figure(name, count / one.asked, f"of {one.asked}", None, "higher"))
    return made


def measurements(results: Results, ours: Sequence[CodecCoder], weights: str, kv_dtype: str) -> list[Measurement]:
    """What each level can be saved as: the KL of the kind of text that suffers most. Needs every kind measured."""
    made = []
    for coder in ours:
        by_kind = {kind: summary(results.scores, coder.name, kind) for kind in KINDS}
        known = {kind: mean for kind, mean in by_kind.items() if mean is not None}
        if set(known) != set(KINDS):
            raise Invalid(f"{coder.name}: not every kind of text was measured: nothing is saved", kind="argument")
        about = {
            "model": results.model,
            "texts": results.texts,
            "documents": len({s.document for s in results.scores}),
            "kl": {kind: mean["kl"].value for kind, mean in known.items()},
            "kl_standard_error": {kind: mean["kl"].error for kind, mean in known.items()},
            "bits_per_value": {kind: mean["bits"].value for kind, mean in known.items()},
            "package_version": package_version(),
        }
        subject = Subject(weights, kv_dtype, CHUNK_TOKENS, coder.codec.id, coder.codec.level)
        made.append(Measurement(subject, max(0.0, *(mean["kl"].value for mean in known.values())), about))
    return made


# --- the command ------------------------------------------------------------------------------------------------------


def main(
    json_path: Path | None = None,
    *,
    model: str | None = None,
    codecs: Sequence[str] = CODECS,
    levels: Sequence[str] = (),
    documents: int | None = None,
    context_tokens: int = CONTEXT_TOKENS,
    needles: bool = True,
    save_url: str | None = None,
    figure_path: Path | None = None,
) -> bool:
    """Measure, print the tables, write what was asked for; whether every goal was met.

    model: directory or hub name; None: SmolLM2-135M-Instruct. levels: of the codecs; none: all. documents: at most so
    many of each kind of text. context_tokens: of the prompts, at most; beyond 1,024 documents are joined, kinds with
    too little text left out. save_url: root of a cache, whose bucket gets what was measured.
    """
    # wide enough for the tables where output goes to no terminal
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    ours = [coder for codec in codecs if codec != "transform" for coder in coders(codec, levels)]
    known = _load(model, console)
    if "transform" in codecs:
        from lmcache_s3.benchmarks.calibrated import calibrated_coders

        ours += calibrated_coders(known, levels, console)
    context = context_within(known, context_tokens)
    texts = _texts(known, context, documents)
    if not texts:
        raise Invalid(
            f"no kind of text is long enough for prompts of {context} tokens of {known.name}",
            kind="argument",
            key="context",
        )
    measured: list[Coder] = [*ours, _LMCACHE, Fp8()]
    results = Results(known.name, digest(texts))
    state = State.of(known, f"{results.texts}/{context}", measured)
    if state.documents:
        console.print(f"going on where a run was interrupted: {state.documents} documents are measured", markup=False)
    results.scores = score_documents(known, texts, measured, state, console, context)
    if needles:
        cachegen = cheapest(results, [coder for coder in ours if coder.codec.id == "cachegen"], CACHEGEN_KL)
        wanted = {recommended(results, ours), None if cachegen is None else cachegen[0], _LMCACHE.name}
        tried = [coder for coder in measured if coder.name in wanted]
        prose = [one.text for one in held_out() if one.kind == "prose"]
        results.needles = [find_needles(known, prose, length, tried, console) for length in NEEDLE_TOKENS]
    print_tables(results, measured, console)
    figures = figures_of(results, ours)
    if model is not None or context != CONTEXT_TOKENS:
        figures = [replace(one, goal=None) for one in figures]
    met = report_figures([f for f in figures if f.name.startswith("codec.")], console=console)
    if json_path is not None:
        about = {"model": known.name, "texts": results.texts, "context_tokens": context}
        _write(json_path, document(figures) | about | {"rows": _rows(results)})
    if figure_path is not None:
        from lmcache_s3.benchmarks.rate_distortion import draw

        draw(_rows(results), known.name, figure_path)
    if save_url is not None:
        _save(results, ours, known, save_url, console)
    state.forget()
    return met


def _rows(results: Results) -> list[dict[str, Any]]:
    return [score.row() for score in results.scores]


def _texts(model: Model, context_tokens: int, most: int | None) -> list[Document]:
    """The documents to measure on, at most so many of each kind."""
    documents = held_out()
    if context_tokens > CONTEXT_TOKENS:
        documents = joined(model, documents, context_tokens)
    return [one for kind in KINDS for one in _some(documents, kind, most)]


def _some(documents: Sequence[Document], kind: str, most: int | None) -> list[Document]:
    limit = math.inf if kind == "prose" else OTHER_KINDS_MOST
    limit = limit if most is None else min(limit, most)
    return [one for i, one in enumerate(d for d in documents if d.kind == kind) if i < limit]


def _load(model: str | None, console: Console) -> Model:
    with console.status("loading the model"):
        if model is None:
            from lmcache_s3.testing.models import smollm2

            model = str(smollm2())
        return Model(model)


def _save(results: Results, ours: Sequence[CodecCoder], model: Model, url: str, console: Console) -> None:
    from lmcache_s3.config import load_settings
    from lmcache_s3.tiers.stores.open import open_store
    from lmcache_s3.weights import weights_digest

    made = measurements(results, ours, weights_digest(model.path), model.kv_dtype)
    store = open_store(url, options=load_settings(url=url).store_options())
    try:
        for one in made:
            save(store, one)
            console.print(f"saved {store.url.rstrip('/')}/{one.subject.key}: KL {one.kl:.4f}", markup=False)
    finally:
        store.close()


def _write(path: Path, written: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    except OSError as e:
        raise Invalid(f"{path}: cannot be written ({e.strerror})", kind="argument") from e
