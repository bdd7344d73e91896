"""Checkpoints: a whole state as parquet segments and one JSON index (FORMAT.md §5); `checkpoint_loading` is back.

`State` → bytes, and the index's own bytes. Pure. Entries (one row per live extent and chunk) are sharded by the
top bits of their prefix hash, extents by those of their last one; the number of shards is a power of two. An extent's
`ordinal` is its rank in the order of first add over all shards; entries name their extent by it.
Raises `Unusable` (format, oversized) for an index that is not one, and for a state too large to be a checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from lmcache_s3.errors import Unusable
from lmcache_s3.index.delta import check_format, integer, load_json, ulid_of
from lmcache_s3.index.manifest import State
from lmcache_s3.index.table import Batch, gathered
from lmcache_s3.kernels import hash_index
from lmcache_s3.types import FORMAT_VERSION, HASH_BYTES, Buffer

ENTRIES_PER_SHARD = 2**20
MAX_SHARDS = 2**12
MAX_INDEX_BYTES = 4 * 2**20
MAX_SEGMENT_BYTES = 2**30
MAX_ROWS = 2**26
"""Rows of one segment file."""
ENTRIES_SCHEMA = pa.schema(
    [
        pa.field("prefix_hash", pa.binary(HASH_BYTES), nullable=False),
        pa.field("extent", pa.uint32(), nullable=False),
        pa.field("position", pa.uint16(), nullable=False),
        pa.field("lengths", pa.list_(pa.field("element", pa.uint32(), nullable=False)), nullable=False),
        pa.field("sums", pa.list_(pa.field("element", pa.uint64(), nullable=False)), nullable=False),
    ]
)
EXTENTS_SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.uint32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("parent", pa.binary(HASH_BYTES), nullable=False),
        pa.field("first_token", pa.uint64(), nullable=False),
        pa.field("stages", pa.uint32(), nullable=False),
        pa.field("head_groups", pa.uint32(), nullable=False),
        pa.field("born", pa.uint64(), nullable=False),
        pa.field("codec", pa.string(), nullable=False),
        pa.field("raw_bytes", pa.uint64(), nullable=False),
        pa.field("created", pa.uint64(), nullable=False),
        pa.field("place", pa.uint32(), nullable=False),
        pa.field("last_access", pa.uint64(), nullable=False),
    ]
)
SCHEMAS = {"entries": ENTRIES_SCHEMA, "extents": EXTENTS_SCHEMA}
_HOW: dict[str, dict[str, Any]] = {
    # No compressor makes hashes and checksums smaller, and the rest is numbers that packed deltas do as well for.
    "entries": {
        "compression": "none",
        "column_encoding": {"prefix_hash": "PLAIN", "sums.list.element": "PLAIN"}
        | dict.fromkeys(("extent", "position", "lengths.list.element"), "DELTA_BINARY_PACKED"),
        "write_statistics": False,
    },
    "extents": {"compression": "zstd"},
}


@dataclass(frozen=True, slots=True)
class Segment:
    """One line of a checkpoint's index. file: name under the checkpoint's segment prefix; xxh3: XXH3-128, hex."""

    file: str
    size_bytes: int
    xxh3: str
    rows: int


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """What the index object says; `segments` holds, for shard 0, 1, …, the entries file, then the extents file."""

    version: int
    nonce: str
    floor: int
    lead: str | None
    writer: str
    segments: tuple[Segment, ...]

    @property
    def size_bytes(self) -> int:
        return sum(segment.size_bytes for segment in self.segments)


def encode_checkpoint(
    state: State, nonce: str, writer: str, *, entries_per_shard: int = ENTRIES_PER_SHARD
) -> tuple[dict[str, bytes], bytes]:
    """({segment file name: bytes}, index bytes) of a state. Put the segments first, then the index."""
    owners = state.live_owners()
    live = gathered(state.table, state.arrays, owners)
    shards = 1
    while shards < MAX_SHARDS and len(live.hashes) > shards * entries_per_shard:
        shards *= 2
    tables = {"entries": _entries_table(live), "extents": _extents_table(live, state.last_access(owners))}
    last = live.hashes[np.cumsum(live.owners["counts"]) - 1]
    in_shard = {"entries": _shard_of(live.hashes, shards), "extents": _shard_of(last, shards)}
    files: dict[str, bytes] = {}
    lines = []
    for shard in range(shards):
        for kind, table in tables.items():
            part = table if shards == 1 else table.filter(pa.array(in_shard[kind] == shard))
            sink = pa.BufferOutputStream()
            pq.write_table(part, sink, use_dictionary=False, store_schema=False, **_HOW[kind])
            data = sink.getvalue().to_pybytes()
            file = file_name(shard, kind)
            files[file] = data
            lines.append({"file": file, "bytes": len(data), "xxh3": digest(data), "rows": part.num_rows})
    document = {
        "format": FORMAT_VERSION,
        "version": state.version,
        "nonce": nonce,
        "floor": state.floor,
        "lead": state.lead,
        "writer": writer,
        "segments": lines,
    }
    return files, json.dumps(document, separators=(",", ":")).encode()


def decode_index(data: bytes, version: int, nonce: str) -> CheckpointIndex:
    """The index stored under the key of (version, nonce). Unknown keys are ignored. Raises `Unusable`."""
    document = load_json(data, MAX_INDEX_BYTES)
    check_format(document)
    if integer(document.get("version"), "version") != version or document.get("nonce") != nonce:
        raise malformed("the index is of another checkpoint than its key says")
    lead, writer, listed = document.get("lead"), ulid_of(document.get("writer")), document.get("segments")
    if lead is not None:
        lead = ulid_of(lead)
    if not isinstance(listed, list):
        raise malformed("segments is not a list")
    shards, odd = divmod(len(listed), 2)
    if odd or shards < 1 or shards > MAX_SHARDS or shards & (shards - 1):
        raise malformed(f"{len(listed)} segments: not two for each of a power of two of shards")
    segments = []
    for i, item in enumerate(listed):
        file = file_name(i // 2, ("entries", "extents")[i % 2])
        if not isinstance(item, dict) or item.get("file") != file or not isinstance(item.get("xxh3"), str):
            raise malformed(f"segment {i} is not {file}")
        size_bytes = integer(item.get("bytes"), "bytes", low=1, high=MAX_SEGMENT_BYTES)
        rows = integer(item.get("rows"), "rows", high=MAX_ROWS)
        if i % 2 == 0 and rows * HASH_BYTES > size_bytes:  # hashes do not compress: memory for them is bounded by bytes
            raise malformed(f"{file}: {rows} entries cannot lie in {size_bytes} bytes")
        segments.append(Segment(file, size_bytes, item["xxh3"], rows))
    floor = integer(document.get("floor"), "floor", high=version)
    return CheckpointIndex(version, nonce, floor, lead, writer, tuple(segments))


def file_name(shard: int, kind: str) -> str:
    return f"{shard:05d}.{kind}.parquet"


def _shard_of(hashes: np.ndarray, shards: int) -> np.ndarray:
    """Shard number of each hash (u64 [n, 2], its bytes): its top log2(shards) bits."""
    top = np.ascontiguousarray(hashes).view(">u4").reshape(-1, HASH_BYTES // 4)[:, 0].astype(np.uint64)
    out: np.ndarray = top >> np.uint64(32 - (shards.bit_length() - 1))
    return out


def digest(data: Buffer) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _entries_table(live: Batch) -> Any:
    """Rows in order of first add, then position. lengths and sums: one per shard of the extent's grid."""
    counts = live.owners["counts"]
    widths = live.owners["stages"].astype(np.int64) * live.owners["head_groups"]
    cells = counts * widths
    firsts = np.cumsum(cells) - cells
    lengths, sums = np.empty_like(live.lengths), np.empty_like(live.sums)
    hash_index.to_entries(live.lengths, firsts, counts, widths, lengths)
    hash_index.to_entries(live.sums, firsts, counts, widths, sums)
    offsets = np.zeros(len(live.hashes) + 1, np.int64)
    np.cumsum(np.repeat(widths, counts), out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise Unusable(f"{offsets[-1]} cells are more than a checkpoint can hold", kind="oversized")
    offsets = offsets.astype(np.int32)
    begins = np.cumsum(counts) - counts
    columns = [
        pa.Array.from_buffers(pa.binary(HASH_BYTES), len(live.hashes), [None, pa.py_buffer(live.hashes)]),
        pa.array(np.repeat(np.arange(len(counts), dtype=np.uint32), counts)),
        pa.array((np.arange(len(live.hashes)) - np.repeat(begins, counts)).astype(np.uint16)),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(lengths), type=_type("lengths")),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(sums), type=_type("sums")),
    ]
    return pa.Table.from_arrays(columns, schema=ENTRIES_SCHEMA)


