"""Steps of a calibration's levels: the coarsest that keep the next-token KL within what the level promises.

KL is measured in the model, on prompts that neither the transform nor the tables were fitted on. Raises `Invalid` for
a model that predicts no numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lmcache_s3.calibration.fit import (
    Box,
    Transform,
    Vectors,
    best_tables,
    histograms,
    live_at,
    quantised,
    rotated,
    unit_of,
)
from lmcache_s3.calibration.samples import Sample
from lmcache_s3.codecs.calibration import Unit
from lmcache_s3.codecs.dtypes import from_float32
from lmcache_s3.errors import Invalid
from lmcache_s3.quality.measure import compare
from lmcache_s3.quality.model import KV, Model

TARGETS = {"fine": 0.004, "medium": 0.01, "coarse": 0.02}
"""level → next-token KL that it stays within, nats per token; over prompts of every kind of text that is given."""
_TRIES = 5
_MORE_TRIES = 8
"""Beyond those, where the KL is still less than half the target: the first guess was far too fine."""
_CLOSE = 0.04
"""Of the target, below it: near enough."""
_WIDTH_PER_STREAM = 1440
"""Values a token that share a stream: its states are 128 bytes a cell, about 0.3 % here at half a bit a value."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A group's boxes and their transforms. turns: of its keys."""

    turns: np.ndarray
    boxes: tuple[Box, ...]
    transforms: tuple[Transform, ...]


class Judge:
    """Holds the KV of prompts against what coding would leave of it, in the model."""

    def __init__(self, model: Model, samples: Sequence[Sample], fitted: Sequence[Fitted]) -> None:
        self._model, self._samples, self._fitted = model, samples, fitted
        self._log_p = [model.primed(s.kv).predict(s.prompt.asked[:-1]) for s in samples]

    def of(self, fitted: Sequence[Fitted]) -> Judge:
        """The same prompts, with other transforms."""
        other = copy.copy(self)
        other._fitted = fitted
        return other

    def kl(self, step: float) -> float:
        """Mean next-token KL at this step, nats per token."""
        total = 0.0
        for sample, log_p in zip(self._samples, self._log_p, strict=True):
            log_q = self._model.primed(self._coded(sample, step)).predict(sample.prompt.asked[:-1])
            total += compare(log_p, log_q, sample.prompt.asked[1:])[0]
        mean = total / len(self._samples)
        if not math.isfinite(mean):
            raise Invalid("the model predicts no numbers: it cannot be calibrated", kind="argument", key="model")
        return max(mean, 0.0)

    def _coded(self, sample: Sample, step: float) -> KV:
        made = []
        for bits, fitted in zip(sample.kv, self._fitted, strict=True):
            out = np.array(bits)
            for box, transform in zip(fitted.boxes, fitted.transforms, strict=True):
                live = live_at(transform, step)
                vectors = Vectors([bits], self._model.kv_dtype, fitted.turns, box)
                ((q, coded),) = quantised(transform, vectors, step, live)
                values = q.astype(np.float32) @ (transform.inverse[:, :live] * step).astype(np.float32).T
                values += transform.mean.astype(np.float32)
                shape = (len(values), len(box.planes), len(box.layers), len(box.heads), bits.shape[-1])
                planes = np.ascontiguousarray(values.reshape(shape).transpose(1, 2, 0, 3, 4))
                if box.planes[0] == 0:
                    planes = rotated(planes, fitted.turns, 1)
                box.of(out)[:, :, 1:][:, :, coded] = from_float32(planes[:, :, coded], self._model.kv_dtype)
            made.append(out)
        return made


def find_step(judge: Judge, target: float, guess: float, tried: Callable[[float, float], None]) -> tuple[float, float]:
    """(step, its KL), the KL within the target. KL grows about as step²: secants in logarithms, then the best seen."""
    seen: list[tuple[float, float]] = []
    step = guess
    for i in range(_TRIES + _MORE_TRIES):
        known = dict(seen).get(step)  # asked for again where the KL jumps
        kl = judge.kl(step) if known is None else known
        seen.append((step, kl))
        tried(step, kl)
        if target * (1 - _CLOSE) <= kl <= target:
            break
        step = _next(seen, target * (1 - _CLOSE / 2))
        if i + 1 >= _TRIES and max(kl for _, kl in seen) >= target / 2:
            break
    good = [one for one in seen if one[1] <= target]
    while not good:
        step /= 1.1
        kl = judge.kl(step)
        tried(step, kl)
        good = [(step, kl)] if kl <= target else []
    return max(good)


def _next(seen: Sequence[tuple[float, float]], target: float) -> float:
    """Where the KL is probably the target's, by the tries next to it."""
    near = sorted(seen, key=lambda one: abs(math.log(max(one[1], 1e-9) / target)))[:2]
    slope = 2.0
    if len(near) == 2 and near[0][0] != near[1][0]:
        (a, kl_a), (b, kl_b) = near
        slope = min(4.0, max(1.0, math.log(max(kl_a, 1e-9) / max(kl_b, 1e-9)) / math.log(a / b)))
    change: float = (target / max(near[0][1], 1e-9)) ** (1 / slope)
    return near[0][0] * min(2.0, max(0.5, change))


def units_of(
    fitted: Fitted, prompts: Sequence[np.ndarray], model: Model, steps: Sequence[float], done: Callable[[Box], None]
) -> tuple[list[Unit], list[float]]:
    """The group's units with tables for each step, and what the tables promise in bits a value at each step.

    Narrow units share a stream: the first of as many as make a stream's width opens it, the others have `streams` 0.
    """
    units, bits, width = [], np.zeros(len(steps)), 0
    for box, transform in zip(fitted.boxes, fitted.transforms, strict=True):
        tables = []
        vectors = Vectors(prompts, model.kv_dtype, fitted.turns, box)
        for i, step in enumerate(steps):
            chosen, cost = best_tables(histograms(quantised(transform, vectors, step, live_at(transform, step))))
            tables.append(chosen)
            bits[i] += cost.sum()
        opens = width == 0 or width + len(transform.mean) > _WIDTH_PER_STREAM or box.layers.start == 0
        width = len(transform.mean) + (0 if opens else width)
        streams = max(1, round(len(transform.mean) / _WIDTH_PER_STREAM)) if opens else 0
        units.append(unit_of(box, transform, tables, streams))
        done(box)
    values = sum(len(transform.mean) for transform in fitted.transforms)
    return units, [float(one) / values for one in bits]
