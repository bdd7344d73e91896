"""Checkpoints: a whole state as parquet segments and one JSON index, and back (FORMAT.md §5).

Pure: bytes ↔ `State`, no I/O. Entries (one row per live extent and chunk) are sharded by the top bits of their prefix
hash, extents by the top bits of their last one; the number of shards is a power of two. An extent's `ordinal` is its
rank in the order of first add over all shards; entries name their extent by it.
Invariant: `State` → `encode_checkpoint` → `decode_index` + `decode_segments` → an equal `State`.
Raises `Unusable` (format, checksum, truncated, oversized) for anything that is not a whole, consistent checkpoint;
sizes and row counts are checked before they are believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from immutables import Map

from lmcache_s3.errors import Unusable
from lmcache_s3.index.delta import MAX_CELLS, MAX_INTEGER, check_format, check_record, integer, load_json, name_of
from lmcache_s3.index.manifest import LiveExtent, State
from lmcache_s3.types import FORMAT_VERSION, HASH_BYTES, ChunkRef, ExtentName, ExtentRecord, Grid

ENTRIES_PER_SHARD = 2**18
MAX_SHARDS = 2**12
MAX_INDEX_BYTES = 4 * 2**20
MAX_SEGMENT_BYTES = 2**30
MAX_ROWS = 2**26
"""Rows of one segment file."""
_MAX_ROW_BYTES = 32 + 12 * MAX_CELLS

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
_SCHEMAS = {"entries": ENTRIES_SCHEMA, "extents": EXTENTS_SCHEMA}


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
    live = list(state.in_order())
    rows = sum(extent.record.n_chunks for extent in live)
    shards = 1
    while shards < MAX_SHARDS and rows > shards * entries_per_shard:
        shards *= 2
    files: dict[str, bytes] = {}
    lines = []
    tables = {"entries": _entries_table(live), "extents": _extents_table(live)}
    keys = {
        "entries": b"".join(extent.record.hashes for extent in live),
        "extents": b"".join(extent.record.name.last_hash for extent in live),
    }
    owners = {kind: _shard_of(hashes, shards) for kind, hashes in keys.items()}
    for shard in range(shards):
        for kind, table in tables.items():
            part = table if shards == 1 else table.filter(pa.array(owners[kind] == shard))
            sink = pa.BufferOutputStream()
            pq.write_table(part, sink, compression="zstd", use_dictionary=False, store_schema=False)
            data = sink.getvalue().to_pybytes()
            file = file_name(shard, kind)
            files[file] = data
            lines.append({"file": file, "bytes": len(data), "xxh3": _digest(data), "rows": part.num_rows})
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
        raise _bad("the index is of another checkpoint than its key says")
    lead, writer, listed = document.get("lead"), document.get("writer"), document.get("segments")
    if not (lead is None or isinstance(lead, str)) or not isinstance(writer, str) or not isinstance(listed, list):
        raise _bad("lead, writer or segments of the wrong type")
    shards, odd = divmod(len(listed), 2)
    if odd or shards < 1 or shards > MAX_SHARDS or shards & (shards - 1):
        raise _bad(f"{len(listed)} segments: not two for each of a power of two of shards")
    segments = []
    for i, item in enumerate(listed):
        file = file_name(i // 2, ("entries", "extents")[i % 2])
        if not isinstance(item, dict) or item.get("file") != file or not isinstance(item.get("xxh3"), str):
            raise _bad(f"segment {i} is not {file}")
        size_bytes = integer(item.get("bytes"), "bytes", low=1, high=MAX_SEGMENT_BYTES)
        rows = integer(item.get("rows"), "rows", high=MAX_ROWS)
        segments.append(Segment(file, size_bytes, item["xxh3"], rows))
    floor = integer(document.get("floor"), "floor", high=version)
    return CheckpointIndex(version, nonce, floor, lead or None, writer, tuple(segments))


def decode_segments(index: CheckpointIndex, files: Mapping[str, bytes]) -> State:
    """The state of a checkpoint from all its segment files. Raises `Unusable`."""
    tables: dict[str, list[Any]] = {"entries": [], "extents": []}
    shards = len(index.segments) // 2
    for i, segment in enumerate(index.segments):
        kind = ("entries", "extents")[i % 2]
        table = _read(segment, kind, files[segment.file])
        column = table["prefix_hash"] if kind == "entries" else None
        if column is not None and (_shard_of(_fixed(column), shards) != i // 2).any():
            raise _bad(f"{segment.file}: an entry of another shard")
        tables[kind].append(table)
    live = _extents(index, pa.concat_tables(tables["extents"]), pa.concat_tables(tables["entries"]))
    extents: dict[ExtentName, LiveExtent] = {}
    chunks: dict[bytes, tuple[ChunkRef, ...]] = {}
    for extent in live:
        record = extent.record
        if record.name in extents:
            raise _bad(f"extent {record.name} occurs twice")
        extents[record.name] = extent
        for position, prefix_hash in enumerate(record.chunk_hashes()):
            chunks[prefix_hash] = (*chunks.get(prefix_hash, ()), ChunkRef(prefix_hash, record, position))
    return State(index.version, index.floor, index.lead, Map(extents), Map(chunks))


def file_name(shard: int, kind: str) -> str:
    return f"{shard:05d}.{kind}.parquet"


def _shard_of(hashes: bytes, shards: int) -> np.ndarray:
    """Shard number of each 16-byte hash: its top log2(shards) bits."""
    top = np.frombuffer(hashes, dtype=">u4").reshape(-1, HASH_BYTES // 4)[:, 0].astype(np.uint64)
    out: np.ndarray = top >> np.uint64(32 - (shards.bit_length() - 1))
    return out


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _entries_table(live: Sequence[LiveExtent]) -> Any:
    """Rows in order of first add, then position. lengths and sums: one per shard of the extent's grid."""
    lengths, sums, counts, owners, positions = [], [], [], [], []
    for ordinal, extent in enumerate(live):
        record = extent.record
        n, shards = record.n_chunks, record.grid.shards
        lengths.append(np.frombuffer(record.lengths, "<u4").reshape(shards, n).T.ravel())
        sums.append(np.frombuffer(record.sums, "<u8").reshape(shards, n).T.ravel())
        counts.append(np.full(n, shards, np.int64))
        owners.append(np.full(n, ordinal, np.uint32))
        positions.append(np.arange(n, dtype=np.uint16))
    offsets = np.concatenate([[0], np.cumsum(_joined(counts, np.int64))]).astype(np.int32)
    hashes = b"".join(extent.record.hashes for extent in live)
    rows = len(hashes) // HASH_BYTES
    columns = [
        pa.Array.from_buffers(pa.binary(HASH_BYTES), rows, [None, pa.py_buffer(hashes)]),
        pa.array(_joined(owners, np.uint32)),
        pa.array(_joined(positions, np.uint16)),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(_joined(lengths, np.uint32)), type=_type("lengths")),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(_joined(sums, np.uint64)), type=_type("sums")),
    ]
    return pa.Table.from_arrays(columns, schema=ENTRIES_SCHEMA)


