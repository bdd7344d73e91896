"""The payload of a coded `transform` cell from its values. FORMAT.md §7.3.

Unit after unit, the last first, as its streams are written: coefficients, then their streams, so that of coefficients
only one unit's are held. Pure; the same bytes on every machine. Raises nothing.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.codecs.arrays import raw_bytes, storage_dtype
from lmcache_s3.codecs.base import CellSpec
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.codecs.transform_layout import Layout, Placed, place_of, rotation_of
from lmcache_s3.codecs.transform_payload import Coded, put_together
from lmcache_s3.types import Buffer


def coded(
    calibration: Calibration, layout: Layout, level: int, cell: np.ndarray, spec: CellSpec, first_token: int
) -> list[Buffer] | None:
    """The payload of mode 1, in parts; None where it cannot be smaller than the raw cell."""
    from lmcache_s3.kernels.rans_tables import all_tables  # numba only where it is needed
    from lmcache_s3.kernels.transform_streams import encode_unit, idle_states

    tokens, most = spec.shape[2], raw_bytes(spec)
    values = _Values(calibration, level, cell, spec, first_token)
    exact = np.zeros((len(layout.units), tokens), bool)
    exact[:, : int(first_token == 0)] = True
    # As much as there is, or as the raw cell's bytes hold, and a run more: `encode_unit` ends where a run may not fit.
    room = tokens * sum(placed.unit.tables[level].size for placed in layout.units)
    words, escapes = np.empty(min(room, most // 2 + tokens), np.uint16), np.empty(min(room, most + tokens), np.int8)
    place, escape_place = words.size, escapes.size
    states = idle_states(layout.streams)
    starts, escape_starts = np.empty(layout.streams + 1, np.int64), np.empty(layout.streams + 1, np.int64)
    starts[-1], escape_starts[-1] = place, escape_place
    exact_bytes = 0
    for u in reversed(range(len(layout.units))):
        placed = layout.units[u]
        q = values.coefficients(placed, exact[u])
        exact_bytes += int(exact[u].sum()) * placed.unit.mean.size * storage_dtype(spec).itemsize
        place, escape_place = encode_unit(
            q, tokens - int(exact[u].sum()), all_tables(), placed.unit.tables[level], placed.first_stream,
            placed.streams, states, words, starts, place, escapes, escape_starts, escape_place,
        )  # fmt: skip
        if place < 0 or exact_bytes + 2 * (words.size - place) + escapes.size - escape_place >= most:
            return None
    bits = _exact_bits(layout, cell, spec, exact)
    made = Coded(exact, bits, states, np.diff(starts), np.diff(escape_starts), words[place:], escapes[escape_place:])
    return put_together(made, calibration.digest, level, spec.kv_dtype, first_token == 0)


class _Values:
    """A cell's values, to become coefficients at one level."""

    def __init__(
        self, calibration: Calibration, level: int, cell: np.ndarray, spec: CellSpec, first_token: int
    ) -> None:
        from lmcache_s3.kernels.float_forms import FORMS
        from lmcache_s3.kernels.strided import flat_view
        from lmcache_s3.kernels.transform_turns import cos_sin

        self._level, self._step = level, np.float32(calibration.levels[level].step)
        self._turns = cos_sin(calibration.turns, first_token, spec.shape[2])
        self._form = FORMS[spec.kv_dtype]
        layout = flat_view(cell)
        if layout is None:
            layout = flat_view(np.ascontiguousarray(cell))
            assert layout is not None
        self._flat, self._strides = layout[0], [int(stride) for stride in layout[1]]

    def coefficients(self, placed: Placed, exact: np.ndarray) -> np.ndarray:
        """A unit's, int8 [coefficient, ≥ tokens that are not exact].

        exact: bool [token], those to be kept exactly; what is not finite or out of reach is added to them.
        """
        from lmcache_s3.kernels.transform_forward import coefficients
        from lmcache_s3.kernels.transform_tiles import TOKENS

        unit, forward = placed.unit, placed.unit.packed_forward
        n = unit.tables[self._level].size
        tokens = np.flatnonzero(~exact)
        q = np.empty((n, -(-tokens.size // TOKENS) * TOKENS), np.int8)
        within = np.empty(tokens.size, np.bool_)
        coefficients(
            forward, forward.factors[:n] / self._step, unit.vectors, unit.mean.size // unit.vectors,
            rotation_of(unit, self._turns), tokens, self._flat, self._form, place_of(placed, self._strides), q, within,
        )  # fmt: skip
        if within.all():
            return q
        exact[tokens[~within]] = True
        return np.ascontiguousarray(q[:, : tokens.size][:, within])


def _exact_bits(layout: Layout, cell: np.ndarray, spec: CellSpec, exact: np.ndarray) -> memoryview:
    """Bits of exact tokens, [token, plane, layer, head, channel] of each unit, units one after another."""
    counts = exact.sum(axis=1)
    bits = np.empty(sum(int(n) * of.unit.mean.size for n, of in zip(counts, layout.units, strict=True)), cell.dtype)
    taken = 0
    for u in np.flatnonzero(counts):
        box = layout.units[u].box(cell)[:, :, exact[u]].transpose(2, 0, 1, 3, 4)
        bits[taken : taken + box.size] = box.reshape(-1)
        taken += box.size
    return bits.astype(storage_dtype(spec), copy=False).view(np.uint8).data
