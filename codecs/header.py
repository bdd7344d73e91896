"""The header before every cell that is not `fast`: where the cell belongs, and a checksum of header and payload.

Zarr tells a codec neither a chunk's position nor its store, so the cell says it itself. Fixed, little-endian, 56 bytes:

    offset  bytes  field
         0      8  magic "LMS3CELL"
         8      2  header version, 1
        10      2  header length, 56
        12     16  prefix hash of the cell's chunk
        28      8  first token of the chunk in the prompt
        36      2  first layer, in the model
        38      2  number of layers
        40      2  first head, in the model
        42      2  number of heads
        44      8  payload length
        52      4  crc32c over bytes 0 … 51, then the payload

The crc is for readers without the index; the cache verifies its own XXH3-64 of the whole stored cell before decoding.
Raises `Unusable` (header, position, truncated, oversized, checksum) on anything that is not a whole, right cell.
"""

from __future__ import annotations

import struct

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.checksum import crc32c
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.types import HASH_BYTES, Buffer

MAGIC = b"LMS3CELL"
VERSION = 1
_FIELDS = struct.Struct("<8sHH16sQHHHHQ")
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CRC.size
_U16 = 0xFFFF
_U64 = 0xFFFF_FFFF_FFFF_FFFF


def wrap(payload: Buffer | list[Buffer], spec: CellSpec, position: CellPosition) -> bytes:
    """Header and payload, which may be in parts of bytes: one stored cell. One copy of the payload.

    Raises `Invalid` for a position out of range.
    """
    parts = payload if isinstance(payload, list) else [payload]
    layers, heads = spec.shape[1], spec.shape[3]
    if (
        len(position.prefix_hash) != HASH_BYTES
        or not 0 <= position.first_token <= _U64
        or not 0 <= position.first_layer <= position.first_layer + layers <= _U16
        or not 0 <= position.first_head <= position.first_head + heads <= _U16
    ):
        raise Invalid(f"a cell cannot lie at {position}", kind="argument")
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        HEADER_BYTES,
        position.prefix_hash,
        position.first_token,
        position.first_layer,
        layers,
        position.first_head,
        heads,
        sum(map(len, parts)),
    )
    crc = crc32c(fields)
    for part in parts:
        crc = crc32c(part, crc)
    return b"".join((fields, _CRC.pack(crc), *parts))


def unwrap(data: Buffer, spec: CellSpec, position: CellPosition | None, *, max_bytes: int) -> memoryview:
    """The payload of a stored cell, as a view into `data`, after every field was checked.

    position None: where the cell says it lies is not compared, but its layer and head counts still are. max_bytes: the
    longest stored cell the codec admits for this spec. Raises `Unusable`.
    """
    view = memoryview(data).cast("B")
    if len(view) > max_bytes:
        raise Unusable(f"cell of {len(view)} bytes, at most {max_bytes} are possible", kind="oversized")
    if len(view) < HEADER_BYTES:
        raise Unusable(f"cell of {len(view)} bytes is shorter than its header", kind="truncated")
    magic, version, length, prefix_hash, token, layer, layers, head, heads, payload_bytes = _FIELDS.unpack_from(view)
    if magic != MAGIC or version != VERSION or length != HEADER_BYTES:
        raise Unusable(f"no cell header of version {VERSION} (magic {magic!r}, version {version})", kind="header")
    if payload_bytes != len(view) - HEADER_BYTES:
        kind = "truncated" if payload_bytes > len(view) - HEADER_BYTES else "oversized"
        raise Unusable(f"cell holds {len(view) - HEADER_BYTES} payload bytes, header says {payload_bytes}", kind=kind)
    if (layers, heads) != (spec.shape[1], spec.shape[3]):
        raise Unusable(f"cell of {layers} layers, {heads} heads; wanted {spec.shape[1]}, {spec.shape[3]}", kind="shape")
    if position is not None and CellPosition(prefix_hash, token, layer, head) != position:
        found = CellPosition(prefix_hash, token, layer, head)
        raise Unusable(f"cell says it lies at {found}, wanted {position}", kind="position")
    payload = view[HEADER_BYTES:]
    (stored,) = _CRC.unpack_from(view, _FIELDS.size)
    if crc32c(payload, crc32c(view[: _FIELDS.size])) != stored:
        raise Unusable("cell's crc32c does not match", kind="checksum")
    return payload


def said_position(data: Buffer) -> CellPosition:
    """Where a cell that `unwrap` took says it lies."""
    _, _, _, prefix_hash, token, layer, _, head, _, _ = _FIELDS.unpack_from(memoryview(data).cast("B"))
    return CellPosition(prefix_hash, token, layer, head)
