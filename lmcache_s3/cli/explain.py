"""`lmcache-s3 explain`: why did this prompt miss? First the space (is it the same model, stored the same way?), then
the chunks (where does the prompt leave what is stored, and what became of the rest?). Reads only: the index, and for
chunks it does not hold the inbox, the kept versions and the names of objects."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcache_s3.analysis.catalog import find_space, list_spaces, tending
from lmcache_s3.analysis.traces import Fate, Trace, covered_uploads, traces
from lmcache_s3.calibration_store import calibrated_codec
from lmcache_s3.cli.common import Cli, table
from lmcache_s3.cli.units import time_text
from lmcache_s3.errors import Invalid
from lmcache_s3.fidelity import measured_codec
from lmcache_s3.identity import Space, prefix_hashes
from lmcache_s3.types import ChunkRef, Grid
from lmcache_s3.weights import model_config, weights_digest

_FATES = {
    Fate.WAITING: "not yet visible, handed over",
    Fate.UPLOADED: "not yet visible, uploaded",
    Fate.EVICTED: "evicted",
    Fate.VOID: "void",
    Fate.GONE: "evicted or void",
    Fate.NEVER: "never stored",
}
_MAX_TOKENS_FILE_BYTES = 256 << 20


def explain(
    cli: Cli,
    model: Annotated[str | None, typer.Option(help="Hub name or directory of the model, as the engine has it.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt's text, as the tokenizer gets it.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the prompt's text.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="File of token ids: a JSON list, or numbers and spaces.")] = None,
    salt: Annotated[str, typer.Option(help="The request's cache_salt.")] = "",
    space: Annotated[str | None, typer.Option(help="Look in this space only (its id or the start of it).")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="The engine's KV data type; default: the model's.")] = None,
) -> None:
    """Say why a prompt is not, or only partly, answered from the cache."""
    candidates, comparison = _candidates(cli, model, space, kv_dtype)
    ids = _token_ids(model, prompt, prompt_file, tokens)
    answers = [] if ids is None else [_look(cli, one, ids, salt) for one in candidates]
    verdict = _verdict(comparison, answers, candidates, ids, salt)
    document = {"url": cli.store.url, "verdict": verdict, "spaces": comparison, "prompts": answers}
    shown: list[Any] = [_space_table(comparison)] if comparison else []
    for answer in answers:
        shown += ["", f"[bold]space {answer['space'][:16]}[/bold]: {answer['tokens']} tokens", _chunk_table(answer)]
    cli.emit(document, *shown, "", *verdict)


# --- which space ------------------------------------------------------------------------------------------------------


def _candidates(
    cli: Cli, model: str | None, wanted: str | None, kv_dtype: str | None
) -> tuple[list[Space], list[dict[str, Any]]]:
    """Spaces worth looking in, and how each space compares with what the engine would use."""
    if wanted is None and model is None:
        wanted = _only_space(cli)
        if wanted is None:
            return [], []
    if wanted is not None:
        found = find_space(cli.store, wanted)
        return [found], [{"space": found.id, "model": found.model, "differs": None}]
    assert model is not None
    expected = _expected(cli, model, kv_dtype)
    comparison = []
    same_weights = []
    for entry in list_spaces(cli.store):
        if entry.space is None:
            comparison.append({"space": entry.id, "model": "", "differs": [entry.problem]})
            continue
        identity = entry.space.identity()
        differs = [
            f"{key}: {_short(identity[key])} there, {_short(value)} here"
            for key, value in expected.items()
            if identity[key] != value
        ]
        comparison.append({"space": entry.id, "model": entry.space.model, "differs": differs})
        if entry.space.weights == expected["weights"]:
            same_weights.append(entry.space)
    exact = [s for s in same_weights if not next(c for c in comparison if c["space"] == s.id)["differs"]]
    return exact or same_weights, comparison


def _only_space(cli: Cli) -> str | None:
    """The space that is meant where nothing was said: there is but one. None: there is none. Raises `Invalid`."""
    ids = [entry.id for entry in list_spaces(cli.store)]
    if len(ids) > 1:
        raise Invalid(
            f"{cli.store.url} holds {len(ids)} spaces: give --model PATH, or --space ID as lmcache-s3 ls shows it",
            kind="argument",
        )
    return ids[0] if ids else None


def _expected(cli: Cli, model: str, kv_dtype: str | None) -> dict[str, Any]:
    """The identity's fields as far as they can be told without an engine."""
    settings = cli.settings
    weights = settings.weights_digest or weights_digest(model)
    config = model_config(model)
    dtype = kv_dtype or config.get("dtype") or config.get("torch_dtype")
    expected: dict[str, Any] = {"weights": weights, "chunk_tokens": settings.chunk_tokens}
    if isinstance(dtype, str):
        expected["kv_dtype"] = dtype.removeprefix("torch.")
    dtype_known = expected.get("kv_dtype", "bfloat16")
    codec = calibrated_codec(
        cli.store, settings.make_codec(), weights=weights, kv_dtype=dtype_known, geometry=None, grid=Grid()
    )
    _, expected["fidelity"] = measured_codec(
        cli.store,
        codec,
        settings.max_kl,
        weights=weights,
        kv_dtype=dtype_known,
        chunk_tokens=settings.chunk_tokens,
    )
    return expected


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


