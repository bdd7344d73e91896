"""Extents written as the cache writes them, read by plain zarr and tensorstore: in other processes, with and without
this package."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import boto3
import fsspec
import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from zarr.abc.codec import SupportsSyncCodec
from zarr.core.array_spec import ArrayConfig
from zarr.core.buffer import cpu, default_buffer_prototype

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.dtypes import TRUE_DTYPE
from lmcache_s3.codecs.registry import CODEC_IDS, make_codec
from lmcache_s3.codecs.zarr_ import SafetensorsZarr
from lmcache_s3.errors import Invalid, LMCacheS3Error, Missing, Unavailable, Unusable
from lmcache_s3.extent import open_extent
from lmcache_s3.testing.calibrations import model_encoder
from lmcache_s3.testing.extents import MadeExtent, make_extent, random_bits
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import STORAGE_DTYPE, Geometry, Grid, KVDtype

GRIDS = [Grid(stages, groups) for stages in (1, 2) for groups in (1, 2, 4)]
DTYPES: tuple[KVDtype, ...] = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32")
CASES: list[tuple[Grid, KVDtype]] = [
    *((grid, kv_dtype) for grid in GRIDS for kv_dtype in DTYPES[:3]),
    *((Grid(2, 2), kv_dtype) for kv_dtype in DTYPES[3:]),
]

READ_ALL = """
import sys, json, pathlib
{prelude}
import numpy, zarr
for line in sys.stdin:
    directory = pathlib.Path(line.strip())
    array = zarr.open_array(directory.as_uri(), mode="r")
    bits = array[...]
    assert (array[:, 1, 5, 1:3, 2:] == bits[:, 1, 5, 1:3, 2:]).all()
    numpy.save(directory / "read.npy", bits)
{postlude}
"""
WITHOUT_US = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lmcache_s3", "torch", "safetensors"):
            raise ModuleNotFoundError(f"no {name} here", name=name)
sys.meta_path.insert(0, Blocker())
"""


def geometry(kv_dtype: KVDtype, kv: int = 2) -> Geometry:
    return Geometry(kv, 4, 4, 16, kv_dtype, 16)


MLA = Geometry(1, 4, 4, 16, "bfloat16", 16)


def extent_of(codec_id: str, geometry: Geometry, grid: Grid, n_chunks: int) -> MadeExtent:
    return make_extent(model_encoder(codec_id, geometry), geometry, grid, n_chunks)


