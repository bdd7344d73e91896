"""What calibration looks at: the KV of sample prompts, and the Fisher matrices that they show.

One file per prompt in a directory of the user's cache, named by model and texts: an interrupted calibration goes on.
A file is whole or absent. Raises `Invalid` for texts too short.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmcache_s3.calibration.fit import fisher_sum, unrotated
from lmcache_s3.errors import Invalid
from lmcache_s3.quality.measure import CONTEXT_TOKENS, PREDICTED_TOKENS
from lmcache_s3.quality.model import Model
from lmcache_s3.quality.texts import Document
from lmcache_s3.testing.models import cache_home

MIN_CONTEXT_TOKENS = 256


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
        tokens = one.tokens(model)
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
    """Samples of these prompts, taken on demand and kept under `directory` until `forget`."""

    def __init__(self, model: Model, turns: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> None:
        self._model, self._turns, self.prompts = model, turns, prompts
        digest = hashlib.sha256(repr((model.path, model.kv_dtype, [p.tokens for p in prompts])).encode())
        self.directory: Path = cache_home().parent / "calibration" / digest.hexdigest()[:32]

    def take(self, done: Callable[[Prompt], None]) -> list[Sample]:
        """All of them, computing those that are not there; `done` is called behind each."""
        self.directory.mkdir(parents=True, exist_ok=True)
        taken = []
        for i, prompt in enumerate(self.prompts):
            if not self._path(i, "fisher", len(self._turns) - 1).exists():
                self._compute(i, prompt)
            taken.append(Sample(prompt, list(self._mapped(i, "kv")), list(self._mapped(i, "fisher"))))
            done(prompt)
        return taken

    def forget(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, i: int, what: str, group: int) -> Path:
        return self.directory / f"{i:04d}.{what}.{group}.npy"

    def _mapped(self, i: int, what: str) -> Iterator[np.ndarray]:
        for group in range(len(self._turns)):
            yield np.load(self._path(i, what, group), mmap_mode="c")

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
