"""Make the golden bytes that are missing: `python tests/golden/make.py`. Never changes one that is there.

One folder per format version. A stored cell of every codec, level and dtype; one extent's zarr.json and shard; and the
SHA-256 of what each cell decodes to. The cell coded is made by integer arithmetic, so it is the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.cachegen import LEVELS
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.codecs.dtypes import from_float32
from lmcache_s3.codecs.registry import CODEC_IDS, make_codec
from lmcache_s3.testing.calibrations import made_calibration
from lmcache_s3.testing.extents import make_extent
from lmcache_s3.types import FORMAT_VERSION, Geometry, Grid, KVDtype

FOLDER = Path(__file__).parent / f"v{FORMAT_VERSION}"
SHAPE = (2, 3, 40, 2, 16)
DTYPES: tuple[KVDtype, ...] = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")
POSITION = CellPosition(bytes.fromhex("b098794899605172f5df0077b32a6a43"), 0, 3, 2)
GEOMETRY = Geometry(2, 2, 2, 8, "bfloat16", 4)


def golden_cell(kv_dtype: KVDtype) -> np.ndarray:
    """Bits of values that look like a cache's: sums of small pseudo-random numbers, channels of different widths."""
    count = int(np.prod(SHAPE))
    number = np.arange(count * 4, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    number = (number ^ (number >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(2**32)
    parts = ((number >> np.uint64(20)).astype(np.int64) - 2048).reshape(4, *SHAPE)
    width = 2 ** (np.arange(SHAPE[4]) % 4)
    offset = (np.arange(SHAPE[4]) % 5 - 2) * 1024
    return from_float32(((parts.sum(axis=0) * width + offset) / 4096).astype(np.float32), kv_dtype)


def codecs() -> dict[str, KVCodec]:
    """File stem → codec."""
    named = {id: make_codec(id) for id in CODEC_IDS if id not in ("cachegen", "transform")}
    return named | {f"cachegen-{level}": make_codec("cachegen", {"level": level}) for level in LEVELS}


def calibration_name(kv_dtype: KVDtype) -> str:
    return f"transform.{kv_dtype}.safetensors"


def golden_calibration(kv_dtype: KVDtype) -> bytes:
    """The file if there is one, else a new one: its random rotations differ between machines."""
    path = FOLDER / calibration_name(kv_dtype)
    if path.exists():
        return path.read_bytes()
    made = made_calibration(
        CellSpec(SHAPE, kv_dtype),
        joint=True,
        streams=(2, 0),
        live=24,
        rotary=12,
        fewer=0.1,
        first_layer=POSITION.first_layer,
        first_head=POSITION.first_head,
    )
    return made.to_bytes()


def transform(kv_dtype: KVDtype) -> KVCodec:
    """The codec, its golden calibration known."""
    calibration = Calibration.from_bytes(golden_calibration(kv_dtype))
    return make_codec("transform", {"calibration": calibrations.register(calibration)})


def decoded(codec: KVCodec, data: bytes, kv_dtype: KVDtype) -> bytes:
    out = np.empty_like(golden_cell(kv_dtype))
    codec.decode(data, CellSpec(SHAPE, kv_dtype), POSITION, out)
    return out.tobytes()


def everything() -> dict[str, bytes]:
    """File name → the bytes that this version of the code writes."""
    files: dict[str, bytes] = {}
    sums: dict[str, str] = {}
    for stem, codec in codecs().items():
        for kv_dtype in DTYPES:
            name = f"{stem}.{kv_dtype}.cell"
            files[name] = codec.encode(golden_cell(kv_dtype), CellSpec(SHAPE, kv_dtype), POSITION)
            sums[name] = hashlib.sha256(decoded(codec, files[name], kv_dtype)).hexdigest()
    for kv_dtype in DTYPES:
        codec, name = transform(kv_dtype), f"transform.{kv_dtype}.cell"
        files[calibration_name(kv_dtype)] = golden_calibration(kv_dtype)
        # Its bytes depend on how a machine rounds the sums of its encoder: those that are there stay.
        path = FOLDER / name
        files[name] = (
            path.read_bytes()
            if path.exists()
            else codec.encode(golden_cell(kv_dtype), CellSpec(SHAPE, kv_dtype), POSITION)
        )
        sums[name] = hashlib.sha256(decoded(codec, files[name], kv_dtype)).hexdigest()
    extent = make_extent(make_codec("fast"), GEOMETRY, Grid(2, 1), 2)
    files["fast.zarr.json"] = extent.objects["zarr.json"]
    files["fast.shard"] = extent.objects["c/0/0/0/0/0"]
    files["decoded.json"] = json.dumps(sums, indent=2, sort_keys=True).encode() + b"\n"
    return files


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name, data in everything().items():
        path = FOLDER / name
        if not path.exists():
            path.write_bytes(data)
            print(f"made {path}")
        elif path.read_bytes() != data:
            print(f"{path} is there and differs: left as it is. A new format version needs a new folder.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
