"""Loading a checkpoint: its parquet segments, fetched and decoded side by side, become a state (FORMAT.md §5).

Bytes → `State`; I/O only through the `fetch` given. Extents come first and give every entry its place; entries are put
there some shards at a time, and made findable at the end.
Invariant: `State` → `segments.encode_checkpoint` → `segments.decode_index` + `load_checkpoint` → an equal `State`.
Raises `Unusable` (format, checksum, truncated, oversized) for anything that is not a whole, consistent checkpoint;
sizes and row counts are checked before they are believed.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmcache_s3.errors import Unusable
from lmcache_s3.index.delta import MAX_CELLS, MAX_CHUNKS, MAX_INTEGER
from lmcache_s3.index.manifest import State, state_on
from lmcache_s3.index.segments import SCHEMAS, CheckpointIndex, Segment, digest, malformed
from lmcache_s3.index.table import Codecs, Table
from lmcache_s3.kernels import extent_names, hash_index
from lmcache_s3.types import HASH_BYTES, Buffer

_MAX_ROW_BYTES = 32 + 12 * MAX_CELLS
_SHARDS_AT_ONCE = 4
"""Whose entries are put to their places together; a few more are on their way. Bounds memory."""
_STRETCH = 2**16
"""Rows whose hashes, lengths and sums fit into a core's cache."""
S = TypeVar("S")
T = TypeVar("T")


def load_checkpoint(
    index: CheckpointIndex, fetch: Callable[[Segment], Buffer], executor: Executor | None = None
) -> State:
    """The state of a checkpoint, `fetch` getting its segments; with an executor, several at once.

    What `fetch` returned may be overwritten when it is called again in the same thread. Some shards' entries are put
    where their extents keep them while the next are fetched. Raises `Unusable`, and what `fetch` raises.
    """
    shards = index.segments[0::2]
    extents = _ahead(executor, lambda one: _read(one, "extents", fetch(one)), index.segments[1::2])
    entries = _ahead(
        executor, lambda i: _entries_of(shards[i], i, _read(shards[i], "entries", fetch(shards[i]))), range(len(shards))
    )
    loading = _Loading(index, list(extents))
    while some := list(islice(entries, _SHARDS_AT_ONCE)):
        loading.place(some)
    pa.default_memory_pool().release_unused()  # what was decoded is needed no more
    return loading.state(map if executor is None else executor.map)