# --- which chunks -----------------------------------------------------------------------------------------------------


def _token_ids(
    model: str | None, prompt: str | None, prompt_file: Path | None, tokens: Path | None
) -> list[int] | None:
    given = [x for x in (prompt, prompt_file, tokens) if x is not None]
    if len(given) > 1:
        raise Invalid("give one of --prompt, --prompt-file and --tokens", kind="argument")
    if tokens is not None:
        return _read_tokens(tokens)
    if not given:
        return None
    text = prompt if prompt is not None else _read_text(prompt_file) if prompt_file else ""
    if model is None:
        raise Invalid("a prompt's text needs --model for its tokenizer; or give --tokens FILE", kind="argument")
    return _tokenize(model, text)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TOKENS_FILE_BYTES:
            raise Invalid(f"{path}: more than {_MAX_TOKENS_FILE_BYTES} bytes are no prompt", kind="argument")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise Invalid(f"{path}: cannot be read ({e})", kind="argument") from e


def _read_tokens(path: Path) -> list[int]:
    text = _read_text(path).strip()
    try:
        ids = json.loads(text) if text.startswith("[") else [int(word) for word in text.replace(",", " ").split()]
    except (ValueError, RecursionError) as e:
        raise Invalid(f"{path}: no list of token ids ({e})", kind="argument") from e
    if not all(type(i) is int and 0 <= i < 1 << 32 for i in ids):
        raise Invalid(f"{path}: no list of token ids (each a whole number from 0 to {(1 << 32) - 1})", kind="argument")
    return list(ids)


def _tokenize(model: str, text: str) -> list[int]:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as e:
        raise Invalid(
            "a prompt's text needs transformers; pip install it, or give --tokens FILE", kind="argument"
        ) from e
    try:
        return list(AutoTokenizer.from_pretrained(model, local_files_only=True).encode(text))
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise Invalid(f"model {model!r}: no tokenizer there ({reason}); give --tokens FILE", kind="argument") from e


def _look(cli: Cli, space: Space, ids: list[int], salt: str) -> dict[str, Any]:
    """Every full chunk of the prompt: is it stored, where, and does the match reach it?"""
    hashes = prefix_hashes(space.id, ids, space.chunk_tokens, salt=salt)
    with ThreadPoolExecutor(cli.settings.io_threads, "lmcache-s3-read") as readers:
        log = tending(cli.store, space, readers)
        state = log.state
        matched: list[ChunkRef | None] = list(log.replica.match(hashes))
        found = matched + [log.replica.find(h) for h in hashes[len(matched) :]]
        missing = [h for h, ref in zip(hashes, found, strict=True) if ref is None]
        fates = traces(cli.store, space.id, state, missing, readers)
        covered = covered_uploads(cli.store, space.id, state, hashes[-1]) if hashes and not missing else []
    chunks = [
        {
            "chunk": i,
            "tokens": [i * space.chunk_tokens, (i + 1) * space.chunk_tokens],
            "prefix_hash": h.hex(),
            "extent": str(ref.extent.name) if ref else None,
            "position": ref.position if ref else None,
            "matched": i < len(matched),
            "missing": _trace(fates[h]) if ref is None else None,
        }
        for i, (h, ref) in enumerate(zip(hashes, found, strict=True))
    ]
    return {
        "space": space.id,
        "tokens": len(ids),
        "chunk_tokens": space.chunk_tokens,
        "matched_chunks": len(matched),
        "matched_tokens": len(matched) * space.chunk_tokens,
        "space_chunks": state.n_chunks,
        "covered": [str(name) for name in covered],
        "chunks": chunks,
    }


def _trace(trace: Trace) -> dict[str, Any]:
    return {
        "fate": trace.fate.value,
        "extent": None if trace.extent is None else str(trace.extent),
        "version": trace.version,
        "since": None if trace.since_s is None else time_text(trace.since_s),
    }


# --- in words ---------------------------------------------------------------------------------------------------------