def _extents_table(live: Batch, last_access: np.ndarray) -> Any:
    o, counts = live.owners, live.owners["counts"]
    last = live.hashes[np.cumsum(counts) - 1]
    names, which = live.codecs
    codecs = pa.array(names, pa.string()).take(pa.array(which))
    name = pc.binary_join_element_wise(
        _hex(last),
        pc.cast(pa.array(counts), pa.string()),
        codecs,
        pc.binary_join_element_wise(pc.cast(pa.array(o["born"]), pa.string()), _hex(o["nonces"]), "-"),
        ".",
    )
    columns = {
        "ordinal": pa.array(np.arange(len(counts), dtype=np.uint32)),
        "name": name,
        "parent": pa.Array.from_buffers(
            pa.binary(HASH_BYTES), len(counts), [None, pa.py_buffer(np.ascontiguousarray(o["parents"]))]
        ),
        "codec": codecs,
        "last_access": pa.array(last_access.astype(np.uint64)),
    }
    for field in EXTENTS_SCHEMA:
        if field.name not in columns:
            columns[field.name] = pa.array(o[field.name].astype(field.type.to_pandas_dtype()))
    return pa.Table.from_arrays([columns[field.name] for field in EXTENTS_SCHEMA], schema=EXTENTS_SCHEMA)


def _hex(pairs: np.ndarray) -> Any:
    """16-byte values (u64 [n, 2]) as a column of hex strings."""
    digits = np.frombuffer(np.ascontiguousarray(pairs).tobytes().hex().encode(), f"S{2 * HASH_BYTES}")
    return pa.array(digits.astype(f"U{2 * HASH_BYTES}"), pa.string())


def _type(column: str) -> Any:
    return ENTRIES_SCHEMA.field(column).type


def malformed(why: str) -> Unusable:
    return Unusable(why, kind="format")
