"""A calibration: what codec `transform` knows of one model's KV, as values and as a file. FORMAT.md §7.3.

The KV of a group, `[plane, layer, head]` vectors of channels, is cut into *units*, boxes that are transformed whole.
The file is safetensors, its metadata entry `lmcache_s3` canonical JSON; its name is the SHA-256 of its bytes.

Invariant: in a Calibration that `from_bytes` gave, units tile the box exactly once, every number is finite and small
enough that decoding neither overflows nor rounds: with integers `inverse` and q in ±127, each sum Σ inverse · q and all
its parts are below 2²⁴ and so exact in float32 in any order. Raises `Unusable` (calibration, oversized), nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np

from lmcache_s3.codecs.tensor_file import read_tensors, write_tensors
from lmcache_s3.errors import Unusable
from lmcache_s3.kernels.rans_tables import TABLES
from lmcache_s3.types import FORMAT_VERSION, ITEM_BYTES, Buffer, KVDtype

if TYPE_CHECKING:
    from lmcache_s3.kernels.transform_forward import Forward
    from lmcache_s3.kernels.transform_products import Packed

MAX_FILE_BYTES = 1 << 30
MAX_LEVELS = 16
MAX_UNITS = 65_535
MAX_INVERSE = 2047
REACH = 127
"""Quantised coefficients are −127 … 127."""
_METADATA = "lmcache_s3"
_EXACT = 1 << 24
_MAX_VECTORS = 1 << 20
_MAX_WIDTH = 1 << 20
_LARGE = 2.0**64
_LEVEL = re.compile(r"[a-z0-9_]{1,32}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Level:
    """One setting. step: width of a quantisation step, in the coefficients' unit. kl: next-token KL that was measured
    of it on the model (nats a token), bits: bits a value; None: not measured."""

    name: str
    step: float
    kl: float | None = None
    bits: float | None = None


@dataclass(frozen=True, eq=False)
class Unit:
    """A box of planes × layers × heads, its W = planes · layers · heads · head_dim values a token in that (C) order.

    planes: (0,) K, (1,) V or (0, 1). streams: entropy-coded streams that its coefficients are dealt to; 0: they go on
    in the last one of the unit before. mean: float32 [W]. Coefficient r of values x, in units of step 1:
    forward_scale[r] · Σ forward[r, w] · (x − mean)[w]; forward: float16 [R, W], forward_scale: float32 [R]. Values of
    coefficients q · step: mean[w] + inverse_scale[w] · step · Σ inverse[w, r] · q[r]; inverse: int16 [W, R],
    inverse_scale: float32 [W]. tables: per level, uint8 [R_level ≤ R], table of each coefficient that the level codes;
    the others are zero.
    """

    planes: tuple[int, ...]
    first_layer: int
    layers: int
    first_head: int
    heads: int
    streams: int
    mean: np.ndarray
    forward: np.ndarray
    forward_scale: np.ndarray
    inverse: np.ndarray
    inverse_scale: np.ndarray
    tables: tuple[np.ndarray, ...]
    _scaled: dict[float, tuple[np.ndarray, ...]] = field(default_factory=dict, init=False, repr=False)

    @property
    def vectors(self) -> int:
        return len(self.planes) * self.layers * self.heads

    @cached_property
    def packed(self) -> Packed:
        """`inverse` as decoding reads it. Made once, of its size."""
        from lmcache_s3.kernels.transform_products import pack  # numba only where it is needed

        return pack(self.inverse, self.vectors, max(self.streams, 1))

    @cached_property
    def packed_forward(self) -> Forward:
        """`forward` as encoding reads it. Made once, of its size."""
        from lmcache_s3.kernels.transform_forward import pack_forward

        return pack_forward(self.forward, self.forward_scale, self.mean)

    def scaled(self, step: float) -> tuple[np.ndarray, ...]:
        """(inverse_scale · step, mean), float32 [block · column] as `packed` has them. Made once a step."""
        from lmcache_s3.kernels.transform_products import packed_columns

        made = self._scaled.get(step)
        if made is None:
            scale = self.inverse_scale * np.float32(step)
            made = tuple(packed_columns(self.packed, of, self.vectors) for of in (scale, self.mean))
            self._scaled[step] = made
        return made


@dataclass(frozen=True, eq=False)
class Calibration:
    """kv_dtype, kv, layers, heads, head_dim: of the KV group it was made for. levels: from fine to coarse.

    turns: float64 [rotary ÷ 2], revolutions a token of the channel pair (j, j + rotary ÷ 2) of plane 0; empty where
    nothing is rotated. about: for people. Arrays are not to be changed.
    """

    kv_dtype: KVDtype
    kv: int
    layers: int
    heads: int
    head_dim: int
    levels: tuple[Level, ...]
    turns: np.ndarray
    units: tuple[Unit, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """64 hex digits: SHA-256 of the file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        arrays = [self.turns]
        for unit in self.units:
            arrays += [unit.mean, unit.forward, unit.forward_scale, unit.inverse, unit.inverse_scale, *unit.tables]
        return sum(array.nbytes for array in arrays)

    @cached_property
    def widest(self) -> int:
        """Values a token of its widest unit."""
        return max(unit.mean.size for unit in self.units)

    def level(self, name: str) -> Level | None:
        return next((level for level in self.levels if level.name == name), None)

    def to_bytes(self) -> bytes:
        """The file: the same content gives the same bytes. Raises `Unusable` for what `from_bytes` would refuse."""
        _check(self)
        data = write_tensors(_tensors(self), {_METADATA: _canonical(_described(self))})
        if len(data) > MAX_FILE_BYTES:
            raise Unusable(f"a calibration of {len(data)} bytes, at most {MAX_FILE_BYTES} are read", kind="oversized")
        return data

    @classmethod
    def from_bytes(cls, data: Buffer) -> Calibration:
        """Read and check a file. The arrays are views of one copy of it. Raises `Unusable`."""
        if len(data) > MAX_FILE_BYTES:
            raise Unusable(f"a calibration of {len(data)} bytes, at most {MAX_FILE_BYTES} are read", kind="oversized")
        whole = bytes(data)
        tensors, metadata = read_tensors(whole, kind="calibration")
        made = _made(tensors, _Object(_parsed(metadata.get(_METADATA)), "its description"))
        _check(made)
        made.__dict__["digest"] = hashlib.sha256(whole).hexdigest()
        return made


