"""zarr.json and shard indexes: exact bytes, and back again."""

from __future__ import annotations

import json
import struct

import google_crc32c
import pytest

from lmcache_s3.codecs.registry import CODEC_IDS, make_codec
from lmcache_s3.errors import Invalid
from lmcache_s3.extent import array_metadata, build_shard, record_from_metadata, shard_index
from lmcache_s3.testing.calibrations import model_encoder
from lmcache_s3.testing.extents import SPACE_ID, make_extent
from lmcache_s3.types import Geometry, Grid

GEOMETRY = Geometry(2, 4, 4, 8, "bfloat16", 8)


def test_the_document_is_as_specified() -> None:
    extent = make_extent(make_codec("fast"), GEOMETRY, Grid(2, 4), 3, first_token=24)
    document = json.loads(extent.objects["zarr.json"])
    ours = document.pop("attributes")["lmcache_s3"]
    assert document == {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [2, 4, 24, 4, 8],
        "data_type": "uint16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 2, 24, 1, 8]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [2, 2, 8, 1, 8],
                    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                    "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
        "dimension_names": ["kv", "layer", "token", "head", "channel"],
    }
    assert set(ours) == {
        "format", "space_id", "name", "kv_dtype", "codec", "measured_kl", "fidelity", "chunk_tokens", "first_token",
        "token_count", "parent", "hashes", "lengths", "sums", "raw_bytes", "born", "writer", "package_version",
    }  # fmt: skip
    assert (ours["format"], ours["kv_dtype"], ours["first_token"], ours["token_count"]) == (1, "bfloat16", 24, 24)


@pytest.mark.parametrize(
    ("kv_dtype", "data_type", "codecs"),
    [
        ("bfloat16", "uint16", [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]),
        ("float16", "float16", [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]),
        ("float32", "float32", [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]),
        ("float8_e4m3fn", "uint8", [{"name": "bytes"}, {"name": "crc32c"}]),
        ("float8_e5m2", "uint8", [{"name": "bytes"}, {"name": "crc32c"}]),
    ],
)
def test_data_types_are_those_every_reader_knows(kv_dtype: str, data_type: str, codecs: list[object]) -> None:
    geometry = Geometry(2, 4, 4, 8, kv_dtype, 8)  # type: ignore[arg-type]
    document = json.loads(make_extent(make_codec("fast"), geometry, Grid(), 1).objects["zarr.json"])
    assert document["data_type"] == data_type
    assert document["codecs"][0]["configuration"]["codecs"] == codecs


def test_other_codecs_are_named_ours() -> None:
    extent = make_extent(make_codec("cachegen", {"level": "fine"}), GEOMETRY, Grid(), 1)
    chain = json.loads(extent.objects["zarr.json"])["codecs"][0]["configuration"]["codecs"]
    assert chain == [{"name": "lmcache_s3.cachegen", "configuration": {"level": "fine", "kv_dtype": "bfloat16"}}]


def test_no_token_ids_and_no_text_in_it() -> None:
    made = make_extent(make_codec("fast"), GEOMETRY, Grid(), 2)
    assert b"token_ids" not in made.objects["zarr.json"]
    assert b'"text"' not in made.objects["zarr.json"]


@pytest.mark.parametrize("codec_id", CODEC_IDS)
@pytest.mark.parametrize("grid", [Grid(), Grid(2, 1), Grid(2, 4)], ids=str)
@pytest.mark.parametrize("kv", [1, 2])
def test_the_record_comes_back(codec_id: str, grid: Grid, kv: int) -> None:
    geometry = Geometry(kv, 4, 4, 8, "float16", 8)
    codec = model_encoder(codec_id, geometry)
    made = make_extent(codec, geometry, grid, 3, first_token=8)
    read = record_from_metadata(made.objects["zarr.json"], name=made.record.name, space_id=SPACE_ID)
    assert read.record == made.record
    assert read.geometry == geometry
    assert (read.codec.id, read.codec.config) == (codec_id, codec.config)
    assert (read.writer, read.space_id) == ("test", SPACE_ID)
    fidelity = "exact" if read.codec.exact else f"unmeasured-{codec_id}-{codec.level}"
    kl = {"cachegen": None, "transform": 0.0625}.get(codec_id, 0.0)
    assert (read.fidelity, read.measured_kl) == (fidelity, kl)


def test_a_shard_is_its_cells_and_a_zarr_index() -> None:
    shard = build_shard([b"abc", b"defgh"])
    index = struct.pack("<4Q", 0, 3, 3, 5)
    assert shard == b"abcdefgh" + index + struct.pack("<I", google_crc32c.value(index))
    assert shard[8:] == shard_index([3, 5])


def test_missing_cells_of_a_partly_filled_shard() -> None:
    index = struct.pack("<6Q", 0, 3, *[2**64 - 1] * 4)
    assert shard_index([3], slots=3) == index + struct.pack("<I", google_crc32c.value(index))
    for lengths, slots in (([1, 2], 1), ([], 0)):
        with pytest.raises(Invalid):
            shard_index(lengths, slots=slots)


def test_arguments_that_disagree_are_refused() -> None:
    made = make_extent(make_codec("fast"), GEOMETRY, Grid(2, 2), 1)
    with pytest.raises(Invalid, match="codec"):
        array_metadata(made.record, GEOMETRY, make_codec("torch"), space_id=SPACE_ID, fidelity="exact")
    for writer in ("a\nb", "Ω", "a" * 201):
        with pytest.raises(Invalid, match="ASCII"):
            array_metadata(
                made.record, GEOMETRY, make_codec("fast"), space_id=SPACE_ID, fidelity="exact", writer=writer
            )
    with pytest.raises(Invalid, match="divided"):
        array_metadata(
            made.record, Geometry(2, 3, 4, 8, "bfloat16", 8), make_codec("fast"), space_id=SPACE_ID, fidelity="exact"
        )