def _ahead(executor: Executor | None, call: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Results in the order of items. A few calls are begun at once, and one more for each that is taken: decoding keeps
    a core busy, so more of them at a time would only take memory."""
    if executor is None:
        return map(call, items)
    left = iter(items)
    width = len(os.sched_getaffinity(0)) + 1
    begun = deque(executor.submit(call, item) for item in islice(left, width))

    def taken() -> Iterator[T]:
        while begun:
            result = begun.popleft().result()
            begun.extend(executor.submit(call, item) for item in islice(left, 1))
            yield result

    return taken()


def decode_segments(index: CheckpointIndex, files: Mapping[str, bytes]) -> State:
    """The state of a checkpoint from all its segment files. Raises `Unusable`."""
    return load_checkpoint(index, lambda segment: files[segment.file])


@dataclass(frozen=True, slots=True)
class _Entries:
    """One shard's columns, as they are in its segment. offsets: where each entry's lengths and sums begin, and end."""

    file: str
    shard: int
    hashes: np.ndarray
    owner: np.ndarray
    position: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    sums: np.ndarray


def _entries_of(segment: Segment, shard: int, table: Any) -> _Entries:
    lengths, sums = (table[name].combine_chunks() for name in ("lengths", "sums"))
    if not lengths.offsets.equals(sums.offsets):
        raise malformed(f"{segment.file}: an entry has more lengths than sums, or fewer")
    return _Entries(
        segment.file,
        shard,
        _fixed(table["prefix_hash"]),
        _plain(table["extent"]),
        _plain(table["position"]),
        lengths.offsets.to_numpy(),
        lengths.values.to_numpy(),
        sums.values.to_numpy(),
    )


class _Loading:
    """A checkpoint's extents in a table, their entries on the way. For one thread."""

    def __init__(self, index: CheckpointIndex, parts: Sequence[Any]) -> None:
        self._index = index
        extents = pa.concat_tables(parts).sort_by("ordinal").combine_chunks()
        columns, codecs, self._last = _owner_columns(extents)
        self._accessed = _within_63_bits(extents["last_access"])
        self._counts = columns["counts"]
        self._widths = columns["stages"].astype(np.int64) * columns["head_groups"]
        _check_owners(index, extents, columns, self._accessed, self._widths)
        n_rows, n_cells = int(self._counts.sum()), int((self._counts * self._widths).sum())
        if n_rows != sum(segment.rows for segment in index.segments[0::2]):
            raise malformed("entries and extents do not match")
        self.table = Table(n_rows, n_cells, len(self._counts))
        self.table.reserve(n_rows, n_cells, len(self._counts))
        self.table.set_owners(columns, codecs, slice(0, len(self._counts)), 0, 0)
        self.table.n_rows, self.table.n_cells, self.table.n_owners = n_rows, n_cells, len(self._counts)
        self.table.arrays.rows.owner[:n_rows] = np.repeat(
            self.table.arrays.owners.itself[: len(self._counts)], self._counts
        )
        self.table.index_names()
        self._filled = np.zeros(n_rows, bool)

    def place(self, parts: Sequence[_Entries]) -> None:
        """Some shards' entries, to their places: those of one stretch of rows after another, which stays in the cache
        while all shards write to it."""
        a, shards = self.table.arrays, len(self._index.segments) // 2
        shift = np.uint64(16 - (shards.bit_length() - 1))
        done = [0] * len(parts)
        for until in range(_STRETCH, self.table.n_rows + _STRETCH, _STRETCH):
            for k, e in enumerate(parts):
                end = hash_index.place_entries(
                    e.hashes, e.owner, e.position, e.offsets, e.lengths, e.sums, np.uint64(e.shard), shift,
                    a.owners.starts, self._counts, self._widths, a.owners.cells,
                    a.rows.hashes, a.cells.lengths, a.cells.sums, self._filled, done[k], until,
                )  # fmt: skip
                if end < 0:
                    raise malformed(
                        f"{e.file}: entry {-1 - end} is not of its extent or shard, out of order, or has not one cell "
                        "for each shard"
                    )
                done[k] = int(end)

    def state(self, run: Callable[..., Iterable[Any]]) -> State:
        """Once all entries are there. Each row was written by one of as many entries: none twice, none missing."""
        index, a = self._index, self.table.arrays
        if not self._filled.all():
            raise malformed("entries and extents do not match")
        ends = np.cumsum(self._counts)
        if not np.array_equal(a.rows.hashes[ends - 1], self._last):
            raise malformed("an extent's last entry has not the hash of its name")
        self.table.index_all(run)
        return state_on(
            self.table, index.version, index.floor, index.lead, self._accessed, len(self._counts), self.table.n_rows
        )


def _read(segment: Segment, kind: str, data: Buffer) -> Any:
    """A segment's table, after its size, digest, schema and row count were found to be as stated."""
    if len(data) != segment.size_bytes:
        raise Unusable(f"{segment.file}: {len(data)} bytes, not {segment.size_bytes}", kind="truncated")
    if digest(data) != segment.xxh3:
        raise Unusable(f"{segment.file}: wrong digest", kind="checksum")
    try:
        file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(data)))
        wanted = SCHEMAS[kind].names
        if file.metadata.num_rows != segment.rows or _unpacked_bytes(file.metadata, wanted) > (
            2**16 + segment.rows * _MAX_ROW_BYTES
        ):
            raise malformed(f"{segment.file}: rows or sizes are not as stated")
        if any(file.schema_arrow.names.count(name) != 1 for name in wanted):
            raise malformed(f"{segment.file}: wrong schema")
        table = file.read(columns=wanted, use_threads=False).select(wanted)
        table.validate(full=True)
        for column, field in zip(table.columns, SCHEMAS[kind], strict=True):
            _check_column(segment, column, field)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise malformed(f"{segment.file}: not readable as parquet: {e}"[:200]) from e
    if table.num_rows != segment.rows:
        raise malformed(f"{segment.file}: {table.num_rows} rows, not {segment.rows}")
    return table


def _unpacked_bytes(metadata: Any, names: Sequence[str]) -> int:
    """Of these columns; others are not read."""
    columns = (
        metadata.row_group(group).column(i)
        for group in range(metadata.num_row_groups)
        for i in range(metadata.num_columns)
    )
    return sum(one.total_uncompressed_size for one in columns if one.path_in_schema.partition(".")[0] in names)


def _check_column(segment: Segment, column: Any, field: Any) -> None:
    """The type is as it should be, and nothing is null. The name of a list's element means nothing."""
    if pa.types.is_list(field.type):
        right = pa.types.is_list(column.type) and column.type.value_type == field.type.value_type
        nulls = column.null_count + sum(chunk.values.null_count for chunk in column.chunks) if right else 0
    else:
        right, nulls = column.type == field.type, column.null_count
    if not right or nulls:
        raise malformed(f"{segment.file}: wrong schema")


