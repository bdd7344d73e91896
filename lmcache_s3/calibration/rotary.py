"""Which rotation a model's rotary embedding gives a group's keys, found by looking and proved by trying.

A prompt of one token repeated gives every position the same hidden state, so that the keys of a layer differ by their
rotation alone. The frequencies among the model's own buffers that undo it are the right ones; where none does (other
pairings of channels, no rotary embedding), keys are taken as they are. Raises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from lmcache_s3.calibration.fit import unrotated
from lmcache_s3.codecs.dtypes import to_float32
from lmcache_s3.quality.model import Model

_PROBE_TOKENS = 48
_PROBE_TOKEN = 5
_MOST_DEVIATION = 0.02
"""Of the keys' norm, after the rotation is undone; bfloat16's rounding makes about 0.003."""


def turns_of(model: Model) -> list[np.ndarray]:
    """For each of the model's groups: revolutions a token of channel pair (j, j + pairs), float64 [pairs]; or empty."""
    kv = model.prefill([_PROBE_TOKEN] * _PROBE_TOKENS)
    found = []
    for bits in kv:
        keys = to_float32(bits[:1], model.kv_dtype)
        tried = [one for one in _candidates(model) if 2 * one.size <= keys.shape[-1]]
        best = min(tried, key=lambda turns: _deviation(keys, turns), default=np.zeros(0))
        found.append(best if _deviation(keys, best) <= _MOST_DEVIATION else np.zeros(0))
    return found


def _candidates(model: Model) -> Iterator[np.ndarray]:
    for name, buffer in model.module.named_buffers():
        if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1:
            yield buffer.double().cpu().numpy() / (2 * math.pi)


def _deviation(keys: np.ndarray, turns: np.ndarray) -> float:
    """keys: float32 [1, layer, token, head, channel], of tokens that are all the same."""
    still = unrotated(keys, turns)
    centre = still.mean(axis=2, keepdims=True)
    return float(np.linalg.norm(still - centre) / max(float(np.linalg.norm(still)), 1e-30))