def _extents_table(live: Sequence[LiveExtent]) -> Any:
    rows = [
        {
            "ordinal": ordinal,
            "name": str(extent.record.name),
            "parent": extent.record.parent,
            "first_token": extent.record.first_token,
            "stages": extent.record.grid.stages,
            "head_groups": extent.record.grid.head_groups,
            "born": extent.record.name.born,
            "codec": extent.record.name.codec,
            "raw_bytes": extent.record.raw_bytes,
            "created": extent.created,
            "place": extent.place,
            "last_access": extent.last_access,
        }
        for ordinal, extent in enumerate(live)
    ]
    return pa.Table.from_pylist(rows, schema=EXTENTS_SCHEMA)


def _read(segment: Segment, kind: str, data: bytes) -> Any:
    """A segment's table, after its size, digest, schema and row count were found to be as stated."""
    if len(data) != segment.size_bytes:
        raise Unusable(f"{segment.file}: {len(data)} bytes, not {segment.size_bytes}", kind="truncated")
    if _digest(data) != segment.xxh3:
        raise Unusable(f"{segment.file}: wrong digest", kind="checksum")
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        metadata = file.metadata
        unpacked = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        if metadata.num_rows != segment.rows or unpacked > 2**16 + segment.rows * _MAX_ROW_BYTES:
            raise _bad(f"{segment.file}: rows or sizes are not as stated")
        if not file.schema_arrow.equals(_SCHEMAS[kind]):
            raise _bad(f"{segment.file}: wrong schema")
        table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise _bad(f"{segment.file}: not readable as parquet: {e}"[:200]) from e
    if table.num_rows != segment.rows:
        raise _bad(f"{segment.file}: {table.num_rows} rows, not {segment.rows}")
    return table