def _refuse(text: str) -> NoReturn:
    raise Unusable(f"calibration: {text}", kind="calibration")


# --- the description


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _described(made: Calibration) -> dict[str, object]:
    units = [
        {
            "planes": list(unit.planes),
            "first_layer": unit.first_layer,
            "layers": unit.layers,
            "first_head": unit.first_head,
            "heads": unit.heads,
            "streams": unit.streams,
        }
        for unit in made.units
    ]
    return {
        "format": FORMAT_VERSION,
        "kv_dtype": made.kv_dtype,
        "kv": made.kv,
        "layers": made.layers,
        "heads": made.heads,
        "head_dim": made.head_dim,
        "levels": [{"name": one.name, "step": one.step, "kl": one.kl, "bits": one.bits} for one in made.levels],
        "units": units,
        "rotary": 2 * len(made.turns),
        "about": dict(made.about),
    }


def _parsed(text: str | None) -> object:
    try:
        return json.loads(text or "", parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"calibration: its description is not JSON ({error})", kind="calibration") from error


class _Object:
    """Typed access to an untrusted JSON object. Raises `Unusable`."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            _refuse(f"{what} is no JSON object")
        self._value, self._what = cast(dict[str, Any], value), what

    def get(self, name: str, kind: type) -> Any:
        value = self._value.get(name)
        if type(value) is not kind:
            _refuse(f"{self._what}: {name!r} is missing or no {kind.__name__}")
        return value

    def number(self, name: str, *, absent: bool = False) -> float | None:
        value: Any = self._value.get(name)
        if value is None and absent:
            return None
        if type(value) not in (int, float) or not abs(value) <= _LARGE:
            _refuse(f"{self._what}: {name!r} is {str(value)[:40]}")
        return float(value)


def _level(value: object) -> Level:
    one = _Object(value, "a level")
    step = one.number("step")
    assert step is not None
    return Level(one.get("name", str), step, one.number("kl", absent=True), one.number("bits", absent=True))


def _made(tensors: dict[str, np.ndarray], said: _Object) -> Calibration:
    if said.get("format", int) != FORMAT_VERSION:
        _refuse(f"of format {said.get('format', int)}, this package reads {FORMAT_VERSION}")
    levels = tuple(_level(one) for one in said.get("levels", list)[: MAX_LEVELS + 1])
    units = []
    known = {"turns"}

    def tensor(name: str) -> np.ndarray:
        known.add(name)
        if name not in tensors:
            _refuse(f"has no tensor {name!r}")
        return tensors[name]

    for i, value in enumerate(said.get("units", list)[: MAX_UNITS + 1]):
        one = _Object(value, f"unit {i}")
        planes = one.get("planes", list)
        units.append(
            Unit(
                planes=tuple(planes),
                first_layer=one.get("first_layer", int),
                layers=one.get("layers", int),
                first_head=one.get("first_head", int),
                heads=one.get("heads", int),
                streams=one.get("streams", int),
                mean=tensor(f"{i}.mean"),
                forward=tensor(f"{i}.forward"),
                forward_scale=tensor(f"{i}.forward_scale"),
                inverse=tensor(f"{i}.inverse"),
                inverse_scale=tensor(f"{i}.inverse_scale"),
                tables=tuple(tensor(f"{i}.{level.name}.tables") for level in levels),
            )
        )
    made = Calibration(
        kv_dtype=said.get("kv_dtype", str),
        kv=said.get("kv", int),
        layers=said.get("layers", int),
        heads=said.get("heads", int),
        head_dim=said.get("head_dim", int),
        levels=levels,
        turns=tensor("turns"),
        units=tuple(units),
        about=said.get("about", dict),
    )
    if said.get("rotary", int) != 2 * made.turns.size or set(tensors) != known:
        _refuse("its description and its tensors do not fit together")
    return made


def _tensors(made: Calibration) -> dict[str, np.ndarray]:
    tensors = {"turns": made.turns}
    for i, unit in enumerate(made.units):
        for name in ("mean", "forward", "forward_scale", "inverse", "inverse_scale"):
            tensors[f"{i}.{name}"] = getattr(unit, name)
        for level, tables in zip(made.levels, unit.tables, strict=True):
            tensors[f"{i}.{level.name}.tables"] = tables
    return tensors


# --- the rules


def _within(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _check(made: Calibration) -> None:
    """Every rule of FORMAT.md §7.3 but the file's own. Raises `Unusable`."""
    if made.kv_dtype not in ITEM_BYTES:
        _refuse(f"kv_dtype {made.kv_dtype!r} is unknown")
    if not (
        _within(made.kv, 1, 2)
        and _within(made.layers, 1, 65_535)
        and _within(made.heads, 1, 65_535)
        and _within(made.head_dim, 1, _MAX_WIDTH)
        and made.kv * made.layers * made.heads <= _MAX_VECTORS
    ):
        _refuse(f"made for {made.kv} planes, {made.layers} layers, {made.heads} heads × {made.head_dim}")
    names = [level.name for level in made.levels]
    if not 1 <= len(names) <= MAX_LEVELS or len(set(names)) != len(names) or not all(map(_LEVEL.fullmatch, names)):
        _refuse(f"levels are {', '.join(names)[:200]}")
    steps = [level.step for level in made.levels]
    if not all(2.0**-20 <= step <= 2.0**20 for step in steps) or steps != sorted(steps):
        _refuse(f"steps are {steps}, admitted are 2⁻²⁰ to 2²⁰, rising")
    for measured in (*(level.kl for level in made.levels), *(level.bits for level in made.levels)):
        if measured is not None and not 0 <= measured <= 1e6:
            _refuse(f"measured {measured}")
    _check_array(made.turns, np.float64, (made.turns.size,), "turns", most=1.0)
    if 2 * made.turns.size > made.head_dim:
        _refuse(f"{2 * made.turns.size} of {made.head_dim} channels are rotated")
    _check_tiling(made)
    for i, unit in enumerate(made.units):
        _check_unit(unit, f"unit {i}", made.head_dim, len(made.levels))


