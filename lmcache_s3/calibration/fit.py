"""From the KV of sample prompts to transforms: mean, weighting, KLT and tables of each unit.

Reverse water-filling in nats. A small error δ of a head's vector costs about ½ δᵀ F δ of next-token KL, F its Fisher
matrix: E[g gᵀ], g the gradient of the log-likelihood of labels that the model itself draws. So values are multiplied by
√F, where all errors cost alike, and rotated by the eigenvectors of their covariance there (KLT, after KVTC), where one
step suits all coefficients. K is taken before its rotary embedding; there it is the same at all positions.

Pure (NumPy, float32 and float64); raises nothing of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmcache_s3.codecs.calibration import MAX_INVERSE, REACH, Unit
from lmcache_s3.codecs.dtypes import to_float32
from lmcache_s3.kernels.rans_tables import all_tables
from lmcache_s3.kernels.transform_turns import cos_sin
from lmcache_s3.types import KVDtype

K_STEP = 2.1
"""Steps of K ÷ steps of V: at equal Fisher-weighted steps V makes most of the KL."""
_RIDGE = 1.0
"""Of a Fisher matrix's mean eigenvalue, added to all. So much, because few gradients make up most of the matrix: on
SmolLM2 0.01 gave KL 0.0145 at 0.99 bits where 1.0 gives 0.0080 at 1.06 (K and V of a layer in a unit)."""
_EXACT_SUM = (1 << 24) - 1
_DEAD_RMS = 0.12
"""Coefficients whose root mean square, in steps, is below are not coded: nearly all of theirs round to zero."""
_REACH_TABLES = 128
_BEYOND = 1e-4
"""Of tokens that are not far out: so few may lie beyond the reach of a coefficient at the finest level."""
_TAIL = 12
"""Root mean squares that a coefficient may be away from 0 in such a share of tokens."""


@dataclass(frozen=True, slots=True)
class Box:
    """Planes × layers × heads of a KV group that are transformed as one."""

    planes: tuple[int, ...]
    layers: range
    heads: range

    def of(self, values: np.ndarray) -> np.ndarray:
        """A view of [plane, layer, token, head, channel] values."""
        planes = slice(self.planes[0], self.planes[-1] + 1)
        return values[planes, self.layers.start : self.layers.stop, :, self.heads.start : self.heads.stop]


def unrotated(values: np.ndarray, turns: np.ndarray, first_token: int = 0) -> np.ndarray:
    """A copy of float32 [plane, layer, token, head, channel] with the rotary embedding of plane 0 undone.

    turns: float64 [pair], revolutions a token of channels (j, j + pairs). The transform is orthogonal, so gradients
    turn by it too.
    """
    out = values.astype(np.float32)
    pairs = turns.size
    if pairs:
        cosine, sine = (a[None, :, None, :] for a in cos_sin(turns, first_token, values.shape[2]))
        low, high = values[0, ..., :pairs], values[0, ..., pairs : 2 * pairs]
        out[0, ..., :pairs] = low * cosine + high * sine
        out[0, ..., pairs : 2 * pairs] = high * cosine - low * sine
    return out


def rotated(values: np.ndarray, turns: np.ndarray, first_token: int) -> np.ndarray:
    """The inverse of `unrotated`."""
    out = values.copy()
    pairs = turns.size
    if pairs:
        cosine, sine = (a[None, :, None, :] for a in cos_sin(turns, first_token, values.shape[2]))
        low, high = values[0, ..., :pairs], values[0, ..., pairs : 2 * pairs]
        out[0, ..., :pairs] = low * cosine - high * sine
        out[0, ..., pairs : 2 * pairs] = high * cosine + low * sine
    return out


def fisher_sum(gradient: np.ndarray) -> np.ndarray:
    """Σ over tokens of g gᵀ, float32 [plane, layer, head, channel, channel]; gradient as `unrotated` gives it."""
    total: np.ndarray = np.einsum("pltha,plthb->plhab", gradient, gradient, optimize=True)
    return total


class Vectors:
    """The sample prompts' values of one box, token 0 of each left out: float32 [token, W] pieces, one per prompt."""

    def __init__(self, prompts: Sequence[np.ndarray], kv_dtype: KVDtype, turns: np.ndarray, box: Box) -> None:
        self._prompts, self._kv_dtype, self._turns, self._box = prompts, kv_dtype, turns, box

    def __iter__(self) -> Iterator[np.ndarray]:
        box = self._box
        for bits in self._prompts:
            values = to_float32(box.of(bits), self._kv_dtype)
            turns = self._turns if box.planes[0] == 0 else self._turns[:0]
            values = unrotated(values, turns)[:, :, 1:]
            yield values.transpose(2, 0, 1, 3, 4).reshape(values.shape[2], -1)


