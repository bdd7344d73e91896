"""Every way to lie in an extent's zarr.json, each with what it would gain. All are refused as `Unusable`."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Unusable
from lmcache_s3.extent import MAX_METADATA_BYTES, record_from_metadata
from lmcache_s3.testing.extents import SPACE_ID, make_extent
from lmcache_s3.types import ExtentName, Geometry, Grid

GEOMETRY = Geometry(2, 4, 4, 8, "bfloat16", 8)
MADE = make_extent(make_codec("fast"), GEOMETRY, Grid(2, 2), 3)
OURS = make_extent(make_codec("cachegen"), GEOMETRY, Grid(2, 2), 3)

Lie = Callable[[dict[str, Any], dict[str, Any]], None]


def put(**values: object) -> Lie:
    """Replace attributes of ours."""
    return lambda document, ours: ours.update(values)


def top(**values: object) -> Lie:
    """Replace members of the array's metadata."""
    return lambda document, ours: document.update(values)


def drop(name: str) -> Lie:
    return lambda document, ours: ours.pop(name)


def sharding(**values: object) -> Lie:
    return lambda document, ours: document["codecs"][0]["configuration"].update(values)


def packed(form: str, *numbers: int) -> str:
    return base64.b64encode(struct.pack(form, *numbers)).decode()


LIES: dict[str, Lie] = {
    # More cells, bytes or tokens than there are: a reader would allocate or fetch what the liar says.
    "token count above the shape's": put(token_count=48),
    "a shape of a petabyte": top(shape=[2, 4, 2**40, 4, 8]),
    "a shape of many chunks": top(shape=[2, 4, 2400, 4, 8]),
    "chunk_tokens that make the shape huge": put(chunk_tokens=2**31 - 1),
    "chunk_tokens of 0: division by nothing": put(chunk_tokens=0),
    "raw_bytes that spoil budgets": put(raw_bytes=2**62),
    "negative raw_bytes": put(raw_bytes=-1),
    "more lengths than cells": put(lengths=packed("<13I", *[1] * 13)),
    "fewer lengths than cells": put(lengths=packed("<11I", *[1] * 11)),
    "a cell of four gigabytes: fetched before anything is checked": put(lengths=packed("<12I", *[2**32 - 1] * 12)),
    "a cell of nothing": put(lengths=packed("<12I", *[0] * 12)),
    "no sums: nothing would be verified": put(sums=""),
    "hashes of another chunk count": put(hashes=base64.b64encode(bytes(32)).decode()),
    # Names: one extent passed off as another.
    "a name that is a path": put(name="../../secret"),
    "another extent's name": put(name=str(ExtentName(bytes(16), 3, "fast", 7, "0" * 32))),
    "a last hash that is not the name's": put(hashes=base64.b64encode(bytes(48)).decode()),
    "another birth, to escape collection": put(born=2**40),
    "another codec than the name's": put(codec="torch"),
    "a codec there is not": put(codec="evil"),
    "another space": put(space_id="0" * 64),
    "a space id with a slash": put(space_id="a/../b"),
    # Data types: bits read as something else.
    "another kv_dtype": put(kv_dtype="float16"),
    "an unknown kv_dtype": put(kv_dtype="float4"),
    "another data_type": top(data_type="int16"),
    "another fill value: missing shards as plausible values": top(fill_value=7),
    # Layout: a plain reader and the cache would read different cells.
    "another chunk key encoding": top(chunk_key_encoding={"name": "v2"}),
    "a shard shape that divides other axes": top(
        chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1, 2, 24, 2, 8]}}
    ),
    "axes by other names": top(dimension_names=["layer", "kv", "token", "head", "channel"]),
    "an index at the start": sharding(index_location="start"),
    "an index without a checksum": sharding(index_codecs=[{"name": "bytes", "configuration": {"endian": "little"}}]),
    "cells of another shape": sharding(chunk_shape=[2, 4, 8, 2, 8]),
    "cells of no size": sharding(chunk_shape=[2, 0, 8, 2, 8]),
    "cells of four axes": sharding(chunk_shape=[2, 2, 8, 2]),
    "cells without crc32c": sharding(codecs=[{"name": "bytes", "configuration": {"endian": "little"}}]),
    "a compressor before the checksum": sharding(
        codecs=[{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}, {"name": "crc32c"}]
    ),
    "big-endian cells": sharding(codecs=[{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]),
    "no codecs": top(codecs=[]),
    "codecs that are no list": top(codecs={"0": 1}),
    "a storage transformer": top(storage_transformers=[{"name": "elsewhere"}]),
    "a group": top(node_type="group"),
    "another Zarr": top(zarr_format=2),
    "a member nobody knows": top(must={"understand": True}),
    # Types: values that compare or compute oddly in Python.
    "a format of the future": put(format=2),
    "a format that is True": put(format=True),
    "a float for an integer": put(first_token=0.0),
    "a negative first token": put(first_token=-8),
    "a first token beyond 64 bits": put(first_token=2**70),
    "a list for a name": put(name=["a"]),
    "an object for hashes": put(hashes={}),
    "no base64": put(sums="!!!!"),
    "a parent of the wrong length": put(parent="00"),
    "a parent in upper case": put(parent="A" * 32),
    "a writer with a line break, to forge log lines": put(writer="a\nERROR all is lost"),
    "a writer of a megabyte": put(writer="a" * 2**20),
    "a measured error of -1": put(measured_kl=-1),
    "a measured error in words": put(measured_kl="small"),
    "kv of 3": top(shape=[3, 4, 24, 4, 8]),
    "a boolean length": top(shape=[2, 4, 24, 4, True]),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lie_is_refused(lie: Lie) -> None:
    document = json.loads(MADE.objects["zarr.json"])
    lie(document, document["attributes"]["lmcache_s3"])
    with pytest.raises(Unusable) as caught:
        record_from_metadata(json.dumps(document).encode(), name=MADE.record.name, space_id=SPACE_ID)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(json.loads(MADE.objects["zarr.json"])["attributes"]["lmcache_s3"]))