def _verdict(
    comparison: list[dict[str, Any]],
    answers: list[dict[str, Any]],
    candidates: list[Space],
    ids: list[int] | None,
    salt: str,
) -> list[str]:
    if not comparison:
        return ["nothing is cached under this URL yet: no engine has stored anything here"]
    lines = []
    if not candidates:
        lines.append("no space holds these weights: the engines that stored ran another model, or changed weights")
    elif all(c["differs"] for c in comparison if c["space"] in {s.id for s in candidates}):
        fields = sorted(
            {d.partition(":")[0] for c in comparison for d in c["differs"] if c["space"] == candidates[0].id}
        )
        lines.append(
            f"the weights are the same, but stored differently ({', '.join(fields)}): such engines share nothing. If "
            "the engine's settings are not those of this command, give them by --settings-file or LMCACHE_S3_…"
        )
    if ids is None:
        return lines or ["the space is there; give a prompt to see which of its chunks are"]
    return lines + [_answer_text(answer, salt) for answer in answers]


def _answer_text(answer: dict[str, Any], salt: str) -> str:
    n, size, matched = answer["tokens"], answer["chunk_tokens"], answer["matched_chunks"]
    full = len(answer["chunks"])
    where = f"space {answer['space'][:16]}: "
    if full == 0:
        return f"{where}{n} tokens are shorter than a chunk ({size}): such prompts are never cached"
    if matched == full:
        rest = n - full * size
        tail = f"; the last {rest} do not fill a chunk" if rest else ""
        twice = f"; {len(answer['covered'])} more uploads of it are covered by these, and wait for gc"
        return f"{where}a hit: {matched * size} of {n} tokens are cached{tail}" + (twice if answer["covered"] else "")
    told = _fate_text(answer["chunks"][matched])
    later = [c["chunk"] for c in answer["chunks"] if c["extent"] and not c["matched"]]
    if told is not None or later:
        there = f"; chunk {later[0]} is there, but out of reach" if later else ""
        return (
            f"{where}{matched} of {full} chunks match; chunk {matched} {told or 'is gone or was never stored'}{there}; "
            f"it is stored again when an engine computes it"
        )
    if matched:
        start = matched * size
        return (
            f"{where}{matched} of {full} chunks match; the prompt leaves everything stored within tokens "
            f"{start} to {start + size - 1}: text differs there, or nobody stored it that far"
        )
    if answer["space_chunks"] == 0:
        return f"{where}the space is empty: engines opened it, but stored nothing yet"
    return (
        f"{where}not even the first chunk matches: a token differs among the first {size} (a begin-of-text token? "
        f"another chat template or system prompt?), another cache_salt ({'the one given' if salt else 'none given'}), "
        f"an adapter (LoRA), or it was never stored"
    )


def _fate_text(chunk: dict[str, Any]) -> str | None:
    """What became of the first chunk that misses; None: there is no trace of it."""
    trace = chunk["missing"]
    since, extent = trace["since"], trace["extent"]
    return {
        Fate.WAITING: f"is not yet visible: handed over at {since}, the leader merges it within seconds",
        Fate.UPLOADED: f"is not yet visible: uploaded at {since} as {extent}, but not committed (under way, or its "
        "writer died; then gc deletes it)",
        Fate.EVICTED: f"was evicted: version {trace['version']} removed {extent} at {since}",
        Fate.VOID: f"is void: {extent} was uploaded, but not committed within the grace",
        Fate.GONE: f"is gone: {extent} lies there, but was removed, or not committed within the grace",
        Fate.NEVER: None,
    }[Fate(trace["fate"])]


def _space_table(rows: list[dict[str, Any]]) -> Any:
    made = table("space", "model", "compared with this engine")
    for r in rows:
        made.add_row(r["space"][:16], r["model"] or "–", _difference_text(r["differs"]))
    return made


def _difference_text(differs: list[str] | None) -> str:
    if differs is None:
        return "not compared"
    return "; ".join(differs) or "[green]the same[/green]"


def _chunk_table(answer: dict[str, Any]) -> Any:
    """Runs of chunks in one extent, a line each."""
    made = table("chunks", "tokens", "", "extent")
    runs: list[list[dict[str, Any]]] = []
    for c in answer["chunks"]:
        if runs and _kind(runs[-1][-1]) == _kind(c):
            runs[-1].append(c)
        else:
            runs.append([c])
    for run in runs:
        first, last = run[0], run[-1]
        state = "[green]hit[/green]" if first["matched"] else "out of reach"
        if first["missing"]:
            state = f"[red]missing[/red]: {_FATES[Fate(first['missing']['fate'])]}"
        made.add_row(
            f"{first['chunk']} to {last['chunk']}", f"{first['tokens'][0]} to {last['tokens'][1] - 1}", state,
            first["extent"] or first["missing"]["extent"] or "–",
        )  # fmt: skip
    return made


def _kind(chunk: dict[str, Any]) -> tuple[object, ...]:
    """Chunks of one kind, one after another, make a line."""
    missing = chunk["missing"] or {}
    return (chunk["extent"], chunk["matched"], missing.get("fate"), missing.get("extent"))