def _extents(index: CheckpointIndex, extents: Any, entries: Any) -> list[LiveExtent]:
    """All live extents in order of first add; every entry must belong to one, every chunk of one have an entry."""
    rows = sorted(extents.to_pylist(), key=lambda row: row["ordinal"])
    names = [name_of(row["name"]) for row in rows]
    shards = np.array([row["stages"] * row["head_groups"] for row in rows], np.int64)
    counts = np.array([name.n_chunks for name in names], np.int64)
    if [row["ordinal"] for row in rows] != list(range(len(rows))):
        raise _bad("ordinals are not 0, 1, 2, …")
    owner = entries["extent"].to_numpy().astype(np.int64)
    position = entries["position"].to_numpy().astype(np.int64)
    order = np.lexsort((position, owner))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if (
        len(owner) != starts[-1]
        or not np.array_equal(owner[order], np.repeat(np.arange(len(rows)), counts))
        or not np.array_equal(position[order], np.arange(len(owner)) - np.repeat(starts[:-1], counts))
    ):
        raise _bad("entries and extents do not match")
    entries = entries.take(pa.array(order)).combine_chunks()
    hashes = _fixed(entries["prefix_hash"])
    per_entry = np.repeat(shards, counts)
    lengths = _lists(entries["lengths"], per_entry, "<u4")
    sums = _lists(entries["sums"], per_entry, "<u8")
    live: list[LiveExtent] = []
    cell = 0
    for i, row in enumerate(rows):
        n, width = names[i].n_chunks, int(shards[i])
        record = ExtentRecord(
            name=names[i],
            grid=Grid(row["stages"], row["head_groups"]),
            parent=row["parent"],
            first_token=row["first_token"],
            hashes=hashes[HASH_BYTES * starts[i] : HASH_BYTES * starts[i + 1]],
            lengths=lengths[cell : cell + n * width].reshape(n, width).T.tobytes(),
            sums=sums[cell : cell + n * width].reshape(n, width).T.tobytes(),
            raw_bytes=row["raw_bytes"],
        )
        cell += n * width
        check_record(record)
        extent = LiveExtent(record, row["created"], row["last_access"], row["place"])
        _check_extent(index, row, extent, live[-1] if live else None)
        live.append(extent)
    return live


def _check_extent(
    index: CheckpointIndex, row: Mapping[str, Any], extent: LiveExtent, before: LiveExtent | None
) -> None:
    name = extent.record.name
    if row["born"] != name.born or row["codec"] != name.codec:
        raise _bad(f"extent {name}: born or codec are not those of its name")
    if not 1 <= extent.created <= extent.last_access <= index.version <= MAX_INTEGER:
        raise _bad(f"extent {name}: created or last accessed at an impossible version")
    if before is not None and before.order >= extent.order:
        raise _bad(f"extent {name}: not in order of first add")


def _fixed(column: Any) -> bytes:
    """The bytes of a fixed-size binary column, end to end."""
    return b"".join(
        chunk.buffers()[1].slice(chunk.offset * HASH_BYTES, len(chunk) * HASH_BYTES).to_pybytes()
        for chunk in column.chunks
        if len(chunk)
    )


def _lists(column: Any, widths: np.ndarray, dtype: str) -> np.ndarray:
    """The flat values of a list column whose i-th list must be `widths[i]` long."""
    found = np.concatenate([chunk.value_lengths().to_numpy() for chunk in column.chunks] or [np.empty(0, np.int32)])
    if not np.array_equal(found, widths):
        raise _bad("an entry has not one length and one sum for each shard of its extent")
    parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
    return _joined(parts, np.dtype(dtype))


def _joined(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)


def _type(column: str) -> Any:
    return ENTRIES_SCHEMA.field(column).type


def _bad(why: str) -> Unusable:
    return Unusable(why, kind="format")
