"""Calibration files: one content, one digest; every rule is held; changed bytes are `Unusable` or a calibration."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from lmcache_s3.codecs.base import CellSpec
from lmcache_s3.codecs.calibration import MAX_INVERSE, Calibration, Level, Unit
from lmcache_s3.errors import Unusable
from lmcache_s3.testing.calibrations import made_calibration, made_unit
from lmcache_s3.testing.fuzz import mutate

SPEC = CellSpec((2, 2, 16, 2, 8), "bfloat16")
MADE = made_calibration(SPEC, joint=True, streams=(2, 0), live=20, fewer=0.1)


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(header, description, tensors)."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["lmcache_s3"]), data[8 + length :]


def put_back(header: dict[str, Any], description: dict[str, Any], tensors: bytes) -> bytes:
    header["__metadata__"]["lmcache_s3"] = json.dumps(description)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def test_what_is_written_is_read() -> None:
    data = MADE.to_bytes()
    read = Calibration.from_bytes(data)
    assert read.to_bytes() == data == MADE.to_bytes()
    assert read.digest == MADE.digest
    assert read.levels == MADE.levels
    assert read.about == MADE.about
    assert read.nbytes < len(data)
    assert (read.level("medium"), read.level("finest")) == (Level("medium", 0.5, kl=0.0625, bits=2.0), None)
    for ours, again in zip(MADE.units, read.units, strict=True):
        assert (ours.planes, ours.streams) == (again.planes, again.streams)
        assert (ours.inverse == again.inverse).all()
        assert not again.inverse.flags.writeable
    assert Calibration.from_bytes(memoryview(bytearray(data))).digest == MADE.digest


def test_any_reader_of_safetensors_reads_it() -> None:
    tensors = load(MADE.to_bytes())
    assert (tensors["0.inverse"] == MADE.units[0].inverse).all()
    assert (tensors["1.medium.tables"] == MADE.units[1].tables[1]).all()
    assert tensors["turns"].dtype == np.float64


def changed(**fields: Any) -> Calibration:
    return replace(MADE, **fields)


def with_unit(**fields: Any) -> Calibration:
    return replace(MADE, units=(replace(MADE.units[0], **fields), *MADE.units[1:]))


def spoilt(name: str, value: float) -> Calibration:
    array = getattr(MADE.units[0], name).copy()
    array.flat[3] = value
    return with_unit(**{name: array})


WIDE = made_unit((0, 1), range(2), range(2), 8, np.random.default_rng(0))
WRONG: dict[str, Callable[[], Calibration]] = {
    "dtype": lambda: changed(kv_dtype="int4"),
    "planes": lambda: changed(kv=3),
    "no level": lambda: changed(levels=()),
    "twice the same level": lambda: changed(levels=(MADE.levels[0],) * 3),
    "a level's name": lambda: changed(levels=(Level("a-b", 1.0), *MADE.levels[1:])),
    "steps fall": lambda: changed(levels=MADE.levels[::-1]),
    "step 0": lambda: changed(levels=(Level("fine", 0.0), *MADE.levels[1:])),
    "step nan": lambda: changed(levels=(Level("fine", float("nan")), *MADE.levels[1:])),
    "kl below 0": lambda: changed(levels=(Level("fine", 0.1, kl=-1.0), *MADE.levels[1:])),
    "turns nan": lambda: changed(turns=np.full(4, np.nan)),
    "turns of more channels": lambda: changed(turns=np.zeros(5)),
    "turns of float32": lambda: changed(turns=np.zeros(4, np.float32)),
    "no unit": lambda: changed(units=()),
    "a unit is missing": lambda: changed(units=MADE.units[:1]),
    "a unit twice": lambda: changed(units=MADE.units[:1] * 2),
    "a unit too wide": lambda: changed(units=(WIDE, *MADE.units)),
    "a unit outside": lambda: with_unit(first_layer=2),
    "a unit before": lambda: with_unit(first_head=-1),
    "planes of a unit": lambda: with_unit(planes=(1, 0)),
    "streams": lambda: with_unit(streams=-1),
    "mean nan": lambda: spoilt("mean", np.nan),
    "mean too large": lambda: spoilt("mean", 1e30),
    "forward infinite": lambda: spoilt("forward", np.inf),
    "forward_scale nan": lambda: spoilt("forward_scale", np.nan),
    "inverse_scale nan": lambda: spoilt("inverse_scale", np.nan),
    "inverse too large": lambda: spoilt("inverse", MAX_INVERSE + 1),
    "inverse too small": lambda: spoilt("inverse", -(2**15)),
    "inverse of int32": lambda: with_unit(inverse=MADE.units[0].inverse.astype(np.int32)),
    "inverse turned": lambda: with_unit(inverse=MADE.units[0].inverse.T),
    "mean of another width": lambda: with_unit(mean=np.zeros(31, np.float32)),
    "no coefficient": lambda: with_unit(inverse=np.zeros((32, 0), np.int16)),
    "sums beyond 2²⁴": lambda: with_unit(inverse=np.full_like(MADE.units[0].inverse, MAX_INVERSE)),
    "tables there are not": lambda: with_unit(tables=(np.full(20, 111, np.uint8),) * 3),
    "tables of more coefficients": lambda: with_unit(tables=(np.zeros(21, np.uint8),) * 3),
    "tables of fewer levels": lambda: with_unit(tables=MADE.units[0].tables[:2]),
}
FITS = {"sums beyond 2²⁴"}
"""With 20 coefficients the sums stay below; see the test."""


@pytest.mark.parametrize("name", [name for name in WRONG if name not in FITS])
def test_a_calibration_that_breaks_a_rule_is_neither_written_nor_read(name: str) -> None:
    with pytest.raises(Unusable) as caught:
        WRONG[name]().to_bytes()
    assert caught.value.kind == "calibration"


def test_sums_are_bounded() -> None:
    unit = made_unit((0, 1), range(2), range(2), 8, np.random.default_rng(0))
    assert WRONG["sums beyond 2²⁴"]().to_bytes()
    full = replace(MADE, units=(replace(unit, inverse=np.full((64, 64), MAX_INVERSE, np.int16)),))
    assert full.to_bytes(), "64 · 2047 · 127 is just below 2²⁴"
    longer = CellSpec((2, 2, 16, 2, 17), "bfloat16")
    wide = made_calibration(longer, unit_layers=2, joint=True, rotary=0)
    filled = np.full((136, 136), 1000, np.int16)
    with pytest.raises(Unusable, match="2²⁴"):
        replace(wide, units=(replace(wide.units[0], inverse=filled),)).to_bytes()


def described(name: str, value: object) -> bytes:
    header, description, tensors = parts(MADE.to_bytes())
    place: Any = description
    *path, last = name.split(".")
    for step in path:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[int(last) if isinstance(place, list) else last] = value
    return put_back(header, description, tensors)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", 2),
        ("format", True),
        ("kv", "2"),
        ("layers", 2.0),
        ("layers", 10**30),
        ("levels", {}),
        ("levels", [1]),
        ("levels.0.name", "other"),
        ("levels.0.step", "1"),
        ("levels.0.step", 10**400),
        ("levels.0.step", True),
        ("levels.0.kl", "0"),
        ("units", None),
        ("units.0", 7),
        ("units.0.planes", 0),
        ("units.0.planes", [0, 0]),
        ("units.0.planes", [[0]]),
        ("units.0.layers", True),
        ("rotary", 6),
        ("about", []),
    ],
)
def test_a_description_that_is_not_as_it_should_be(name: str, value: object) -> None:
    with pytest.raises(Unusable):
        Calibration.from_bytes(described(name, value))


def test_the_description_as_such() -> None:
    header, description, tensors = parts(MADE.to_bytes())
    assert Calibration.from_bytes(put_back(header, description, tensors)).digest != MADE.digest
    for text in ("", "[]", "{", '{"format": NaN}', "[" * 100_000):
        header["__metadata__"]["lmcache_s3"] = text
        whole = json.dumps(header).encode()
        with pytest.raises(Unusable):
            Calibration.from_bytes(struct.pack("<Q", len(whole)) + whole + tensors)


def test_tensors_lie_one_behind_the_other() -> None:
    header, description, tensors = parts(MADE.to_bytes())
    entry = header["turns"]
    for wrong in ([8, 40], [0, 24], [0, 40], [32, 0], [0, 32, 64], [0.0, 32.0], [0, 2**60], None):
        other = put_back({**header, "turns": {**entry, "data_offsets": wrong}}, description, tensors)
        with pytest.raises(Unusable):
            Calibration.from_bytes(other)
    for more in ({"dtype": "F8"}, {"dtype": 3}, {"shape": [2**62, 2**62]}, {"shape": [-4]}, {"shape": "4"}):
        with pytest.raises(Unusable):
            Calibration.from_bytes(put_back({**header, "turns": {**entry, **more}}, description, tensors))
    for data in (put_back(header, description, tensors + b"\0"), put_back(header, description, tensors[:-1])):
        with pytest.raises(Unusable):
            Calibration.from_bytes(data)


def test_changed_files_are_unusable_or_calibrations() -> None:
    data, rng, read = MADE.to_bytes(), np.random.default_rng(0), 0
    for _ in range(2000):
        try:
            again = Calibration.from_bytes(mutate(data, rng))
        except Unusable:
            continue
        read += 1
        assert isinstance(again.units[0], Unit)
    assert read, "a mean or a weight that changed a little is a calibration of another digest"
