"""What `transform` promises beyond the suite: what is exact, what fits, and that no lie in a payload gets through."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.arrays import raw_bytes
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.calibration import Calibration, Level
from lmcache_s3.codecs.dtypes import from_float32, to_float32
from lmcache_s3.codecs.header import HEADER_BYTES
from lmcache_s3.codecs.transform import TransformCodec
from lmcache_s3.codecs.transform_layout import misfit
from lmcache_s3.codecs.transform_payload import CODED, FIXED_BYTES, RAW
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.kernels.transform_turns import cos_sin
from lmcache_s3.testing.calibrations import made_calibration, made_unit
from lmcache_s3.testing.fuzz import rewrapped
from lmcache_s3.types import Geometry, Grid

SPEC = CellSpec((2, 4, 128, 2, 32), "bfloat16")
FIRST = CellPosition(bytes(16), 0, 0, 0)
LATER = CellPosition(bytes(16), 256, 0, 0)
MADE = made_calibration(SPEC, unit_layers=2, streams=(2, 0), fewer=0.02)


def codec(level: str = "medium", made: Calibration = MADE) -> TransformCodec:
    return TransformCodec(level, calibrations.register(made))


def values(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SPEC.shape).astype(np.float32)


def mode(data: bytes) -> int:
    return data[HEADER_BYTES + 1]


def listed(data: bytes) -> list[tuple[int, int]]:
    """(unit, token) that the payload lists as exact."""
    (count,) = struct.unpack_from("<I", data, HEADER_BYTES + 36)
    entries = struct.unpack_from(f"<{count}I", data, HEADER_BYTES + FIXED_BYTES)
    return [divmod(entry, 1 << 16) for entry in entries]


def decoded(data: bytes, position: CellPosition | None = None, spec: CellSpec = SPEC) -> np.ndarray:
    out = from_float32(np.zeros(spec.shape, np.float32), spec.kv_dtype)
    TransformCodec().decode(data, spec, position, out)
    return out


def test_coarser_levels_are_smaller_and_less_exact() -> None:
    cell = from_float32(values(), "bfloat16")
    sizes, errors = [], []
    for level in ("fine", "medium", "coarse"):
        data = codec(level).encode(cell, SPEC, LATER)
        sizes.append(8 * len(data) / cell.size)
        off = to_float32(decoded(data), "bfloat16") - to_float32(cell, "bfloat16")
        errors.append(float(np.sqrt((off**2).mean())))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] == pytest.approx(0.125 / np.sqrt(12), rel=0.1), "uniform steps of an orthogonal transform"
    assert sizes[0] < 7.5


def test_the_prompts_first_token_is_exact_and_only_that() -> None:
    cell = from_float32(values(), "bfloat16")
    first, later = (decoded(codec().encode(cell, SPEC, place)) for place in (FIRST, LATER))
    assert (first[:, :, 0] == cell[:, :, 0]).all()
    assert (later[:, :, 0] != cell[:, :, 0]).any()
    assert listed(codec().encode(cell, SPEC, FIRST)) == []


def test_a_token_out_of_reach_is_exact_in_its_unit_and_spoils_no_other() -> None:
    quiet = from_float32(values(), "bfloat16")
    cell = quiet.copy()
    cell[1, 2, 77, 1, 5], cell[0, 0, 3, 0, 0], cell[0, 1, 4, 1, 31] = 0x4974, 0x7FC0, 0xFF80  # a million, NaN, −∞
    data = codec().encode(cell, SPEC, LATER)
    # Units are two layers of K or of V: K 0–1, K 2–3, V 0–1, V 2–3.
    assert listed(data) == [(0, 3), (0, 4), (3, 77)]
    out, alone = decoded(data), decoded(codec().encode(quiet, SPEC, LATER))
    for plane, layers, token in ((0, slice(0, 2), 3), (0, slice(0, 2), 4), (1, slice(2, 4), 77)):
        assert (out[plane, layers, token] == cell[plane, layers, token]).all()
        out[plane, layers, token] = alone[plane, layers, token] = 0
    assert (out == alone).all()


def test_what_would_not_shrink_is_kept_as_it_is() -> None:
    for factor in (1e4, np.nan):
        cell = from_float32(values() * np.float32(factor), "bfloat16")
        data = codec().encode(cell, SPEC, LATER)
        assert mode(data) == RAW
        assert len(data) == codec().max_encoded_bytes(SPEC) == HEADER_BYTES + FIXED_BYTES + raw_bytes(SPEC)
        assert (decoded(data) == cell).all()
    calibrations_of_none = decoded(data)  # raw cells need no calibration
    assert (calibrations_of_none == cell).all()


@pytest.mark.parametrize("tokens", [5, 65, 129])
def test_an_odd_number_of_values_that_all_escape_can_be_read_back(tokens: int) -> None:
    """In pairs: the last value's missing partner escapes, too."""
    spec = CellSpec((1, 1, tokens, 1, 16), "bfloat16")
    unit = made_unit((0,), range(1), range(1), 16, np.random.default_rng(0), live=1, tables=(20,))
    level = Level("only", 1.0)
    made = Calibration("bfloat16", 1, 1, 1, 16, (level,), np.empty(0), (unit,))
    along = unit.forward[0].astype(np.float32) / np.linalg.norm(unit.forward[0].astype(np.float32))
    cell = from_float32(np.broadcast_to(50 * along, spec.shape).copy(), "bfloat16")  # coefficients near 100
    data = codec("only", made).encode(cell, spec, LATER)
    off = to_float32(decoded(data, LATER, spec), "bfloat16") - to_float32(cell, "bfloat16")
    assert np.abs(off).max() < 0.5