def _check_tiling(made: Calibration) -> None:
    if not 1 <= len(made.units) <= MAX_UNITS:
        _refuse(f"{len(made.units)} units")
    for unit in made.units:
        if (
            tuple(unit.planes) not in ((0,), (1,), (0, 1))
            or unit.planes[-1] >= made.kv
            or not _within(unit.streams, 0, 4096)
            or not _within(unit.layers, 1, made.layers)
            or not _within(unit.heads, 1, made.heads)
            or not _within(unit.first_layer, 0, made.layers - unit.layers)
            or not _within(unit.first_head, 0, made.heads - unit.heads)
        ):
            _refuse(f"there can be no unit of planes {str(unit.planes)[:40]}, {unit.layers} layers, {unit.heads} heads")
    if sum(unit.vectors for unit in made.units) != made.kv * made.layers * made.heads:
        _refuse("its units do not tile the group")
    met = np.zeros((made.kv, made.layers, made.heads), bool)
    for unit in made.units:
        layers = slice(unit.first_layer, unit.first_layer + unit.layers)
        heads = slice(unit.first_head, unit.first_head + unit.heads)
        for plane in unit.planes:
            if met[plane, layers, heads].any():
                _refuse("two of its units overlap")
            met[plane, layers, heads] = True


def _check_unit(unit: Unit, what: str, head_dim: int, levels: int) -> None:
    width = unit.vectors * head_dim
    live = unit.inverse.shape[-1] if unit.inverse.ndim == 2 else 0
    if width > _MAX_WIDTH or not 1 <= live <= width:
        _refuse(f"{what} has {live} coefficients for {width} values")
    _check_array(unit.mean, np.float32, (width,), f"{what}: mean")
    _check_array(unit.forward, np.float16, (live, width), f"{what}: forward")
    _check_array(unit.forward_scale, np.float32, (live,), f"{what}: forward_scale")
    _check_array(unit.inverse, np.int16, (width, live), f"{what}: inverse", most=MAX_INVERSE)
    _check_array(unit.inverse_scale, np.float32, (width,), f"{what}: inverse_scale")
    if int(np.abs(unit.inverse).sum(axis=1, dtype=np.int64).max()) * REACH >= _EXACT:
        _refuse(f"{what}: a row of inverse sums to more than 2²⁴ ÷ 127")
    if len(unit.tables) != levels:
        _refuse(f"{what} has tables for {len(unit.tables)} of {levels} levels")
    for tables in unit.tables:
        coded = tables.shape[0] if tables.ndim else live + 1
        if coded > live:
            _refuse(f"{what} has tables for more than its {live} coefficients")
        _check_array(tables, np.uint8, (coded,), f"{what}: tables", most=TABLES - 1)


def _check_array(
    array: np.ndarray, dtype: type[np.generic], shape: Sequence[int], what: str, most: float = _LARGE
) -> None:
    if array.dtype != np.dtype(dtype) or array.shape != tuple(shape):
        _refuse(f"{what} is {array.dtype}{list(array.shape)}, wanted {np.dtype(dtype)}{list(shape)}")
    # Not abs(): that of the smallest int16 is itself. Comparing NaN is false.
    if math.prod(shape) and not (-most <= float(array.min()) and float(array.max()) <= most):
        _refuse(f"{what} holds numbers beyond {most:g}, or none")
