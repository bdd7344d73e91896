"""Stored bytes never change their meaning: every golden file is there, is read as ever, and is written as ever.

`python tests/golden/make.py` makes missing files after a deliberate addition; it never changes one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.extent import array_metadata, record_from_metadata, shard_index
from lmcache_s3.types import FORMAT_VERSION


def load_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_maker", Path(__file__).parent / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = load_maker()
FOLDER = Path(__file__).parent / f"v{FORMAT_VERSION}"
TRANSFORMED = [f"transform.{kv_dtype}.cell" for kv_dtype in maker.DTYPES]
ENCODED = {
    "bfloat16": "45ea531c9755c1d68f62ce9e4830cdc7d3cf7d65375edb48a67603542a69f740",
    "float16": "6c0a2ba318a12529fda29ed09079158078a8441a530c6dd90e004db6d7ddc3c7",
    "float32": "5ba6fae6bf8619dc7eec43f5718857286f3e9982a848e5dc7c0e81589de9821b",
    "float8_e4m3fn": "e149218a70c9b09b6489132d47611c8460d08a7ecc9c4b308f6c6a1f24d4d0d4",
    "float8_e5m2": "bba0090fb23c741ca812eab6f3c75f1bcd2ffae8ba27967cb8a42372311a0f0f",
}
"""What today's encoder makes of the golden cells with the golden calibrations, on any machine."""
CELLS = [f"{stem}.{kv_dtype}.cell" for stem in maker.codecs() for kv_dtype in maker.DTYPES]


def test_no_file_is_missing_and_none_is_unknown() -> None:
    others = {"fast.zarr.json", "fast.shard", "decoded.json", *map(maker.calibration_name, maker.DTYPES)}
    assert {path.name for path in FOLDER.iterdir()} == {*CELLS, *TRANSFORMED, *others}


@pytest.mark.parametrize("name", CELLS)
def test_a_golden_cell_is_read_and_written_as_ever(name: str) -> None:
    stem, kv_dtype, _ = name.split(".")
    data = (FOLDER / name).read_bytes()
    codec = make_codec(stem.split("-")[0])  # a reader knows the codec's id only, not its level
    got = hashlib.sha256(maker.decoded(codec, data, kv_dtype)).hexdigest()
    assert got == json.loads((FOLDER / "decoded.json").read_text())[name]
    if stem != "torch":  # the archive's bytes are torch's own and differ between its versions
        spec = maker.CellSpec(maker.SHAPE, kv_dtype)
        assert maker.codecs()[stem].encode(maker.golden_cell(kv_dtype), spec, maker.POSITION) == data


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_golden_cell_with_a_golden_calibration_is_read_as_ever(name: str) -> None:
    """What an encoder makes of it is no matter of the format, and was other bytes once; it is the same everywhere."""
    kv_dtype = name.split(".")[1]
    codec, data = maker.transform(kv_dtype), (FOLDER / name).read_bytes()
    got = hashlib.sha256(maker.decoded(make_codec("transform"), data, kv_dtype)).hexdigest()
    assert got == json.loads((FOLDER / "decoded.json").read_text())[name]
    assert maker.transform(kv_dtype).config == codec.config
    again = codec.encode(maker.golden_cell(kv_dtype), maker.CellSpec(maker.SHAPE, kv_dtype), maker.POSITION)
    assert abs(len(again) - len(data)) <= 8
    assert hashlib.sha256(again).hexdigest() == ENCODED[kv_dtype]


def test_the_golden_extent_is_read_and_written_as_ever() -> None:
    document = (FOLDER / "fast.zarr.json").read_bytes()
    read = record_from_metadata(document)
    assert read.geometry == maker.GEOMETRY
    again = array_metadata(
        read.record, read.geometry, read.codec, space_id=read.space_id, fidelity=read.fidelity, writer=read.writer
    )
    ours, golden = json.loads(again), json.loads(document)
    for attributes in (ours["attributes"]["lmcache_s3"], golden["attributes"]["lmcache_s3"]):
        assert attributes.pop("package_version")
    assert ours == golden
    shard = (FOLDER / "fast.shard").read_bytes()
    lengths = [cell.length for cell in read.record.cells(0)]
    assert shard[sum(lengths) :] == shard_index(lengths)