def test_keys_are_turned_back_by_their_position() -> None:
    """A key that is the same at every position, but for its rotation, is its mean and costs next to nothing."""
    mean = np.random.default_rng(1).standard_normal((4, 2, 32)).astype(np.float32)
    narrow = tuple(np.zeros_like(tables) for tables in MADE.units[0].tables)
    pairs = zip(MADE.units, _means(mean), strict=True)
    turned_back = replace(MADE, units=tuple(replace(unit, mean=m, tables=narrow) for unit, m in pairs))
    cosine, sine = cos_sin(MADE.turns, 1000, 128)
    keys = np.repeat(mean[:, None], 128, axis=1)
    low, high = keys[..., :16].copy(), keys[..., 16:].copy()
    c, s = cosine[:, None], sine[:, None]
    keys[..., :16], keys[..., 16:] = low * c - high * s, high * c + low * s
    cell = from_float32(np.stack((keys, np.repeat(mean[:, None], 128, axis=1))), "bfloat16")
    position = CellPosition(bytes(16), 1000, 0, 0)
    data = codec("coarse", turned_back).encode(cell, SPEC, position)
    elsewhere = codec("coarse", turned_back).encode(cell, SPEC, LATER)
    assert 8 * len(data) / cell.size < 0.1 < 1 < 8 * len(elsewhere) / cell.size
    assert np.abs(to_float32(decoded(data), "bfloat16") - to_float32(cell, "bfloat16")).max() < 0.04


def _means(mean: np.ndarray) -> list[np.ndarray]:
    halves = [mean[:2].reshape(-1), mean[2:].reshape(-1)]
    return halves + halves


def test_every_dtype_stays_finite_at_its_edges() -> None:
    for kv_dtype in ("float16", "float8_e4m3fn", "float8_e5m2"):
        spec = CellSpec((2, 2, 64, 1, 16), kv_dtype)
        made = made_calibration(spec)
        wide = replace(made, units=tuple(replace(u, mean=np.full_like(u.mean, 1e5)) for u in made.units))
        cell = from_float32(np.full(spec.shape, 1e9, np.float32), kv_dtype)
        data = codec(made=wide).encode(cell, spec, LATER)
        assert np.isfinite(to_float32(decoded(data, spec=spec), kv_dtype)).all()


# --- settings


def test_what_it_says_of_itself() -> None:
    digest = calibrations.register(MADE)
    own = TransformCodec("medium", digest)
    assert own.config == {"level": "medium", "calibration": digest}
    assert (own.level, TransformCodec().level) == (f"medium-{digest[:8]}", "medium")
    assert own.measured_kl == 0.0625
    assert own.measured(0.5).measured_kl == 0.5
    for unknown in (TransformCodec(), TransformCodec("fine", digest), TransformCodec("medium", "ab" * 32)):
        assert unknown.measured_kl is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TransformCodec("Medium"), "'Medium' is no name"),
        (lambda: TransformCodec(3), "3 is no name"),  # type: ignore[arg-type]
        (lambda: TransformCodec("medium", "abc"), "'abc' is not 64 hex digits"),
        (lambda: TransformCodec("medium", None), "None"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], TransformCodec], says: str) -> None:
    with pytest.raises(Invalid, match=says):
        make()


def test_what_cannot_be_encoded_is_said() -> None:
    cell = from_float32(values(), "bfloat16")
    with pytest.raises(Invalid, match="without a calibration"):
        TransformCodec().encode(cell, SPEC, FIRST)
    with pytest.raises(Invalid, match=r"'finest': .* has fine, medium, coarse"):
        codec("finest").encode(cell, SPEC, FIRST)
    with pytest.raises(Invalid, match=r"units of 2 layers × 2 heads; layers 1 … 2, .* cut them"):
        codec().encode(cell[:, :2], replace(SPEC, shape=(2, 2, 128, 2, 32)), replace(FIRST, first_layer=1))
    for place in (replace(FIRST, first_layer=1), replace(FIRST, first_head=1)):
        with pytest.raises(Invalid, match="is no part of that"):
            codec().encode(cell, SPEC, place)
    with pytest.raises(Invalid, match="codes no"):
        codec().encode(cell, SPEC, replace(FIRST, first_token=(1 << 48) + 1))


