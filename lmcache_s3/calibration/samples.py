"""What calibration looks at: the KV of sample prompts, and the Fisher matrices that they show.

Files of each prompt in a directory of the user's cache, `$XDG_CACHE_HOME/lmcache-s3/calibration/<name>`, the name being
of weights, texts and this code: an interrupted calibration goes on. One process at a time uses a directory; what nobody
came back to within a week is removed when another calibration begins. A file is whole or made again.
Raises `Invalid` for texts too short, a directory that another process uses or that cannot hold what is to be kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmcache_s3.calibration.fit import fisher_sum, unrotated
from lmcache_s3.errors import Invalid
from lmcache_s3.quality.measure import CONTEXT_TOKENS, PREDICTED_TOKENS
from lmcache_s3.quality.model import Model
from lmcache_s3.quality.texts import Document
from lmcache_s3.testing.models import cache_home
from lmcache_s3.types import ITEM_BYTES, STORAGE_DTYPE

MIN_CONTEXT_TOKENS = 256
KEPT_S = 7 * 24 * 3600
"""Samples of a calibration that was interrupted are kept so long."""
_VERSION = 2
"""Raised when what is computed of a prompt changes."""
_NAME = re.compile(r"[0-9a-f]{32}", re.ASCII)
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")
_LOOKED_AT = 256
"""Values of each of a model's tensors that tell it from others."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """name: the document's. tokens: as many as the KV has; asked: what follows them."""

    name: str
    tokens: tuple[int, ...]
    asked: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """kv: per group, bits [plane, layer, token, head, channel], mapped from a file. fisher: per group,
    Σ over tokens but the first of g gᵀ, float32 [plane, layer, head, channel, channel], K's before its rotation."""

    prompt: Prompt
    kv: list[np.ndarray]
    fisher: list[np.ndarray]


