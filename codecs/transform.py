"""Codec `transform`: a linear transform fitted to the model, quantised and entropy-coded; lossy, and calibrated.

Keys are turned back by their rotary position, an offline mean is taken off, and the values of a *unit* (layers × heads
of K, V or both) become coefficients that are nearly independent and of which one global step costs the model about the
same each. Transform, tables and units come from a calibration (`calibration.py`), which each cell names: a codec made
with defaults decodes every cell whose calibration `calibrations.py` can find. FORMAT.md §7.3.

What is exact: token 0 of the prompt, which attention leans on most, and a token in a unit where a coefficient is out of
reach or not finite. A cell that would not become smaller is stored raw. Decoding gives the same bits on every machine;
encoding depends on how the machine rounds its sums. Raises `Unusable` (header's kinds, payload, calibration) when
decoding, `Unavailable` where a bucket with the calibration does not answer, `Invalid` for arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.arrays import check_array, contiguous, raw_bytes, storage_dtype
from lmcache_s3.codecs.base import JSON, CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.calibration import REACH, Calibration, Unit
from lmcache_s3.codecs.header import HEADER_BYTES, said_position, unwrap, wrap
from lmcache_s3.codecs.transform_layout import Layout, Placed, layout_of
from lmcache_s3.codecs.transform_payload import (
    FIXED_BYTES,
    RAW,
    Coded,
    Fixed,
    Parts,
    put_together,
    read_fixed,
    read_sections,
)
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.types import Buffer

if TYPE_CHECKING:
    from lmcache_s3.kernels.transform_values import Rotation

_LEVEL = re.compile(r"[a-z0-9_]{1,32}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


class TransformCodec(KVCodec):
    """level: one of the calibration's. calibration: its digest, 64 hex digits; empty: it can only decode."""

    id: ClassVar[str] = "transform"
    exact: ClassVar[bool] = False

    def __init__(self, level: str = "medium", calibration: str = "") -> None:
        if not isinstance(level, str) or _LEVEL.fullmatch(level) is None:
            raise Invalid(f"codec level {level!r} is no name", kind="setting", key="codec_level")
        if not isinstance(calibration, str) or (calibration and _DIGEST.fullmatch(calibration) is None):
            raise Invalid(
                f"calibration {str(calibration)[:80]!r} is not 64 hex digits", kind="setting", key="codec_calibration"
            )
        self._level, self._digest = level, calibration

    @property
    def config(self) -> Mapping[str, JSON]:
        return {"level": self._level, "calibration": self._digest}

    @property
    def level(self) -> str:
        return f"{self._level}-{self._digest[:8]}" if self._digest else self._level

    @property
    def measured_kl(self) -> float | None:
        """What was said with `measured`, else what the calibration says of the level, once it is loaded."""
        if self._measured_kl is not None or not self._digest:
            return self._measured_kl
        known = calibrations.known(self._digest)
        level = known.level(self._level) if known is not None else None
        return level.kl if level is not None else None

    def max_encoded_bytes(self, spec: CellSpec) -> int:
        return HEADER_BYTES + FIXED_BYTES + raw_bytes(spec)

    # --- encoding

    def encode(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> bytes:
        check_array(cell, spec, what="cell")
        if not self._digest:
            raise Invalid(
                "codec transform was made without a calibration and can only decode: name one (codec_calibration)",
                kind="setting",
                key="codec_calibration",
            )
        calibration = calibrations.find(self._digest)
        level = [one.name for one in calibration.levels].index(self._known_level(calibration))
        layout = layout_of(calibration, spec, position)
        if isinstance(layout, str):
            raise Invalid(layout, kind="argument")
        payload = _coded(calibration, layout, level, cell, spec, position.first_token)
        if payload is None or len(payload) >= FIXED_BYTES + raw_bytes(spec):
            payload = Fixed(RAW, level, self._digest).pack(spec.kv_dtype) + contiguous(cell, spec).tobytes()
        return wrap(payload, spec, position)

    def _known_level(self, calibration: Calibration) -> str:
        if calibration.level(self._level) is None:
            names = ", ".join(level.name for level in calibration.levels)
            raise Invalid(
                f"codec level {self._level!r}: calibration {self._digest[:12]}… has {names}",
                kind="setting",
                key="codec_level",
            )
        return self._level

    # --- decoding

    def decode(self, data: Buffer, spec: CellSpec, position: CellPosition | None, out: np.ndarray) -> None:
        check_array(out, spec, what="out")
        read = read_cell(data, spec, position)
        if isinstance(read, Cell):
            _decode(read, spec, out)
        else:
            np.copyto(out, read)


class Cell(NamedTuple):
    """A stored cell that is coded, read. level: index. first_token: position in the prompt."""

    calibration: Calibration
    layout: Layout
    level: int
    parts: Parts
    first_token: int


def read_cell(data: Buffer, spec: CellSpec, position: CellPosition | None) -> Cell | np.ndarray:
    """A stored cell after everything was checked but whether its streams are whole; a raw one's bits, read-only.

    Raises as `TransformCodec.decode`.
    """
    payload = unwrap(data, spec, position, max_bytes=HEADER_BYTES + FIXED_BYTES + raw_bytes(spec))
    position = said_position(data)
    fixed, body = read_fixed(payload, spec)
    if fixed.mode == RAW:
        return np.frombuffer(body, storage_dtype(spec)).reshape(spec.shape)
    calibration = calibrations.find(fixed.calibration)
    layout = layout_of(calibration, spec, position)
    if isinstance(layout, str):
        raise Unusable(layout, kind="calibration")
    if fixed.level >= len(calibration.levels):
        raise Unusable(f"transform level {fixed.level} of {len(calibration.levels)}", kind="payload")
    parts = read_sections(body, fixed, layout, spec, position.first_token == 0)
    return Cell(calibration, layout, fixed.level, parts, position.first_token)


def rotation(calibration: Calibration, first_token: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, sine) of keys at these positions, float32 [token, pair]."""
    from lmcache_s3.kernels.transform_turns import cos_sin

    return cos_sin(calibration.turns, first_token, tokens)


def _coefficients(
    placed: Placed, cell: np.ndarray, spec: CellSpec, turns: tuple[np.ndarray, np.ndarray], level: int, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """(bool [token]: values are finite, coefficients within reach; those, float32 [coefficient, token])."""
    from lmcache_s3.codecs.dtypes import to_float32  # numba and ml_dtypes only where they are needed
    from lmcache_s3.kernels.transform_values import centre

    unit, tokens = placed.unit, spec.shape[2]
    values = to_float32(placed.box(cell).transpose(2, 0, 1, 3, 4), spec.kv_dtype).reshape(-1)
    coded = np.empty(tokens, np.bool_)
    centre(values, unit.mean, unit.mean.size // unit.vectors, _rotation_of(unit, turns), coded)
    n = unit.tables[level].size
    found: np.ndarray = np.matmul(unit.forward[:n].astype(np.float32), values.reshape(tokens, -1).T)
    found *= (unit.forward_scale[:n] / np.float32(step))[:, None]
    np.rint(found, out=found)
    # A comparison with NaN is false.
    coded &= (found.max(axis=0, initial=0.0) <= REACH) & (found.min(axis=0, initial=0.0) >= -REACH)
    return coded, found


def _rotation_of(unit: Unit, turns: tuple[np.ndarray, np.ndarray]) -> Rotation:
    """For the kernels; turns: of the cell's tokens."""
    from lmcache_s3.kernels.transform_values import Rotation

    pairs = turns[0].shape[1]
    turned = unit.layers * unit.heads if pairs and unit.planes[0] == 0 else 0
    return Rotation(turns[0].reshape(-1), turns[1].reshape(-1), pairs, turned)


def _coded(
    calibration: Calibration, layout: Layout, level: int, cell: np.ndarray, spec: CellSpec, first_token: int
) -> bytes | None:
    """The payload of mode 1; None where it would not be smaller than the raw cell."""
    from lmcache_s3.kernels.rans_tables import all_tables
    from lmcache_s3.kernels.transform_streams import encode_unit, idle_states

    tokens = spec.shape[2]
    step = calibration.levels[level].step
    turns = rotation(calibration, first_token, tokens)
    exact = np.zeros((len(layout.units), tokens), bool)
    exact[:, : int(first_token == 0)] = True
    quantised: list[np.ndarray] = []
    for u, placed in enumerate(layout.units):
        with np.errstate(all="ignore"):  # what is not finite is kept as it is
            within, q = _coefficients(placed, cell, spec, turns, level, step)
        exact[u] |= ~within
        kept = q[:, ~exact[u]] if exact[u].any() else q
        padded = np.zeros((kept.shape[0], kept.shape[1] + 2 - kept.shape[1] % 2), np.int8)
        padded[:, : kept.shape[1]] = kept
        quantised.append(padded)
    bits = _exact_bits(layout, cell, spec, exact)
    if len(bits) >= raw_bytes(spec):
        return None
    room = sum(q.size for q in quantised)
    words, escapes = np.empty(room, np.uint16), np.empty(room, np.int8)
    place = escape_place = room
    states = idle_states(layout.streams)
    starts, escape_starts = np.empty(layout.streams + 1, np.int64), np.empty(layout.streams + 1, np.int64)
    starts[-1] = escape_starts[-1] = room
    for u in reversed(range(len(layout.units))):
        placed = layout.units[u]
        place, escape_place = encode_unit(
            quantised[u], tokens - int(exact[u].sum()), all_tables(), placed.unit.tables[level], placed.first_stream,
            placed.streams, states, words, starts, place, escapes, escape_starts, escape_place,
        )  # fmt: skip
    coded = Coded(exact, bits, states, np.diff(starts), np.diff(escape_starts), words[place:], escapes[escape_place:])
    return put_together(coded, calibration.digest, level, spec.kv_dtype, first_token == 0)


def _exact_bits(layout: Layout, cell: np.ndarray, spec: CellSpec, exact: np.ndarray) -> bytes:
    """Bits of exact tokens, [token, plane, layer, head, channel] of each unit, units one after another."""
    parts = []
    for u in np.flatnonzero(exact.any(axis=1)):
        box = layout.units[u].box(cell)[:, :, exact[u]]
        parts.append(np.ascontiguousarray(box.transpose(2, 0, 1, 3, 4), storage_dtype(spec)).tobytes())
    return b"".join(parts)


def _decode(cell: Cell, spec: CellSpec, out: np.ndarray) -> None:
    """All units into `out`. Raises `Unusable`."""
    from lmcache_s3.kernels import transform_streams
    from lmcache_s3.kernels.rans_tables import all_tables

    calibration, layout, level, parts, first_token = cell
    tokens = spec.shape[2]
    turns = rotation(calibration, first_token, tokens)
    most = max(placed.unit.packed.pairs for placed in layout.units)
    entries, filled = np.empty((tokens, most + 1), np.int64), np.empty(tokens, np.int64)
    step = calibration.levels[level].step
    target = _Target(out, spec.kv_dtype)
    for u, placed in enumerate(layout.units):
        unit = placed.unit
        coded = np.flatnonzero(~parts.exact[u])
        if not transform_streams.decode_unit(
            parts.streams, all_tables(), unit.tables[level], placed.first_stream, unit.packed.first_pairs, coded.size,
            entries, filled,
        ):  # fmt: skip
            raise Unusable("transform: a stream is not whole", kind="payload")
        target.write(placed, unit.scaled(step), turns, entries, filled, coded)
    if not transform_streams.whole(parts.streams):
        raise Unusable("transform: a stream goes on behind its symbols", kind="payload")
    target.finish()
    taken = 0
    for u in np.flatnonzero(parts.exact.any(axis=1)):
        kept, box = np.flatnonzero(parts.exact[u]), layout.units[u].box(out)
        shape = (kept.size, *box.shape[:2], *box.shape[3:])
        n = math.prod(shape)
        box[:, :, kept] = parts.bits[taken : taken + n].reshape(shape).transpose(1, 2, 0, 3, 4)
        taken += n


class _Target:
    """A cell that values are written into, unit by unit: `out` itself if the kernels can, else float32 beside it."""

    def __init__(self, out: np.ndarray, kv_dtype: str) -> None:
        from lmcache_s3.kernels.strided import flat_view

        self._out, self._kv_dtype = out, kv_dtype
        layout = flat_view(out) if kv_dtype in ("bfloat16", "float32") else None
        self._beside: np.ndarray | None = None
        if layout is None:
            self._beside = np.zeros(out.shape, np.float32)
            layout = flat_view(self._beside)
            assert layout is not None
        self._flat, self._strides = layout[0], [int(stride) for stride in layout[1]]

    def write(
        self,
        placed: Placed,
        scaled: tuple[np.ndarray, ...],
        turns: tuple[np.ndarray, np.ndarray],
        entries: np.ndarray,
        filled: np.ndarray,
        coded: np.ndarray,
    ) -> None:
        """Values of a unit's coded tokens."""
        from lmcache_s3.kernels.transform_values import Place, decode_values

        unit = placed.unit
        plane, layer, token, head = self._strides
        start = unit.planes[0] * plane + placed.layers.start * layer + placed.heads.start * head
        decode_values(
            unit.packed, scaled[0], scaled[1], unit.vectors, unit.mean.size // unit.vectors,
            _rotation_of(unit, turns), entries, filled, coded,
            self._flat, Place(start, plane, layer, token, head, unit.layers, unit.heads),
        )  # fmt: skip

    def finish(self) -> None:
        """Everything is in `out`, though exact tokens hold anything."""
        from lmcache_s3.codecs.dtypes import from_float32

        if self._beside is not None:
            self._out[...] = from_float32(self._beside, self._kv_dtype)