def test_grids_that_fit() -> None:
    geometry = Geometry(2, 4, 2, 32, "bfloat16", 128)
    assert misfit(MADE, geometry, Grid()) is None
    assert misfit(MADE, geometry, Grid(2, 1)) is None
    for wrong in (Grid(4, 1), Grid(1, 2)):
        assert "cut them" in str(misfit(MADE, geometry, wrong))
    assert "no part" in str(misfit(MADE, replace(geometry, kv_dtype="float16"), Grid()))
    assert "4 heads" in str(misfit(MADE, replace(geometry, heads=4), Grid()))


# --- lies


@pytest.fixture(scope="module")
def stored() -> bytes:
    cell = values()
    cell[0, 0, 5] = cell[1, 0, 7] = 1e6
    return codec().encode(from_float32(cell, "bfloat16"), SPEC, FIRST)


def changed(stored: bytes, at: int, data: bytes, *, cut: int | None = None) -> bytes:
    """With `data` for what is at this place of the payload; cut: so many bytes of it go."""
    payload = stored[HEADER_BYTES:]
    return rewrapped(payload[:at] + data + payload[at + (len(data) if cut is None else cut) :], stored[:HEADER_BYTES])


def test_the_cell_that_is_lied_about_is_coded(stored: bytes) -> None:
    assert mode(stored) == CODED
    assert listed(stored) == [(0, 5), (2, 7)]
    decoded(stored, FIRST)


LIES: dict[str, tuple[int, bytes]] = {
    "another version": (0, b"\2"),
    "another mode": (1, b"\2"),
    "raw": (1, b"\0"),
    "another dtype": (2, b"\2"),
    "a level there is not": (3, b"\3"),
    "another level": (3, b"\0"),
    "a calibration there is not": (4, bytes(32)),
    "fewer entries": (36, struct.pack("<I", 1)),
    "more entries than bytes": (36, struct.pack("<I", 0xFFFFFFFF)),
    "fewer words": (40, struct.pack("<I", 7)),
    "more words than bytes": (40, struct.pack("<I", 0xFFFFFFFF)),
    "escapes that are words": (44, struct.pack("<I", 0x10000)),
    "token 0 listed too": (48, struct.pack("<II", 0, 2 << 16 | 7)),
    "entries fall": (48, struct.pack("<II", 2 << 16 | 7, 5)),
    "an entry twice": (48, struct.pack("<II", 5, 5)),
    "a unit there is not": (48, struct.pack("<II", 5, 4 << 16 | 7)),
    "a token there is not": (48, struct.pack("<II", 5, 2 << 16 | 128)),
}
COUNTS = FIXED_BYTES + 8 + 2 * (6 * 128)
"""Where the counts begin: behind two entries, and bits of token 0 in four units and of two more."""


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_the_payload_is_refused(lie: str, stored: bytes) -> None:
    data = changed(stored, *LIES[lie])
    assert data != stored
    for position in (None, FIRST):
        with pytest.raises(Unusable):
            decoded(data, position)


def test_counts_that_do_not_add_up(stored: bytes) -> None:
    payload = stored[HEADER_BYTES:]
    first = payload[COUNTS : COUNTS + 2]
    assert first[0] >= 0x80 > first[1]
    for wrong, cut in ((b"\xff\xff\xff\xff\xff\xff", 2), (bytes((first[0] ^ 1, first[1])), 2), (b"\0", 2)):
        with pytest.raises(Unusable):
            decoded(changed(stored, COUNTS, wrong, cut=cut))
    with pytest.raises(Unusable, match="do not end"):
        decoded(changed(stored, COUNTS, b"\x80" * 64, cut=len(payload) - COUNTS))


def test_a_cell_moved_in_the_model_or_the_prompt_is_no_cell_of_there(stored: bytes) -> None:
    """Where nobody knows the place, the header is believed: it must still fit the calibration."""
    for at, field in ((36, struct.pack("<H", 1)), (40, struct.pack("<H", 1)), (28, struct.pack("<Q", 1 << 50))):
        header = bytearray(stored[:HEADER_BYTES])
        header[at : at + len(field)] = field
        with pytest.raises(Unusable) as caught:
            decoded(rewrapped(stored[HEADER_BYTES:], bytes(header)))
        assert caught.value.kind == "calibration"