def prompts_of(documents: Sequence[Document], model: Model) -> list[Prompt]:
    """Each document's beginning, and what follows it. Documents of fewer than about 400 tokens are left out."""
    made = []
    for one in documents:
        tokens = one.tokens(model)[: model.max_tokens]
        asked = min(PREDICTED_TOKENS, len(tokens) // 4)
        context = min(CONTEXT_TOKENS, len(tokens) - asked - 1)
        if context >= MIN_CONTEXT_TOKENS:
            made.append(Prompt(one.name, tuple(tokens[:context]), tuple(tokens[context : context + asked + 1])))
    if len(made) < 4:
        raise Invalid(
            f"{len(made)} texts of at least 400 tokens are too few to calibrate on: give more, 40 are good",
            kind="argument",
            key="text",
        )
    return made


class Samples:
    """Samples of these prompts, taken on demand and kept under `directory` until `forget`. One thread's."""

    def __init__(self, model: Model, turns: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> None:
        self._model, self._turns, self.prompts = model, turns, prompts
        what = repr((_VERSION, model.kv_dtype, [(p.tokens, p.asked) for p in prompts])).encode()
        name = hashlib.sha256(_fingerprint(model.module) + what).hexdigest()[:32]
        self.directory: Path = cache_home().parent / "calibration" / name
        self._release: weakref.finalize[[int], Samples] | None = None

    def take(self, done: Callable[[Prompt], None]) -> list[Sample]:
        """All of them, computing those that are not there; `done` is called behind each."""
        try:
            self._begin()
            return [self._sample(i, prompt, done) for i, prompt in enumerate(self.prompts)]
        except OSError as error:
            self._end()
            raise _no_room(self.directory, error.strerror or str(error)) from error
        except BaseException:
            self._end()
            raise

    def forget(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self._end()

    def _begin(self) -> None:
        if self._release is not None:
            return
        _remove_abandoned(self.directory.parent)
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(self.directory)
        if lock is None:
            raise Invalid(
                f"another process calibrates this model on these texts ({self.directory} is in use)", kind="argument"
            )
        self._release = weakref.finalize(self, os.close, lock)
        missing = sum(self._bytes_of(prompt) for i, prompt in enumerate(self.prompts) if self._read(i, prompt) is None)
        free = shutil.disk_usage(self.directory).free
        if missing > free:
            raise _no_room(self.directory, f"{missing / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")

    def _end(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None

    def _sample(self, i: int, prompt: Prompt, done: Callable[[Prompt], None]) -> Sample:
        sample = self._read(i, prompt)
        if sample is None:
            self._compute(i, prompt)
            sample = self._read(i, prompt)
            assert sample is not None
        done(prompt)
        return sample

    def _read(self, i: int, prompt: Prompt) -> Sample | None:
        """The files of a prompt, mapped; None where they are not all there and whole."""
        try:
            kv, fisher = (
                [np.load(self._path(i, what, group), mmap_mode="c") for group in range(len(self._turns))]
                for what in ("kv", "fisher")
            )
        except (OSError, ValueError, EOFError):
            return None
        bits = np.dtype(STORAGE_DTYPE[self._model.kv_dtype])
        for group, (kv_shape, fisher_shape) in enumerate(self._shapes(prompt)):
            if (kv[group].shape, kv[group].dtype) != (kv_shape, bits):
                return None
            if (fisher[group].shape, fisher[group].dtype) != (fisher_shape, np.dtype(np.float32)):
                return None
        return Sample(prompt, kv, fisher)

    def _shapes(self, prompt: Prompt) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Of KV and Fisher matrices of each group."""
        for one in self._model.groups:
            g = one.group
            yield (
                (g.kv, g.layers, len(prompt.tokens), g.heads, g.head_dim),
                (g.kv, g.layers, g.heads, g.head_dim, g.head_dim),
            )

    def _bytes_of(self, prompt: Prompt) -> int:
        item = ITEM_BYTES[self._model.kv_dtype]
        return sum(item * math.prod(kv) + 4 * math.prod(fisher) for kv, fisher in self._shapes(prompt))

    def _path(self, i: int, what: str, group: int) -> Path:
        return self.directory / f"{i:04d}.{what}.{group}.npy"

    def _compute(self, i: int, prompt: Prompt) -> None:
        kv = self._model.prefill(prompt.tokens)
        gradients = self._model.sampled_gradients(kv, prompt.asked[:-1], seed=i)
        for group, (bits, gradient, turns) in enumerate(zip(kv, gradients, self._turns, strict=True)):
            _write(self._path(i, "kv", group), bits)
            # Token 0 is stored exactly, and as attention's sink it would be most of the sum.
            _write(self._path(i, "fisher", group), fisher_sum(unrotated(gradient, turns)[:, :, 1:]))


def _write(path: Path, array: np.ndarray) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, array)
    os.replace(part, path)


def _fingerprint(module: Any) -> bytes:
    """Of a transformers model, whatever it is called: its configuration, its tensors' names and shapes, and some of
    their values."""
    config = {key: value for key, value in module.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        values = tensor.detach().reshape(-1)
        some = values[:: max(1, values.numel() // _LOOKED_AT)].cpu().double().numpy()
        digest.update(repr((name, tuple(tensor.shape))).encode() + some.tobytes())
    return digest.digest()


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock until it is closed; None: another process has it."""
    held = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    except OSError:
        pass  # a file system without locks
    return held


def _remove_abandoned(root: Path) -> None:
    """Samples that nobody has written to for a week, or is using."""
    with contextlib.suppress(OSError):
        for directory in root.iterdir():
            if _NAME.fullmatch(directory.name) is None or directory.stat().st_mtime > time.time() - KEPT_S:
                continue
            held = _lock(directory)
            if held is not None:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(held)


def _no_room(directory: Path, why: str) -> Invalid:
    return Invalid(
        f"samples cannot be kept in {directory} ({why}); XDG_CACHE_HOME chooses another place", kind="setting"
    )
