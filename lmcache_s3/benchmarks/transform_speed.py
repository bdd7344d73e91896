"""A calibration for measuring how fast codec `transform` is: a plain KLT of each layer, of the very KV measured.

It takes as long as a real one at the same bits a value, but is not weighted by what errors cost, so it says nothing of
quality: `lmcache-s3 calibrate` does. Pure but for registering what it made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lmcache_s3.calibration.fit import (
    Box,
    Transform,
    Vectors,
    best_tables,
    histograms,
    klt,
    live_at,
    moments,
    quantised,
    unit_of,
)
from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.codecs.calibration import Calibration, Level
from lmcache_s3.codecs.registry import make_codec

_LAYERS_A_STREAM = 4
_TRIED = 8
"""Boxes that the step is chosen by."""


def rotary_turns(theta: float, channels: int) -> np.ndarray:
    """Revolutions a token of a rotary embedding over all channels, float64 [channels ÷ 2]."""
    return np.asarray(theta ** (-2 * np.arange(channels // 2) / channels) / (2 * math.pi))


def layerwise_codec(prompts: Sequence[np.ndarray], turns: np.ndarray, bits: float) -> KVCodec:
    """The codec at about so many bits a value. prompts: bfloat16 bits, u16 [plane, layer, token, head, channel] from
    token 0 on. turns: of the model's keys."""
    kv, layers, _, heads, channels = prompts[0].shape
    boxes = [Box(tuple(range(kv)), range(layer, layer + 1), range(heads)) for layer in range(layers)]
    transforms = [_fitted(prompts, turns, box) for box in boxes]
    every = len(boxes) // _TRIED or 1
    step = _step_for(bits, prompts, turns, boxes[::every], transforms[::every])
    units = []
    for i, (box, transform) in enumerate(zip(boxes, transforms, strict=True)):
        tables, _ = _tables(prompts, turns, box, transform, step)
        units.append(unit_of(box, transform, [tables], streams=int(i % _LAYERS_A_STREAM == 0)))
    made = Calibration(
        "bfloat16", kv, layers, heads, channels, (Level("measured", step),), turns, tuple(units), {"made": "for speed"}
    )
    return make_codec("transform", {"level": "measured", "calibration": calibrations.register(made)})


def _vectors(prompts: Sequence[np.ndarray], turns: np.ndarray, box: Box) -> Vectors:
    return Vectors(prompts, "bfloat16", turns, box)


def _fitted(prompts: Sequence[np.ndarray], turns: np.ndarray, box: Box) -> Transform:
    mean, covariance = moments(_vectors(prompts, turns, box))
    channels = prompts[0].shape[-1]
    # Each head's K and V scaled to a variance of 1: errors of all cost the same share of it.
    spread = np.sqrt(np.diag(covariance).reshape(-1, channels).mean(axis=1))[:, None, None]
    return klt(mean, covariance, np.eye(channels) / spread, np.eye(channels) * spread)


def _tables(
    prompts: Sequence[np.ndarray], turns: np.ndarray, box: Box, transform: Transform, step: float
) -> tuple[np.ndarray, float]:
    """(tables of the coefficients that are coded, bits a value)."""
    live = live_at(transform, step)
    counted = histograms(quantised(transform, _vectors(prompts, turns, box), step, live))
    tables, bits = best_tables(counted)
    return tables, float(bits.sum()) / len(transform.mean)


def _step_for(
    bits: float, prompts: Sequence[np.ndarray], turns: np.ndarray, boxes: Sequence[Box], transforms: Sequence[Transform]
) -> float:
    low, high = 2.0**-6, 2.0**6
    for _ in range(10):
        step = math.sqrt(low * high)
        taken = [_tables(prompts, turns, b, t, step)[1] for b, t in zip(boxes, transforms, strict=True)]
        low, high = (step, high) if sum(taken) / len(taken) > bits else (low, step)
    return math.sqrt(low * high)