def keep_calibrations(codec_id: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other processes look for what `extent_of` needs, as if they had been fetched before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    folder = home / "lmcache-s3" / "calibrations"
    folder.mkdir(parents=True)
    for of in [MLA, *(geometry(kv_dtype) for kv_dtype in DTYPES)] if codec_id == "transform" else []:
        calibration = calibrations.find(str(model_encoder(codec_id, of).config["calibration"]))
        (folder / f"{calibration.digest}.safetensors").write_bytes(calibration.to_bytes())


def read_elsewhere(extents: dict[Path, MadeExtent], *, prelude: str = "", postlude: str = "") -> None:
    """Read all of them in one fresh interpreter; leaves read.npy beside each."""
    for directory, extent in extents.items():
        extent.write(directory)
    code = READ_ALL.format(prelude=prelude, postlude=postlude)
    lines = "".join(f"{directory}\n" for directory in extents)
    done = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def decoded_by_the_codec(extent: MadeExtent) -> np.ndarray:
    """What the codec itself makes of the stored cells, the position checked."""
    record, shape = extent.record, extent.geometry
    codec, spec = make_codec(record.name.codec), CellSpec.of(shape, record.grid)
    whole = np.empty_like(extent.bits)
    for shard in range(record.grid.shards):
        stage, group = record.grid.stage_and_group(shard)
        data = extent.objects[f"c/0/{stage}/0/{group}/0"]
        layers, heads = shape.cell_layers(record.grid, shard), shape.cell_heads(record.grid, shard)
        for ref, prefix_hash in zip(record.cells(shard), record.chunk_hashes(), strict=True):
            start = ref.position * shape.chunk_tokens
            out = whole[:, layers.start : layers.stop, start : start + shape.chunk_tokens, heads.start : heads.stop]
            position = CellPosition(prefix_hash, record.first_token + start, layers.start, heads.start)
            codec.decode(data[ref.offset : ref.offset + ref.length], spec, position, out)
    return whole


@pytest.mark.parametrize(
    "codec_id", [one if one == "fast" else pytest.param(one, marks=pytest.mark.slow) for one in CODEC_IDS]
)
def test_plain_zarr_in_another_process_reads_every_grid_and_dtype(
    codec_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = make_codec(codec_id)
    keep_calibrations(codec_id, tmp_path / "home", monkeypatch)
    extents = {
        tmp_path / f"{grid.stages}-{grid.head_groups}-{kv_dtype}": extent_of(codec_id, geometry(kv_dtype), grid, 2)
        for grid, kv_dtype in CASES
    }
    extents[tmp_path / "mla"] = extent_of(codec_id, MLA, Grid(2, 1), 2)
    loaded_lazily = f"assert ('lmcache_s3' in sys.modules) == {codec_id != 'fast'}"
    read_elsewhere(extents, prelude="assert 'lmcache_s3' not in sys.modules", postlude=loaded_lazily)
    for directory, extent in extents.items():
        read = np.load(directory / "read.npy")
        assert read.dtype == extent.bits.dtype == np.dtype(STORAGE_DTYPE[extent.geometry.kv_dtype])
        assert read.tobytes() == decoded_by_the_codec(extent).tobytes()
        if codec.exact:
            assert read.tobytes() == extent.bits.tobytes()


def test_fast_needs_no_package_of_ours(tmp_path: Path) -> None:
    codec = make_codec("fast")
    extents = {
        tmp_path / f"{grid.stages}-{grid.head_groups}-{kv_dtype}": make_extent(codec, geometry(kv_dtype), grid, 2)
        for grid, kv_dtype in CASES
    }
    read_elsewhere(extents, prelude=WITHOUT_US)
    for directory, extent in extents.items():
        assert np.load(directory / "read.npy").tobytes() == extent.bits.tobytes()
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(directory)}}
        array = tensorstore.open(spec, open=True).result()
        assert array.read().result().tobytes() == extent.bits.tobytes()
        assert array.domain.labels == ("kv", "layer", "token", "head", "channel")


@pytest.mark.parametrize(("grid", "kv_dtype"), CASES, ids=str)
def test_zarrs_own_write_of_fast_is_byte_identical(kv_dtype: KVDtype, grid: Grid, tmp_path: Path) -> None:
    extent = make_extent(make_codec("fast"), geometry(kv_dtype), grid, 3)
    (tmp_path / "zarr.json").write_bytes(extent.objects["zarr.json"])
    zarr.open_array(tmp_path, mode="r+")[...] = extent.bits
    for path, data in extent.objects.items():
        if path != "zarr.json":
            assert (tmp_path / path).read_bytes() == data, path


@pytest.mark.parametrize("codec_id", CODEC_IDS)
def test_our_metadata_is_what_zarr_would_write(codec_id: str, tmp_path: Path) -> None:
    extent = extent_of(codec_id, geometry("bfloat16"), Grid(2, 2), 3).write(tmp_path)
    ours = json.loads((extent / "zarr.json").read_bytes())
    zarr.open_array(extent, mode="r+").update_attributes({})
    theirs = json.loads((extent / "zarr.json").read_bytes())
    assert theirs.pop("storage_transformers", []) == []
    assert theirs == ours


@pytest.mark.parametrize("codec_id", [id for id in CODEC_IDS if id != "fast"])
def test_writing_through_zarr_is_refused(codec_id: str, tmp_path: Path) -> None:
    extent = extent_of(codec_id, geometry("bfloat16"), Grid(), 2).write(tmp_path)
    array = zarr.open_array(extent, mode="r+")
    with pytest.raises(Invalid, match=r"only lmcache_s3\.Cache writes"):
        array[...] = 1


