"""The digest of a model's weights and config: what it *is*, whatever it is called and wherever it lies.

SHA-256 over the sorted SHA-256s (32 bytes each) of the weight files and config.json. The hub's cache names large files
by their SHA-256 already; everything else is hashed here, in parallel, and remembered by path, size and modification
time in a small file of the user's cache directory (lost or unwritable: only slower).

Blocks for as long as reading the weights takes: call it from a thread of its own. Raises `Invalid` if the model cannot
be found or read, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lmcache_s3.errors import Invalid

_FORMAT = 1
_MAX_REMEMBERED = 4096
_MAX_MEMORY_BYTES = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?", re.ASCII)
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf")
_HASH_THREADS = 8


def weights_digest(
    model: str, *, revision: str | None = None, cache_path: Path | None = None, every_format: bool = False
) -> str:
    """64 hex digits for a hub name (in the local hub cache), a directory, or a single .gguf file.

    Weight files are the *.safetensors (adapters aside) if there are any, else *.bin, *.pt, *.pth, *.gguf: what engines
    load when left alone. every_format: all of them, for an engine that was told to load something else. revision: of a
    hub name. cache_path: where digests are remembered; default `$XDG_CACHE_HOME/lmcache-s3/weights.json`.
    """
    path = _locate(model, revision)
    if path.is_dir():
        files = _files(model, path, every_format)
    elif path.suffix == ".gguf":
        files = [path]
    else:
        raise _cannot_find(model, "it is a file, but no .gguf")
    memory = cache_path or _default_memory()
    try:
        return _combine(files, memory)
    except OSError as e:
        raise _cannot_find(model, f"{e.filename or 'a weight file'} cannot be read ({e.strerror or e})") from e


def adapter_digest(path: str, *, cache_path: Path | None = None) -> str:
    """64 hex digits for a LoRA adapter's directory: its `adapter_config.json` and `adapter_*` weight files."""
    directory = Path(path).expanduser()
    config = directory / "adapter_config.json"
    try:
        weights = sorted(p for p in directory.glob("adapter_*") if p.suffix in (".safetensors", *_OTHER_FORMATS))
        if not weights or not config.is_file():
            raise _cannot_find(path, "no adapter_config.json with adapter_* weights there")
        return _combine([*weights, config], cache_path or _default_memory())
    except OSError as e:
        raise _cannot_find(path, f"{e.filename or 'an adapter file'} cannot be read ({e.strerror or e})") from e


def model_config(model: str, *, revision: str | None = None) -> dict[str, Any]:
    """The model's config.json; empty where there is none. Raises `Invalid` if the model or its config is not there or
    not JSON."""
    path = _locate(model, revision) / "config.json"
    try:
        document = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as e:
        raise _cannot_find(model, f"config.json cannot be read ({e})") from e
    return document if isinstance(document, dict) else {}


def is_hub_name(model: str) -> bool:
    """Whether it reads like one; what does not can only be a path."""
    return _HUB_NAME.fullmatch(model) is not None


def _locate(model: str, revision: str | None) -> Path:
    path = Path(model).expanduser()
    return path if path.exists() else _hub_snapshot(model, revision)


def _cannot_find(model: str, why: str) -> Invalid:
    return Invalid(f"model {model!r}: {why}", kind="argument", key="model")


def _files(model: str, directory: Path, every_format: bool) -> list[Path]:
    inside = sorted(p for p in directory.iterdir() if not p.is_dir())
    safetensors = [p for p in inside if p.suffix == ".safetensors" and not p.name.startswith("adapter_")]
    others = [p for p in inside if p.suffix in _OTHER_FORMATS and not p.name.startswith("adapter_")]
    weights = safetensors + others if every_format else safetensors or others
    if not weights:
        raise _cannot_find(model, f"no weights (*.safetensors, *.bin, *.pt, *.gguf) in {directory}")
    # params.json is what models in Mistral's own format have instead.
    config = next((p for p in (directory / "config.json", directory / "params.json") if p.is_file()), None)
    if config is None and any(p.suffix != ".gguf" for p in weights):
        raise _cannot_find(model, f"no config.json in {directory}")
    return weights + ([config] if config else [])


