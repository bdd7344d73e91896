"""An extent as a Zarr v3 array: the metadata and the shard objects, as bytes.

Pure. FORMAT.md gives the layout byte by byte; `open_extent` reads one with the cache's true data types.
Invariant: `zarr.json` is a function of its `lmcache_s3` attributes; a document that differs from what they ask for is
refused. Raises `Unusable` for stored bytes that cannot be used (`Missing` where nothing is stored), `Invalid` for
arguments.
"""

from __future__ import annotations

import base64
import functools
import importlib.metadata
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from lmcache_s3.codecs.base import JSON, CellSpec, KVCodec
from lmcache_s3.codecs.checksum import crc32c
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.extent_array import ExtentArray, open_extent
from lmcache_s3.types import (
    FORMAT_VERSION,
    HASH_BYTES,
    STORAGE_DTYPE,
    Buffer,
    ExtentName,
    ExtentRecord,
    Geometry,
    Grid,
    KVDtype,
)

ATTRIBUTE = "lmcache_s3"
"""The array attribute under which everything of ours lies."""

MAX_METADATA_BYTES = 64 << 20
"""No zarr.json is longer: over a million cells."""

__all__ = [
    "ATTRIBUTE",
    "DIMENSIONS",
    "MAX_METADATA_BYTES",
    "ExtentArray",
    "ExtentMetadata",
    "array_metadata",
    "build_shard",
    "open_extent",
    "package_version",
    "record_from_metadata",
    "shard_index",
    "zarr_codecs",
]

DIMENSIONS = ("kv", "layer", "token", "head", "channel")

_NO_CELL = 2**64 - 1
_LIMIT = 2**31
_U16 = 2**16 - 1
_TEXT = "[ -~]{0,200}"


@dataclass(frozen=True, slots=True)
class ExtentMetadata:
    """Everything an extent's zarr.json says. Enough to make the index's entry again."""

    record: ExtentRecord
    geometry: Geometry
    space_id: str
    codec: KVCodec
    fidelity: str
    measured_kl: float | None
    writer: str
    package_version: str


@functools.cache
def package_version() -> str:
    """The version of this package, `unknown` where it is not installed."""
    try:
        return importlib.metadata.version("lmcache-s3")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def shard_index(lengths: Sequence[int], *, slots: int | None = None) -> bytes:
    """The Zarr sharding index of a shard whose cells lie one after another from offset 0; it ends the shard object.

    lengths: stored bytes of each cell, in token order. slots: cells the shard has room for; the rest are missing.
    (offset, nbytes) as u64 little-endian pairs, then crc32c as u32 little-endian.
    """
    slots = len(lengths) if slots is None else slots
    if slots < len(lengths) or slots == 0:
        raise Invalid(f"{len(lengths)} cells in a shard of {slots}", kind="argument")
    pairs: list[int] = []
    offset = 0
    for length in lengths:
        pairs += (offset, length)
        offset += length
    pairs += [_NO_CELL] * (2 * (slots - len(lengths)))
    index = struct.pack(f"<{len(pairs)}Q", *pairs)
    return index + struct.pack("<I", crc32c(index))


def build_shard(cells: Sequence[Buffer]) -> bytes:
    """A whole shard object: the stored cells in token order, then the index."""
    return b"".join((*cells, shard_index([len(cell) for cell in cells])))


def zarr_codecs(codec: KVCodec, geometry: Geometry) -> list[JSON]:
    """The codec chain of one cell in Zarr's metadata."""
    if codec.id == "fast":
        return [_bytes_codec(geometry.storage_dtype), {"name": "crc32c"}]
    return [{"name": f"lmcache_s3.{codec.id}", "configuration": {**codec.config, "kv_dtype": geometry.kv_dtype}}]


def _bytes_codec(dtype: str) -> JSON:
    return {"name": "bytes"} if dtype == "uint8" else {"name": "bytes", "configuration": {"endian": "little"}}