@pytest.mark.parametrize("codec_id", CODEC_IDS)
def test_plain_zarr_raises_on_a_flipped_bit(codec_id: str, tmp_path: Path) -> None:
    made = extent_of(codec_id, geometry("bfloat16"), Grid(), 2)
    path = made.write(tmp_path) / "c/0/0/0/0/0"
    data = bytearray(path.read_bytes())
    data[made.record.cells(0)[1].offset + 100] ^= 4
    path.write_bytes(data)
    array = zarr.open_array(tmp_path, mode="r")
    np.testing.assert_equal(np.asarray(array[:, :, :16]).shape, (2, 4, 16, 4, 16))
    with pytest.raises((ValueError, Unusable), match="match"):
        array[:, :, 16:]


def test_zarrs_synchronous_and_asynchronous_hooks_agree() -> None:
    """zarr 3.1 calls `_decode_single`, later ones `_decode_sync` where the codec supports it."""
    adapter = SafetensorsZarr.from_dict({"name": "lmcache_s3.safetensors", "configuration": {"kv_dtype": "bfloat16"}})
    anything: object = adapter
    assert isinstance(anything, SupportsSyncCodec)
    assert SafetensorsZarr.from_dict(adapter.to_dict()).to_dict() == adapter.to_dict()
    spec = CellSpec((2, 2, 4, 1, 8), "bfloat16")
    bits = random_bits(spec.shape, "bfloat16", np.random.default_rng(0))
    array = zarr.create_array({}, shape=spec.shape, chunks=spec.shape, dtype="uint16", fill_value=0)
    chunk_spec = array.metadata.get_chunk_spec(
        (0,) * 5, ArrayConfig(order="C", write_empty_chunks=False), default_buffer_prototype()
    )
    data = cpu.Buffer.from_bytes(make_codec("safetensors").encode(bits, spec, CellPosition(bytes(16), 0, 0, 0)))
    sync = adapter._decode_sync(data, chunk_spec).as_numpy_array()
    single = asyncio.run(adapter._decode_single(data, chunk_spec)).as_numpy_array()
    assert (sync == bits).all()
    assert (single == bits).all()
    assert adapter.compute_encoded_size(0, chunk_spec) >= len(data)


def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    extent = make_extent(make_codec("safetensors"), geometry("bfloat16"), Grid(), 2).write(tmp_path)
    whole = json.loads((extent / "zarr.json").read_bytes())
    for change in ({"kv_dtype": "int3"}, {"kv_dtype": "float32"}, {"kv_dtype": "bfloat16", "levle": 3}, {}):
        document = json.loads(json.dumps(whole))
        document["codecs"][0]["configuration"]["codecs"][0]["configuration"] = change
        (extent / "zarr.json").write_text(json.dumps(document))
        with pytest.raises(Invalid):
            zarr.open_array(extent, mode="r")[0, 0, 0]


