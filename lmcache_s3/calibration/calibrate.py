"""Calibration of codec `transform` on a model: from texts to a `Calibration` for each of its KV groups.

    prompts ─▶ KV and Fisher matrices ─▶ units' transforms ─▶ steps that keep the KL ─▶ tables ─▶ Calibration

One prompt in six is set aside: transforms and tables never see it, and the levels' KL is measured on those. What was
computed of the prompts is kept until `Calibrating.forget`, so that an interrupted calibration goes on. Not thread-safe.
Raises `Invalid` for texts too few, a cut that the model does not admit, and what `quality/model.py` raises.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lmcache_s3.calibration import fit
from lmcache_s3.calibration.fit import Box, Vectors
from lmcache_s3.calibration.levels import TARGETS, Fitted, Judge, find_step, units_of
from lmcache_s3.calibration.rotary import turns_of
from lmcache_s3.calibration.samples import Sample, Samples, prompts_of
from lmcache_s3.codecs.calibration import MAX_FILE_BYTES, Calibration, Level
from lmcache_s3.errors import Invalid
from lmcache_s3.quality.model import LayerGroup, Model
from lmcache_s3.quality.texts import Document, digest

_SET_ASIDE = 6
_FIRST_STEP = 0.002
WIDEST = 6144
"""Values a token that a unit transforms by default; its covariance takes 300 MB, its part of the file about 60 MB."""
_FILE_BYTES = 2.4
"""Of a file, for each of a token's values and each of the unit's: 4, but half of the coefficients are not coded."""
_STEP_PER_KL = 0.5
_MOST_CHANGE = 8.0
"""Of the first step, by what its KL lets expect."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How cells, and units within them, divide a group. A unit is K and V of some layers of a cell, and all its heads.

    unit_layers: layers transformed as one, at most those of a cell; None: as many as keep units within `WIDEST` values
    and the file within what is read.
    stages, head_groups: the grid of cells (pipeline stages × groups of heads); a unit stays within a cell.
    """

    unit_layers: int | None = None
    stages: int = 1
    head_groups: int = 1

    def boxes(self, group: LayerGroup) -> tuple[Box, ...]:
        """Raises `Invalid` where stages or head groups do not divide the group."""
        layers, heads, kv = group.group.layers, group.group.heads, group.group.kv
        if layers % self.stages or heads % self.head_groups:
            raise Invalid(
                f"{layers} layers of {heads} KV heads are not {self.stages} stages × {self.head_groups} head groups",
                kind="argument",
                key="stages",
            )
        in_cell, width = layers // self.stages, heads // self.head_groups
        widest = min(WIDEST, int(MAX_FILE_BYTES / (_FILE_BYTES * kv * layers * heads * group.group.head_dim)))
        most = self.unit_layers or max(1, widest // (kv * width * group.group.head_dim))
        # as even as can be: 30 layers in units of at most 16 are two of 15
        n_units = -(-in_cell // min(most, in_cell))
        edges = [round(i * in_cell / n_units) for i in range(n_units + 1)]
        return tuple(
            Box(tuple(range(kv)), range(start + a, start + b), range(head, head + width))
            for start in range(0, layers, in_cell)
            for head in range(0, heads, width)
            for a, b in itertools.pairwise(edges)
        )


class Progress(Protocol):
    """What a calibration says of itself while it runs."""

    def begin(self, stage: str, steps: int) -> None: ...

    def advance(self) -> None: ...

    def say(self, text: str) -> None:
        """For a log."""


class Calibrating:
    """One model and its texts; several cuts can be made of the same samples."""

    def __init__(self, model: Model, documents: Sequence[Document], progress: Progress) -> None:
        self._model, self._progress = model, progress
        self._texts = digest(documents)
        self._turns = turns_of(model)
        self._samples = Samples(model, self._turns, prompts_of(documents, model))

    @property
    def rotary_channels(self) -> list[int]:
        """For each group: channels whose rotation is undone."""
        return [2 * turns.size for turns in self._turns]

    def run(self, cut: Cut, about: dict[str, Any]) -> list[Calibration]:
        """A calibration for each of the model's groups. about: for people, added to what is said of texts and model."""
        model, say = self._model, self._progress
        boxes = [cut.boxes(group) for group in model.groups]
        say.begin("KV and gradients", len(self._samples.prompts))
        samples = self._samples.take(lambda _: say.advance())
        aside = [one for i, one in enumerate(samples) if i % _SET_ASIDE == 1]
        used = [one for i, one in enumerate(samples) if i % _SET_ASIDE != 1]
        say.begin("transforms", sum(len(one) for one in boxes))
        fitted = [self._fitted(i, used, boxes[i]) for i in range(len(boxes))]
        judge = Judge(model, aside, fitted)
        step = self._finest(judge)
        fitted = [self._within_reach(i, fitted[i], used, step) for i in range(len(boxes))]
        levels = self._levels(judge.of(fitted), step)
        say.begin("tables", sum(len(one) for one in boxes))
        about = {
            "model": model.name,
            "texts": self._texts,
            "prompts": len(used),
            "prompts_set_aside": len(aside),
            **about,
        }
        return [self._calibration(i, fitted[i], used, levels, about) for i in range(len(boxes))]

    def forget(self) -> None:
        """Remove what was kept of the prompts."""
        self._samples.forget()

    def _fitted(self, group: int, used: Sequence[Sample], boxes: Sequence[Box]) -> Fitted:
        tokens = sum(one.kv[group].shape[2] for one in used)
        fisher = np.zeros_like(used[0].fisher[group])
        for one in used:  # one at a time: all prompts' matrices of a large model are gigabytes
            fisher += one.fisher[group]
        fisher /= tokens
        transforms = []
        for box in boxes:
            vectors = Vectors([one.kv[group] for one in used], self._model.kv_dtype, self._turns[group], box)
            weights = fit.weighting(fisher, box, fit.K_STEP)
            transforms.append(fit.klt(*fit.moments(vectors), *weights))
            self._progress.advance()
        return Fitted(self._turns[group], tuple(boxes), tuple(transforms))

    def _finest(self, judge: Judge) -> float:
        """About the step of the finest level."""
        change: float = (min(TARGETS.values()) / max(judge.kl(_FIRST_STEP), 1e-9)) ** _STEP_PER_KL
        return _FIRST_STEP * min(_MOST_CHANGE, max(1 / _MOST_CHANGE, change))

    def _within_reach(self, group: int, fitted: Fitted, used: Sequence[Sample], step: float) -> Fitted:
        prompts = [one.kv[group] for one in used]
        transforms = [
            fit.within_reach(transform, Vectors(prompts, self._model.kv_dtype, fitted.turns, box), step)
            for box, transform in zip(fitted.boxes, fitted.transforms, strict=True)
        ]
        return replace(fitted, transforms=tuple(transforms))

    def _levels(self, judge: Judge, step: float) -> list[Level]:
        """step: the first one's, about."""
        self._progress.begin("levels", len(TARGETS))
        levels: list[Level] = []
        for name, target in TARGETS.items():

            def tried(step: float, kl: float, name: str = name) -> None:
                self._progress.say(f"level {name}: step {step:.5f} has KL {kl:.4f}")

            if levels and levels[-1].kl:
                step = levels[-1].step * (target / levels[-1].kl) ** _STEP_PER_KL
            step, kl = find_step(judge, target, step, tried)
            if levels and levels[-1].kl is not None and step < levels[-1].step:  # where KL grows by fits and starts
                step, kl = levels[-1].step, levels[-1].kl
            levels.append(Level(name, step, kl))
            self._progress.advance()
        return levels

    def _calibration(
        self, group: int, fitted: Fitted, used: Sequence[Sample], levels: Sequence[Level], about: dict[str, Any]
    ) -> Calibration:
        of = self._model.groups[group].group
        prompts = [one.kv[group] for one in used]
        steps = [one.step for one in levels]
        units, bits = units_of(fitted, prompts, self._model, steps, lambda _: self._progress.advance())
        return Calibration(
            kv_dtype=self._model.kv_dtype,
            kv=of.kv,
            layers=of.layers,
            heads=of.heads,
            head_dim=of.head_dim,
            levels=tuple(Level(one.name, one.step, one.kl, bit) for one, bit in zip(levels, bits, strict=True)),
            turns=fitted.turns,
            units=tuple(units),
            about=about,
        )