def moments(vectors: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(mean float64 [W], covariance float64 [W, W]), of tokens that are not far out (see `_ordinary`)."""
    count, origin, total, square = 0, np.zeros(0), np.zeros(0), np.zeros(0)
    for piece in vectors:
        x = piece[_ordinary(piece)]
        if not count:
            # near the mean: squares of K's large means would drown its small variances in float32
            origin = x.mean(0)
            total, square = np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
        x = x - origin
        count += len(x)
        total += x.sum(0, dtype=np.float64)
        square += x.T @ x
    mean = total / count
    return mean + origin, square / count - np.outer(mean, mean)


def _ordinary(x: np.ndarray) -> np.ndarray:
    """Tokens whose vector is not longer than 8 × the median: attention sinks would be all that the KLT sees."""
    length = np.linalg.norm(x - np.median(x, axis=0), axis=1)
    return np.asarray(length <= 8 * np.median(length))


def weighting(fisher: np.ndarray, box: Box, k_step: float) -> tuple[np.ndarray, np.ndarray]:
    """√F and its inverse, float64 [head vector of the box, channel, channel]. fisher: [plane, layer, head, C, C]."""
    planes = slice(box.planes[0], box.planes[-1] + 1)
    part = fisher[planes, box.layers.start : box.layers.stop, box.heads.start : box.heads.stop].astype(np.float64)
    for i, plane in enumerate(box.planes):
        if plane == 0 and fisher.shape[0] == 2:
            part[i] /= k_step**2
    channels = part.shape[-1]
    blocks = part.reshape(-1, channels, channels)
    values, vectors = np.linalg.eigh((blocks + blocks.transpose(0, 2, 1)) / 2)
    floor = _RIDGE * np.maximum(values.mean(axis=1, keepdims=True), 1e-30)
    root = np.sqrt(np.maximum(values, 0) + floor)
    return (
        np.einsum("nab,nb,ncb->nac", vectors, root, vectors),
        np.einsum("nab,nb,ncb->nac", vectors, 1 / root, vectors),
    )


@dataclass(frozen=True, slots=True)
class Transform:
    """mean: float64 [W]. forward: float64 [R, W], inverse: float64 [W, R]; variance: float64 [R], of coefficients in
    the order of what they are worth."""

    mean: np.ndarray
    forward: np.ndarray
    inverse: np.ndarray
    variance: np.ndarray


def klt(mean: np.ndarray, covariance: np.ndarray, root: np.ndarray, inverse_root: np.ndarray) -> Transform:
    """Fisher-weighted KLT of a box; root and inverse_root as `weighting` gives them."""
    weighted = _blocks_times(root, _blocks_times(root, covariance).T)
    values, vectors = np.linalg.eigh(((weighted + weighted.T) / 2).astype(np.float32))
    order = np.argsort(values)[::-1]
    u = vectors[:, order].astype(np.float64)
    return Transform(mean, _blocks_times(root, u).T, _blocks_times(inverse_root, u), np.maximum(values[order], 0))


def within_reach(transform: Transform, vectors: Iterable[np.ndarray], step: float) -> Transform:
    """The same, with steps of their own for coefficients that would be beyond reach at this one; vectors: all samples'.

    A token is kept exactly, at 16 bits a value, where one coefficient is beyond reach: on SmolLM2's finest level 8 % of
    the tokens of code for the sake of the first coefficient alone. A coarser step of a few costs next to nothing.
    """
    wide = int((_TAIL * np.sqrt(transform.variance) > REACH * step).sum())
    if not wide:
        return transform
    forward, mean = transform.forward[:wide].astype(np.float32), transform.mean.astype(np.float32)
    seen = [np.abs((piece[_ordinary(piece)] - mean) @ forward.T) for piece in vectors]
    scale = np.ones(len(transform.forward))
    scale[:wide] = np.maximum(1, np.quantile(np.concatenate(seen), 1 - _BEYOND, axis=0) / (REACH * step))
    return Transform(
        transform.mean, transform.forward / scale[:, None], transform.inverse * scale, transform.variance / scale**2
    )


def _blocks_times(blocks: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A block-diagonal symmetric matrix · matrix."""
    n, channels, _ = blocks.shape
    product: np.ndarray = np.matmul(blocks, matrix.reshape(n, channels, -1)).reshape(matrix.shape)
    return product


class Quantised(NamedTuple):
    """q: int8 [token, coefficient]. coded: bool [token]; the others are out of reach, to be kept exactly."""

    q: np.ndarray
    coded: np.ndarray


def quantised(transform: Transform, vectors: Iterable[np.ndarray], step: float, live: int) -> Iterator[Quantised]:
    """The first `live` coefficients ÷ step of each piece, rounded as the codec rounds them."""
    forward = (transform.forward[:live] / step).astype(np.float32)
    mean = transform.mean.astype(np.float32)
    for piece in vectors:
        found = np.rint((piece - mean) @ forward.T)
        coded = np.abs(found).max(axis=1) <= REACH
        yield Quantised(np.clip(found, -REACH, REACH).astype(np.int8), coded)


def histograms(pieces: Iterable[Quantised]) -> np.ndarray:
    """int64 [coefficient, 128]: how often each magnitude occurs among coded tokens."""
    total: np.ndarray | None = None
    for q, coded in pieces:
        width = q.shape[1]
        total = np.zeros((width, _REACH_TABLES), np.int64) if total is None else total
        flat = np.abs(q[coded].astype(np.int64)) + _REACH_TABLES * np.arange(width)
        total += np.bincount(flat.reshape(-1), minlength=width * _REACH_TABLES).reshape(width, _REACH_TABLES)
    assert total is not None
    return total


def best_tables(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 table, float64 bits a value) of each coefficient, by what the tables' costs promise."""
    costs = histogram @ all_tables().costs.T.astype(np.int64)
    chosen = costs.argmin(axis=1)
    bits = costs[np.arange(len(chosen)), chosen] / np.maximum(256 * histogram.sum(axis=1), 1)
    return chosen.astype(np.uint8), bits


def live_at(transform: Transform, step: float) -> int:
    """How many coefficients are worth coding at this step; at least one."""
    return max(1, int((np.sqrt(transform.variance) >= _DEAD_RMS * step).sum()))


def unit_of(box: Box, transform: Transform, tables: Sequence[np.ndarray], streams: int) -> Unit:
    """The unit of a calibration file. tables: of each level, uint8 [R_level]."""
    live = max(len(one) for one in tables)
    forward, inverse = transform.forward[:live], transform.inverse[:, :live]
    row_scale = np.abs(forward).max(axis=1, keepdims=True)
    # Sums of the rounded entries stay below the bound although each may be rounded up by a half.
    room = _EXACT_SUM / REACH - live / 2 - 1
    largest, total = np.abs(inverse).max(axis=1, keepdims=True), np.abs(inverse).sum(axis=1, keepdims=True)
    column_scale = np.minimum(MAX_INVERSE / largest, room / total)
    return Unit(
        planes=box.planes,
        first_layer=box.layers.start,
        layers=len(box.layers),
        first_head=box.heads.start,
        heads=len(box.heads),
        streams=streams,
        mean=transform.mean.astype(np.float32),
        forward=(forward / row_scale).astype(np.float16),
        forward_scale=row_scale[:, 0].astype(np.float32),
        inverse=np.rint(inverse * column_scale).astype(np.int16),
        inverse_scale=(1 / column_scale[:, 0]).astype(np.float32),
        tables=tuple(tables),
    )