def test_nothing_may_be_left_out(name: str) -> None:
    if name == "measured_kl":  # absent means unmeasured
        return
    document = json.loads(MADE.objects["zarr.json"])
    drop(name)(document, document["attributes"]["lmcache_s3"])
    with pytest.raises(Unusable):
        record_from_metadata(json.dumps(document).encode())


@pytest.mark.parametrize(
    "change", [{"level": "finest"}, {"level": ["fine"]}, {"level": {}}, {"other": 1}, {"kv_dtype": "float16"}], ids=str
)
def test_a_codec_configuration_that_is_none(change: dict[str, object]) -> None:
    document = json.loads(OURS.objects["zarr.json"])
    document["codecs"][0]["configuration"]["codecs"][0]["configuration"].update(change)
    with pytest.raises(Unusable):
        record_from_metadata(json.dumps(document).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"attributes": NaN}',
        b'{"attributes": {"lmcache_s3": {"format": ' + b"9" * 5000 + b"}}}",
        b'{"attributes": {"lmcache_s3": []}}',
        b" " * (MAX_METADATA_BYTES + 1),
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_no_document_is_refused(data: bytes) -> None:
    with pytest.raises(Unusable):
        record_from_metadata(data)


def test_an_attribute_of_the_future_may_stand_beside_ours() -> None:
    """Attributes are only ever added to: an older reader ignores what it does not know."""
    document = json.loads(MADE.objects["zarr.json"])
    document["attributes"]["lmcache_s3"]["colour"] = "blue"
    document["attributes"]["somebody"] = {"else": 1}
    assert record_from_metadata(json.dumps(document).encode()).record == MADE.record


def test_changed_bytes_never_raise_anything_else() -> None:
    data = MADE.objects["zarr.json"]
    rng = np.random.default_rng(0)
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            read = record_from_metadata(bytes(changed))
        except Unusable:
            continue
        assert read.geometry == GEOMETRY, "only attributes that describe no layout can change unnoticed"