def _hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(environ[name]).expanduser()
    cache_home = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or os.path.join(cache_home, "huggingface")
    return Path(home).expanduser() / "hub"


def _hub_snapshot(model: str, revision: str | None) -> Path:
    """The snapshot directory of a hub name in the local cache; nothing is downloaded."""
    if not is_hub_name(model):
        raise _cannot_find(model, "no such directory")
    repo = _hub_cache() / f"models--{model.replace('/', '--')}"
    if not repo.is_dir():
        raise _cannot_find(model, f"no such directory, and not in the hub cache {repo.parent} (hf download {model})")
    wanted = revision or "main"
    if _COMMIT.fullmatch(wanted):
        commit = wanted
    else:
        ref = repo / "refs" / wanted
        try:
            commit = ref.read_text("utf-8").strip()
        except OSError as e:
            found = sorted(p.name for p in (repo / "snapshots").glob("*") if p.is_dir())
            if revision is not None or len(found) != 1:
                raise _cannot_find(model, f"revision {wanted!r} is not in the hub cache {repo}") from e
            commit = found[0]
    snapshot = repo / "snapshots" / commit
    if not snapshot.is_dir():
        raise _cannot_find(model, f"revision {wanted!r} is not in the hub cache {repo}")
    return snapshot


def _sha_in_name(path: Path) -> str | None:
    """The SHA-256 by which the hub cache names an LFS file; None for small files (named by git's SHA-1) and others."""
    if not path.is_symlink():
        return None
    blob = path.resolve()
    if blob.parent.name == "blobs" and (blob.parent.parent / "snapshots").is_dir() and _SHA256.fullmatch(blob.name):
        return blob.name
    return None


def _hash_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _combine(files: list[Path], memory_path: Path) -> str:
    memory = _recall(memory_path)
    digests: list[str] = []
    unknown: list[tuple[Path, str, tuple[int, int]]] = []
    for path in files:
        named = None if path.suffix == ".json" else _sha_in_name(path)
        real = path.resolve()
        stat = real.stat()  # also of named blobs: a dangling link is an error
        stamp = (stat.st_size, stat.st_mtime_ns)
        if named is None and path.suffix != ".json":
            size, mtime_ns, named = memory.get(str(real), (-1, -1, None))
            if (size, mtime_ns) != stamp:
                named = None
        if named is None:
            unknown.append((path, str(real), stamp))
        else:
            digests.append(named)
    with ThreadPoolExecutor(max_workers=_HASH_THREADS, thread_name_prefix="lmcache-s3-weights") as pool:
        computed = list(pool.map(lambda item: _hash_file(item[0]), unknown))
    for (path, real_path, stamp), digest in zip(unknown, computed, strict=True):
        stat = os.stat(real_path)
        if (stat.st_size, stat.st_mtime_ns) != stamp:
            raise Invalid(f"model: {path} changed while it was read; wait until it is written", kind="argument")
        digests.append(digest)
        if path.suffix != ".json":
            memory[real_path] = (*stamp, digest)
    if any(path.suffix != ".json" for path, _, _ in unknown):
        _remember(memory_path, memory)
    return hashlib.sha256(b"".join(sorted(bytes.fromhex(d) for d in digests))).hexdigest()


def _default_memory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "lmcache-s3" / "weights.json"


def _recall(path: Path) -> dict[str, tuple[int, int, str | None]]:
    """What is remembered; a missing, damaged or foreign file is an empty memory."""
    try:
        if path.stat().st_size > _MAX_MEMORY_BYTES:
            return {}
        document = json.loads(path.read_bytes())
        if document["format"] != _FORMAT:
            return {}
        return {
            str(file): (int(size), int(mtime_ns), str(digest))
            for file, (size, mtime_ns, digest) in document["files"].items()
            if _SHA256.fullmatch(str(digest))
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _remember(path: Path, memory: Mapping[str, tuple[int, int, str | None]]) -> None:
    """Replace the memory at once; two processes at it lose an entry at worst, never the file."""
    newest = list(memory.items())[-_MAX_REMEMBERED:]
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as f:
            json.dump({"format": _FORMAT, "files": {k: list(v) for k, v in newest}}, f)
        os.replace(temporary, path)
    except OSError:
        # A read-only home: we only forget.
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
