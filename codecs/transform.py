"""Codec `transform`: a linear transform fitted to the model, quantised and entropy-coded; lossy, and calibrated.

Keys are turned back by their rotary position, an offline mean is taken off, and the values of a *unit* (layers × heads
of K, V or both) become coefficients that are nearly independent and of which one global step costs the model about the
same each. Transform, tables and units come from a calibration (`calibration.py`), which each cell names: a codec made
with defaults decodes every cell whose calibration `calibrations.py` can find. FORMAT.md §7.3.

What is exact: token 0 of the prompt, which attention leans on most, and a token in a unit where a coefficient is out of
reach or not finite. A cell that would not become smaller is stored raw. Encoding and decoding give the same bits on
every machine. Raises `Unusable` (header's kinds, payload, calibration) when decoding, `Unavailable` where a bucket with
the calibration does not answer, `Invalid` for arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import numpy as np

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.arrays import bits_of, check_array, raw_bytes, storage_dtype
from lmcache_s3.codecs.base import JSON, CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.codecs.header import HEADER_BYTES, said_position, unwrap, wrap
from lmcache_s3.codecs.transform_encoding import coded
from lmcache_s3.codecs.transform_layout import Layout, layout_of, place_of, rotation_of
from lmcache_s3.codecs.transform_payload import FIXED_BYTES, RAW, Fixed, Parts, read_fixed, read_sections
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.types import Buffer

_PANEL_BYTES = 64 * 7
"""Of a value that is multiplied: those of 64 tokens as int16, and their sums of as many coefficients."""
_SPARE_BYTES = 1 << 18
"""For what does not grow with a unit."""
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

    def encode_memory_bytes(self, spec: CellSpec) -> int:
        """Rooms for words and escapes, then a unit's coefficients, or the exact tokens and the result."""
        raw, tokens, values = raw_bytes(spec), spec.shape[2], math.prod(spec.shape)
        rooms = 2 * min(values, raw // 2 + tokens) + min(values, raw + tokens)
        unit = self._widest(spec) * (2 * tokens + _PANEL_BYTES)
        return max(rooms + max(2 * raw, unit), self._turns_bytes(spec)) + _SPARE_BYTES

    def decode_memory_bytes(self, spec: CellSpec, stored_bytes: int) -> int:
        """A copy of what is coded, then a unit's pairs of coefficients and sums of some of its vectors."""
        tokens, channels = spec.shape[2], spec.shape[4]
        unit = 9 * tokens * (self._widest(spec) + 4) // 2 + 4 * tokens * max(256, channels + 15)
        return stored_bytes + max(unit, self._turns_bytes(spec)) + _SPARE_BYTES

    @staticmethod
    def _turns_bytes(spec: CellSpec) -> int:
        """Ten float64 of each token and pair of channels, while cosines and sines are made."""
        return 40 * spec.shape[2] * spec.shape[4]

    def _widest(self, spec: CellSpec) -> int:
        """Values a token of a unit at most: of the whole cell, unless our calibration is at hand."""
        of_cell = math.prod(spec.shape) // max(spec.shape[2], 1)
        known = calibrations.known(self._digest) if self._digest else None
        return of_cell if known is None else min(of_cell, known.widest)

    # --- encoding

    def encode(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> bytes:
        check_array(cell, spec, what="cell")
        calibration, level = self.settings()
        layout = layout_of(calibration, spec, position)
        if isinstance(layout, str):
            raise Invalid(layout, kind="argument")
        payload = coded(calibration, layout, level, cell, spec, position.first_token)
        return write_cell(payload, lambda: cell, spec, position, (level, self._digest))

    def settings(self) -> tuple[Calibration, int]:
        """What it encodes by, and the index of its level there. Raises `Invalid` (setting)."""
        if not self._digest:
            raise Invalid(
                "codec transform was made without a calibration and can only decode: name one (codec_calibration)",
                kind="setting",
                key="codec_calibration",
            )
        calibration = calibrations.find(self._digest)
        names = [level.name for level in calibration.levels]
        if self._level not in names:
            raise Invalid(
                f"codec level {self._level!r}: calibration {self._digest[:12]}… has {', '.join(names)}",
                kind="setting",
                key="codec_level",
            )
        return calibration, names.index(self._level)

    # --- decoding

    def decode(self, data: Buffer, spec: CellSpec, position: CellPosition | None, out: np.ndarray) -> None:
        check_array(out, spec, what="out")
        read = read_cell(data, spec, position)
        if isinstance(read, Cell):
            _decode(read, spec, out)
        else:
            np.copyto(out, read)


def write_cell(
    payload: list[Buffer] | None,
    whole: Callable[[], np.ndarray],
    spec: CellSpec,
    position: CellPosition,
    settings: tuple[int, str],
) -> bytes:
    """The stored cell. payload: of mode 1, in parts; whole: the cell, asked for where it is stored raw: None, or not
    smaller.

    settings: index of the level, the calibration's digest.
    """
    if payload is None or sum(map(len, payload)) >= FIXED_BYTES + raw_bytes(spec):
        payload = [Fixed(RAW, *settings).pack(spec.kv_dtype), bits_of(whole(), spec)]
    return wrap(payload, spec, position)


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


def _decode(cell: Cell, spec: CellSpec, out: np.ndarray) -> None:
    """All units into `out`. Raises `Unusable`."""
    from lmcache_s3.kernels import transform_streams
    from lmcache_s3.kernels.float_forms import FORMS
    from lmcache_s3.kernels.rans_tables import all_tables
    from lmcache_s3.kernels.strided import flat_view
    from lmcache_s3.kernels.transform_values import decode_values

    calibration, layout, level, parts, first_token = cell
    tokens = spec.shape[2]
    turns = rotation(calibration, first_token, tokens)
    most = max(placed.unit.packed.pairs for placed in layout.units)
    entries, filled = np.empty((tokens, most + 1), np.int64), np.empty(tokens, np.int64)
    step = calibration.levels[level].step
    view = flat_view(out)
    target = out if view is not None else np.empty(out.shape, out.dtype)
    flat, strides = view if view is not None else flat_view(target) or (target, np.empty(0))
    places = [int(stride) for stride in strides]
    for u, placed in enumerate(layout.units):
        unit = placed.unit
        coded = np.flatnonzero(~parts.exact[u])
        if not transform_streams.decode_unit(
            parts.streams, all_tables(), unit.tables[level], placed.first_stream, unit.packed.first_pairs, coded.size,
            entries, filled,
        ):  # fmt: skip
            raise Unusable("transform: a stream is not whole", kind="payload")
        scale, mean = unit.scaled(step)
        decode_values(
            unit.packed, scale, mean, unit.vectors, unit.mean.size // unit.vectors, rotation_of(unit, turns),
            entries, filled, coded, flat, FORMS[spec.kv_dtype], place_of(placed, places),
        )  # fmt: skip
    if not transform_streams.whole(parts.streams):
        raise Unusable("transform: a stream goes on behind its symbols", kind="payload")
    if target is not out:
        out[...] = target
    taken = 0
    for u in np.flatnonzero(parts.exact.any(axis=1)):
        kept, box = np.flatnonzero(parts.exact[u]), layout.units[u].box(out)
        shape = (kept.size, *box.shape[:2], *box.shape[3:])
        n = math.prod(shape)
        box[:, :, kept] = parts.bits[taken : taken + n].reshape(shape).transpose(1, 2, 0, 3, 4)
        taken += n
