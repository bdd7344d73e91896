"""Every codec as a `numcodecs` codec: by its registered name, on plain arrays, in a Zarr format 2 array."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import cast

import ml_dtypes
import numcodecs
import numpy as np
import pytest
import zarr

from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.dtypes import to_float32
from lmcache_s3.codecs.numcodecs_ import NumcodecsKVCodec
from lmcache_s3.codecs.registry import CODEC_IDS, make_codec
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.testing.calibrations import encoder
from lmcache_s3.testing.codec import DTYPES
from lmcache_s3.testing.extents import random_bits
from lmcache_s3.types import KVDtype

SHAPE = (2, 2, 16, 2, 8)
NOWHERE = CellPosition(bytes(16), 0, 0, 0)


def config(codec_id: str, kv_dtype: str = "bfloat16", shape: tuple[int, ...] = SHAPE) -> dict[str, object]:
    of_chunk: dict[str, object] = {"id": f"lmcache_s3.{codec_id}", "kv_dtype": kv_dtype, "shape": list(shape)}
    return of_chunk | (dict(inner(codec_id, kv_dtype).config) if codec_id == "transform" else {})


def inner(codec_id: str, kv_dtype: str) -> KVCodec:
    return encoder(codec_id, CellSpec(SHAPE, cast(KVDtype, kv_dtype)), NOWHERE)


def test_it_shows_its_configuration() -> None:
    shown = repr(numcodecs.get_codec(config("cachegen")))
    assert shown.startswith("CachegenNumcodec({'id': 'lmcache_s3.cachegen', 'kv_dtype': 'bfloat16', 'shape': [2, 2, 16")


def test_every_codec_is_registered() -> None:
    entries = {e.name: e for e in importlib.metadata.entry_points(group="numcodecs.codecs") if "lmcache" in e.value}
    assert set(entries) == {f"lmcache_s3.{id}" for id in CODEC_IDS}
    for name, entry in entries.items():
        adapter = entry.load()
        assert issubclass(adapter, NumcodecsKVCodec)
        assert name == adapter.codec_id == f"lmcache_s3.{adapter.kv_codec_id}"


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("codec_id", CODEC_IDS)
def test_a_plain_array_comes_back(codec_id: str, kv_dtype: KVDtype) -> None:
    codec = numcodecs.get_codec(config(codec_id, kv_dtype))
    bits = random_bits(SHAPE, kv_dtype, np.random.default_rng(0))
    data = codec.encode(bits)
    assert type(data) is bytes
    back = codec.decode(data)
    assert (back.dtype, back.shape) == (bits.dtype, bits.shape)
    ours, spec = inner(codec_id, kv_dtype), CellSpec(SHAPE, kv_dtype)
    wanted = np.empty_like(bits)
    ours.decode(ours.encode(bits, spec, NOWHERE), spec, None, wanted)
    assert back.tobytes() == wanted.tobytes()
    assert not ours.exact or back.tobytes() == bits.tobytes()
    for other in (bits.tobytes(), memoryview(bits.tobytes()), bits.reshape(-1)):
        assert len(codec.encode(other)) == len(data)
    out = np.zeros(bits.nbytes, np.uint8)
    codec.decode(np.frombuffer(data, np.uint8), out=out)
    assert out.tobytes() == wanted.tobytes()
    again = numcodecs.get_codec(json.loads(json.dumps(codec.get_config())))
    assert again.get_config() == codec.get_config()
    assert again == codec


def test_an_array_of_true_dtype_and_few_axes() -> None:
    codec = numcodecs.get_codec(config("lossless", shape=(16, 2, 8)))
    values = np.random.default_rng(0).standard_normal((16, 2, 8)).astype(ml_dtypes.bfloat16)
    back = codec.decode(codec.encode(values))
    assert back.shape == values.shape
    assert (back.view(ml_dtypes.bfloat16) == values).all()


@pytest.mark.parametrize("codec_id", CODEC_IDS)
def test_a_zarr_format_2_array(codec_id: str, tmp_path: Path) -> None:
    compressor = numcodecs.get_codec(config(codec_id, "float16"))
    array = zarr.create_array(
        tmp_path,
        shape=(2, 2, 40, 2, 8),
        chunks=SHAPE,
        dtype="float16",
        compressors=compressor,
        zarr_format=2,
        fill_value=0,
    )
    bits = random_bits((2, 2, 40, 2, 8), "float16", np.random.default_rng(1))
    array[...] = bits
    assert json.loads((tmp_path / ".zarray").read_text())["compressor"]["id"] == f"lmcache_s3.{codec_id}"
    read = np.asarray(zarr.open_array(tmp_path, mode="r")[...])
    assert read.shape == bits.shape
    if make_codec(codec_id).exact:
        assert read.tobytes() == bits.tobytes()
    else:
        assert np.abs(to_float32(read, "float16") - to_float32(bits, "float16")).max() < 9
    chunk = tmp_path / "0.0.1.0.0"
    data = bytearray(chunk.read_bytes())
    data[60] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(Unusable):
        zarr.open_array(tmp_path, mode="r")[...]


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": [2, 2, 16, 2, 8]},
        {"kv_dtype": "bfloat16"},
        {"kv_dtype": "int3", "shape": [4]},
        {"kv_dtype": "bfloat16", "shape": []},
        {"kv_dtype": "bfloat16", "shape": [1, 2, 3, 4, 5, 6]},
        {"kv_dtype": "bfloat16", "shape": [-1, 4]},
        {"kv_dtype": "bfloat16", "shape": ["4"]},
        {"kv_dtype": "bfloat16", "shape": [4], "levle": "fine"},
    ],
    ids=str,
)
def test_configurations_that_do_not_fit(wrong: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        numcodecs.get_codec({"id": "lmcache_s3.lossless", **wrong})


def test_arrays_that_do_not_fit() -> None:
    codec = numcodecs.get_codec(config("lossless"))
    bits = random_bits(SHAPE, "bfloat16", np.random.default_rng(0))
    wrong: list[object] = [
        bits[:1],
        bits.astype(np.float32),
        bits.view(np.float16),
        bits.tobytes()[1:],
        np.asfortranarray(bits),
    ]
    for array in wrong:
        with pytest.raises(Invalid):
            codec.encode(array)