def _document(metadata: ExtentMetadata) -> dict[str, JSON]:
    record, geometry, grid = metadata.record, metadata.geometry, metadata.record.grid
    tokens = record.n_chunks * geometry.chunk_tokens
    cell_shape = list(geometry.cell_shape(grid))
    shard_shape = [cell_shape[0], cell_shape[1], tokens, cell_shape[3], cell_shape[4]]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [geometry.kv, geometry.layers, tokens, geometry.heads, geometry.head_dim],
        "data_type": geometry.storage_dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": cell_shape,
                    "codecs": zarr_codecs(metadata.codec, geometry),
                    "index_codecs": [_bytes_codec("uint64"), {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {
            ATTRIBUTE: {
                "format": FORMAT_VERSION,
                "space_id": metadata.space_id,
                "name": str(record.name),
                "kv_dtype": geometry.kv_dtype,
                "codec": metadata.codec.id,
                "measured_kl": metadata.measured_kl,
                "fidelity": metadata.fidelity,
                "chunk_tokens": geometry.chunk_tokens,
                "first_token": record.first_token,
                "token_count": tokens,
                "parent": record.parent.hex(),
                "hashes": base64.b64encode(record.hashes).decode(),
                "lengths": base64.b64encode(record.lengths).decode(),
                "sums": base64.b64encode(record.sums).decode(),
                "raw_bytes": record.raw_bytes,
                "born": record.name.born,
                "writer": metadata.writer,
                "package_version": metadata.package_version,
            }
        },
        "dimension_names": list(DIMENSIONS),
    }


def array_metadata(
    record: ExtentRecord, geometry: Geometry, codec: KVCodec, *, space_id: str, fidelity: str, writer: str = ""
) -> bytes:
    """The extent's zarr.json. No token ids or text. Raises `Invalid` where record, geometry and codec disagree."""
    if not geometry.divides(record.grid):
        raise Invalid(f"{geometry} cannot be divided by {record.grid}", kind="argument")
    if codec.id != record.name.codec:
        raise Invalid(f"extent {record.name} is not of codec {codec.id!r}", kind="argument")
    for text in (fidelity, writer):
        if not re.fullmatch(_TEXT, text):
            raise Invalid(f"{text[:80]!r} is not printable ASCII of at most 200 characters", kind="argument")
    metadata = ExtentMetadata(record, geometry, space_id, codec, fidelity, codec.measured_kl, writer, package_version())
    return json.dumps(_document(metadata), indent=2, allow_nan=False).encode()


def record_from_metadata(
    zarr_json: Buffer, *, name: ExtentName | None = None, space_id: str | None = None
) -> ExtentMetadata:
    """Read an extent's zarr.json: every field checked and bounded before it is used.

    name, space_id: what its key says, compared with what the document says; None: not compared. Raises `Unusable`.
    """
    if len(zarr_json) > MAX_METADATA_BYTES:
        raise Unusable(f"zarr.json of {len(zarr_json)} bytes, at most {MAX_METADATA_BYTES} are read", kind="oversized")
    try:
        document = json.loads(bytes(zarr_json), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"zarr.json is not JSON: {error}", kind="format") from error
    attributes = _Fields(document, "zarr.json").get("attributes", dict)
    fields = _Fields(_Fields(attributes, "attributes").get(ATTRIBUTE, dict), ATTRIBUTE)
    if (version := fields.integer("format")) != FORMAT_VERSION:
        raise Unusable(f"extent of format {version}, this package reads {FORMAT_VERSION}", kind="format")
    metadata = _from_fields(document, fields)
    if name is not None and metadata.record.name != name:
        raise Unusable(f"extent {metadata.record.name} lies under the name {name}", kind="position", key=str(name))
    if space_id is not None and metadata.space_id != space_id:
        raise Unusable(f"extent of space {metadata.space_id} lies in space {space_id}", kind="position")
    expected = _document(metadata)
    for member in (*expected, *document):
        if member != "attributes" and document.get(member) != expected.get(member):
            raise Unusable(f"zarr.json: {member!r} does not fit the extent it describes", kind="format")
    return metadata


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


class _Fields:
    """Typed, bounded access to an untrusted JSON object. Raises `Unusable`."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise Unusable(f"{what} is no JSON object", kind="format")
        self.value, self.what = value, what

    def get(self, name: str, kind: type) -> Any:
        value = self.value.get(name)
        if type(value) is not kind:
            raise Unusable(f"{self.what}: {name!r} is missing or no {kind.__name__}", kind="format")
        return value

    def integer(self, name: str, low: int = 0, high: int = 2**63 - 1) -> int:
        return bounded(self.get(name, int), name, low, high)

    def text(self, name: str, pattern: str = _TEXT) -> str:
        value: str = self.get(name, str)
        if not re.fullmatch(pattern, value, re.ASCII):
            raise Unusable(f"{self.what}: {name!r} is {value[:80]!r}", kind="format")
        return value

    def packed(self, name: str) -> bytes:
        try:
            return base64.b64decode(self.get(name, str), validate=True)
        except ValueError as error:
            raise Unusable(f"{self.what}: {name!r} is no base64", kind="format") from error


def bounded(value: object, what: str, low: int, high: int) -> int:
    """An untrusted integer within low … high. Raises `Unusable`."""
    if type(value) is not int or not low <= value <= high:
        raise Unusable(f"{what} is {str(value)[:40]}, admitted are {low} to {high}", kind="format")
    return value


def _shape(value: object, what: str) -> list[int]:
    if not isinstance(value, list) or len(value) != len(DIMENSIONS):
        raise Unusable(f"{what} is no list of {len(DIMENSIONS)} lengths", kind="shape")
    return [bounded(length, what, 1, _LIMIT) for length in value]


def _from_fields(document: dict[str, Any], fields: _Fields) -> ExtentMetadata:
    name = ExtentName.parse(fields.text("name"))
    fields.integer("born", name.born, name.born)
    kv_dtype = fields.text("kv_dtype")
    if kv_dtype not in STORAGE_DTYPE:
        raise Unusable(f"kv_dtype {kv_dtype!r} is unknown", kind="format")
    chunk_tokens = fields.integer("chunk_tokens", 1, _LIMIT)
    kv, layers, tokens, heads, head_dim = _shape(document.get("shape"), "shape")
    sharding = _Fields(_first(document.get("codecs"), "codecs"), "codecs").get("configuration", dict)
    cell = _shape(_Fields(sharding, "sharding").get("chunk_shape", list), "chunk_shape")
    if (
        kv > 2
        or max(layers, heads) > _U16
        or layers % cell[1]
        or heads % cell[3]
        or tokens != name.n_chunks * chunk_tokens
    ):
        raise Unusable("zarr.json: shape, cells and token count do not add up", kind="shape")
    fields.integer("token_count", tokens, tokens)
    geometry = Geometry(kv, layers, heads, head_dim, cast(KVDtype, kv_dtype), chunk_tokens)
    grid = Grid(layers // cell[1], heads // cell[3])
    raw_bytes = geometry.chunk_bytes * name.n_chunks
    record = ExtentRecord(
        name=name,
        grid=grid,
        parent=bytes.fromhex(fields.text("parent", f"[0-9a-f]{{{2 * HASH_BYTES}}}")),
        first_token=fields.integer("first_token"),
        hashes=fields.packed("hashes"),
        lengths=fields.packed("lengths"),
        sums=fields.packed("sums"),
        raw_bytes=fields.integer("raw_bytes", raw_bytes, raw_bytes),
    )
    codec = _codec(name.codec, fields.text("codec"), _first(sharding.get("codecs"), "codecs of a cell"))
    lengths = np.frombuffer(record.lengths, "<u4")
    longest = codec.max_encoded_bytes(CellSpec.of(geometry, grid))
    if lengths.min() < 1 or lengths.max() > longest:
        raise Unusable(f"a cell of {lengths.max()} bytes, admitted are 1 to {longest}", kind="oversized")
    return ExtentMetadata(
        record=record,
        geometry=geometry,
        space_id=fields.text("space_id", "[0-9a-f]{64}"),
        codec=codec,
        fidelity=fields.text("fidelity"),
        measured_kl=_measured(fields),
        writer=fields.text("writer"),
        package_version=fields.text("package_version"),
    )


def _first(value: object, what: str) -> object:
    if not isinstance(value, list) or not value:
        raise Unusable(f"zarr.json: {what} is no list", kind="format")
    return value[0]


def _codec(named: str, stated: str, chain: object) -> KVCodec:
    """The codec that name, attribute and codec chain agree on."""
    if named != stated:
        raise Unusable(f"extent named after codec {named!r} states {stated!r}", kind="codec")
    config: dict[str, JSON] = {}
    if stated != "fast":
        config = dict(_Fields(chain, "codec").get("configuration", dict))
        config.pop("kv_dtype", None)
    try:
        return make_codec(stated, config)
    except Invalid as error:
        raise Unusable(f"codec of the extent: {error}", kind="codec") from error


def _measured(fields: _Fields) -> float | None:
    value = fields.value.get("measured_kl")
    if value is not None and (type(value) not in (int, float) or not 0 <= value < 1e6):
        raise Unusable(f"measured_kl is {str(value)[:40]}", kind="format")
    return None if value is None else float(value)