class TestOpenExtent:
    @pytest.mark.parametrize("kv_dtype", DTYPES)
    @pytest.mark.parametrize("codec_id", ["fast", "safetensors"])
    def test_it_has_the_true_dtype(self, codec_id: str, kv_dtype: KVDtype, tmp_path: Path) -> None:
        made = make_extent(make_codec(codec_id), geometry(kv_dtype), Grid(2, 2), 3)
        array = open_extent(made.write(tmp_path).as_uri())
        assert array.dtype == TRUE_DTYPE[kv_dtype]
        assert array.shape == made.bits.shape
        assert array.nbytes == made.bits.nbytes
        assert array[...].tobytes() == made.bits.tobytes() == np.asarray(array).tobytes()
        assert (array[1, 2, 3:7].view(made.bits.dtype) == made.bits[1, 2, 3:7]).all()
        assert array[0, 0, 0, 0, 0].dtype == array.dtype
        assert array.attributes["kv_dtype"] == kv_dtype

    def test_from_memory_and_from_a_plain_path(self, tmp_path: Path) -> None:
        made = make_extent(make_codec("fast"), geometry("bfloat16"), Grid(), 2)
        memory = fsspec.filesystem("memory")
        for path, data in made.objects.items():
            memory.pipe_file(f"/bucket/extent/{path}", data)
        expected = made.bits.view(ml_dtypes.bfloat16).astype(np.float32)
        for url in ("memory://bucket/extent", str(made.write(tmp_path))):
            assert (np.asarray(open_extent(url), np.float32) == expected).all()
        memory.rm("/bucket", recursive=True)

    @pytest.mark.s3
    @pytest.mark.parametrize("codec_id", ["fast", "cachegen"])
    def test_from_a_real_s3_server(self, codec_id: str, bucket_url: str) -> None:
        made = extent_of(codec_id, geometry("bfloat16"), Grid(2, 2), 2)
        bucket, prefix = bucket_url.removeprefix("s3://").split("/", 1)
        client = boto3.client("s3")
        for path, data in made.objects.items():
            client.put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=data)
        array = open_extent(bucket_url)
        assert array[...].tobytes() == decoded_by_the_codec(made).tobytes()
        assert array.dtype == ml_dtypes.bfloat16
        client.delete_object(Bucket=bucket, Key=f"{prefix}/c/0/1/0/1/0")
        with pytest.raises(Missing):
            open_extent(bucket_url)
        with pytest.raises(Missing):
            open_extent(bucket_url + "/nowhere")

    @pytest.mark.s3
    def test_the_settings_say_where_the_server_is(self, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        made = make_extent(make_codec("fast"), geometry("bfloat16"), Grid(), 2)
        with closing(open_store(bucket_url)) as store:
            for path, data in made.objects.items():
                store.put(path, data)
        endpoint_url = os.environ["AWS_ENDPOINT_URL"]
        nobody, once = "http://127.0.0.1:1", {"retries": {"total_max_attempts": 1}}
        monkeypatch.setenv("AWS_ENDPOINT_URL", nobody)
        with pytest.raises(Unavailable, match="cannot connect to the store"):
            open_extent(bucket_url, storage_options={"endpoint_url": nobody, "config_kwargs": once})
        monkeypatch.setenv("LMCACHE_S3_ENDPOINT_URL", endpoint_url)
        monkeypatch.setenv("LMCACHE_S3_REGION", "us-east-1")
        assert open_extent(bucket_url)[...].tobytes() == made.bits.tobytes()
        monkeypatch.delenv("LMCACHE_S3_ENDPOINT_URL")
        assert open_extent(bucket_url, storage_options={"endpoint_url": endpoint_url}).shape == made.bits.shape
        with pytest.raises(Invalid):
            open_extent(bucket_url, storage_options={"endpoint_url": endpoint_url, "key": "nobody", "secret": "x"})

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(Missing):
            open_extent((tmp_path / "none").as_uri())
        with pytest.raises(Missing):
            open_extent(str(tmp_path / "none"))

    def test_a_missing_shard_is_no_zeros(self, tmp_path: Path) -> None:
        made = make_extent(make_codec("fast"), geometry("bfloat16"), Grid(2, 2), 2)
        (made.write(tmp_path) / "c/0/1/0/0/0").unlink()
        with pytest.raises(Missing, match="c/0/1/0/0/0"):
            open_extent(tmp_path.as_uri())

    def test_another_zarr_array_is_no_extent(self, tmp_path: Path) -> None:
        zarr.create_array(tmp_path, shape=(3,), dtype="uint16")
        with pytest.raises(Unusable, match="no extent"):
            open_extent(tmp_path.as_uri())

    @pytest.mark.parametrize("codec_id", CODEC_IDS)
    def test_damage_is_one_of_our_errors(self, codec_id: str, tmp_path: Path) -> None:
        made = extent_of(codec_id, geometry("bfloat16"), Grid(), 2)
        path = made.write(tmp_path) / "c/0/0/0/0/0"
        data = bytearray(path.read_bytes())
        data[70] ^= 1
        path.write_bytes(data)
        with pytest.raises(Unusable):
            open_extent(tmp_path.as_uri())[...]
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(LMCacheS3Error):
            open_extent(tmp_path.as_uri())[...]