_CODEC = re.compile(r"[a-z0-9_-]{1,64}", re.ASCII)


def _owner_columns(extents: Any) -> tuple[dict[str, np.ndarray], Codecs, np.ndarray]:
    """(columns for a `Table`, codecs, last hashes) of the extents table, sorted by ordinal. Names are parsed."""
    n = extents.num_rows
    last, nonces = np.empty((n, HASH_BYTES), np.uint8), np.empty((n, HASH_BYTES), np.uint8)
    counts, born = np.empty(n, np.int64), np.empty(n, np.int64)
    codecs = extents["codec"].combine_chunks()
    bad = extent_names.parse(
        *_text(extents["name"].combine_chunks()), *_text(codecs), MAX_CHUNKS, MAX_INTEGER, last, counts, born, nonces
    )
    if bad >= 0:
        raise malformed(f"{str(extents['name'][int(bad)])[:120]!r} is not an extent's name, or of another codec")
    known = codecs.dictionary_encode()
    if not all(_CODEC.fullmatch(codec) for codec in known.dictionary.to_pylist()):
        raise malformed("a codec's name has other characters than a-z, 0-9, _ and -, or too many")
    columns = {
        "nonces": nonces.view(np.uint64),
        "parents": _fixed(extents["parent"]),
        "counts": counts,
        "stages": _plain(extents["stages"]),
        "head_groups": _plain(extents["head_groups"]),
        "born": born,
        "place": _plain(extents["place"]),
    } | {name: _within_63_bits(extents[name]) for name in ("first_token", "raw_bytes", "created")}
    if not np.array_equal(born, _within_63_bits(extents["born"])):
        raise malformed("an extent's born is not that of its name")
    return columns, (known.dictionary.to_pylist(), known.indices.to_numpy()), last.view(np.uint64)


def _text(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """(u8, i32 [n + 1]) of a string column in one piece: its bytes and where each string lies in them."""
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int32, len(column) + 1, 4 * column.offset) if offsets else np.zeros(1, np.int32)
    return np.frombuffer(data or b"", np.uint8), bounds


def _check_owners(
    index: CheckpointIndex, extents: Any, columns: Mapping[str, np.ndarray], accessed: np.ndarray, widths: np.ndarray
) -> None:
    """The format's bounds, and what every state keeps: order of first add, versions that can be, names once."""
    n, counts, created = len(widths), columns["counts"], columns["created"]
    if not np.array_equal(_plain(extents["ordinal"]), np.arange(n)):
        raise malformed("ordinals are not 0, 1, 2, …")
    cells = counts * widths
    if (
        (columns["stages"] < 1).any()
        or (columns["head_groups"] < 1).any()
        or (columns["stages"] > MAX_CELLS).any()
        or (columns["head_groups"] > MAX_CELLS).any()
        or (counts > MAX_CHUNKS).any()
        or (cells > MAX_CELLS).any()
        or (columns["raw_bytes"] < 1).any()
    ):
        raise malformed("an extent is beyond the format's bounds")
    if ((created < 1) | (created > accessed) | (accessed > index.version)).any():
        raise malformed("an extent was created or last accessed at an impossible version")
    ahead = (created[1:] > created[:-1]) | (
        (created[1:] == created[:-1]) & (columns["place"][1:] > columns["place"][:-1])
    )
    if not ahead.all():
        raise malformed("extents are not in order of first add")
    # Two extents may share a nonce, but hardly ever do: only then are whole names compared.
    if len(np.unique(columns["nonces"][:, 0])) != n and len(extents["name"].combine_chunks().unique()) != n:
        raise malformed("an extent occurs twice")


def _within_63_bits(column: Any) -> np.ndarray:
    values = _plain(column)
    if len(values) and int(values.max()) > MAX_INTEGER:
        raise malformed("a number beyond 63 bits")
    return values.astype(np.int64)


def _plain(column: Any) -> np.ndarray:
    """A column of integers, as one array."""
    out: np.ndarray = column.combine_chunks().to_numpy()
    return out


def _fixed(column: Any) -> np.ndarray:
    """A column of 16-byte values as u64 [n, 2]: their bytes."""
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint64, 2 * len(chunk), HASH_BYTES * chunk.offset).reshape(-1, 2)
        for chunk in column.chunks
        if len(chunk)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty((0, 2), np.uint64)])
