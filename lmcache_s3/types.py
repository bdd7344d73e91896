"""The words of the project as values: geometry, extents, cells, and where they lie in the bucket.

Bottom layer: standard library only, no I/O. Everything is immutable and compared by value. FORMAT.md gives the bytes.
Raises `Invalid` for arguments that make no sense and `Unusable` for stored names that cannot be read, nothing else.
"""

from __future__ import annotations

import re
import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, TypeAlias

from lmcache_s3.errors import Invalid, Unusable

FORMAT_VERSION = 1
HASH_BYTES = 16
"""Prefix hashes are kept and compared by their first 16 bytes."""

Buffer: TypeAlias = bytes | bytearray | memoryview
KVDtype = Literal["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"]

STORAGE_DTYPE: dict[str, str] = {
    "bfloat16": "uint16",
    "float16": "float16",
    "float32": "float32",
    "float8_e4m3fn": "uint8",
    "float8_e5m2": "uint8",
}
"""kv_dtype → the numpy and Zarr data type its bits are stored as (every Zarr reader knows these)."""

ITEM_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1, "float8_e5m2": 1}


class Outcome(Enum):
    """What became of a create (put-if-absent)."""

    WON = "won"
    LOST = "lost"
    UNKNOWN = "unknown"
    """No clear answer: it may have taken effect, now or later. Read back, then decide."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One line of a listing. `modified_s`: the *store's* Last-Modified, Unix seconds."""

    key: str
    size_bytes: int
    modified_s: float


@dataclass(frozen=True, slots=True)
class Grid:
    """How a writer divides a chunk into cells: `stages` equal runs of layers × `head_groups` equal runs of heads."""

    stages: int = 1
    head_groups: int = 1

    @property
    def shards(self) -> int:
        return self.stages * self.head_groups

    def shard(self, stage: int, head_group: int) -> int:
        """Shard number; shards are ordered by stage, then head group."""
        return stage * self.head_groups + head_group

    def stage_and_group(self, shard: int) -> tuple[int, int]:
        return divmod(shard, self.head_groups)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of one token's KV and of a chunk. Array axes are always `[kv, layer, token, head, channel]`.

    kv: 2 (K, V), or 1 for MLA's joint latent; `chunk_tokens` tokens make a chunk.
    """

    kv: int
    layers: int
    heads: int
    head_dim: int
    kv_dtype: KVDtype
    chunk_tokens: int

    @property
    def storage_dtype(self) -> str:
        return STORAGE_DTYPE[self.kv_dtype]

    @property
    def chunk_shape(self) -> tuple[int, int, int, int, int]:
        return (self.kv, self.layers, self.chunk_tokens, self.heads, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Raw bytes of one token's KV over all layers and heads."""
        return self.kv * self.layers * self.heads * self.head_dim * ITEM_BYTES[self.kv_dtype]

    @property
    def chunk_bytes(self) -> int:
        return self.token_bytes * self.chunk_tokens

    def divides(self, grid: Grid) -> bool:
        return self.layers % grid.stages == 0 and self.heads % grid.head_groups == 0

    def cell_shape(self, grid: Grid) -> tuple[int, int, int, int, int]:
        """Shape of one cell: a chunk of tokens × one stage's layers × one head group."""
        return (self.kv, self.layers // grid.stages, self.chunk_tokens, self.heads // grid.head_groups, self.head_dim)

    def cell_bytes(self, grid: Grid) -> int:
        """Raw (uncoded) bytes of one cell."""
        return self.chunk_bytes // grid.shards

    def cell_layers(self, grid: Grid, shard: int) -> range:
        stage, _ = grid.stage_and_group(shard)
        n = self.layers // grid.stages
        return range(stage * n, (stage + 1) * n)

    def cell_heads(self, grid: Grid, shard: int) -> range:
        _, group = grid.stage_and_group(shard)
        n = self.heads // grid.head_groups
        return range(group * n, (group + 1) * n)


_NAME = re.compile(
    r"([0-9a-f]{32})\.([1-9][0-9]{0,8})\.([a-z0-9_-]{1,64})\.(0|[1-9][0-9]{0,19})-([0-9a-f]{32})",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class ExtentName:
    """The name of one upload, used once: `<prefix hash of its last chunk>.<n chunks>.<codec>.<born>-<nonce>`.

    born: the writer's replica version when it named the extent, before uploading. Bytes behind a name never change.
    """

    last_hash: bytes
    n_chunks: int
    codec: str
    born: int
    nonce: str

    @classmethod
    def fresh(cls, last_hash: bytes, n_chunks: int, codec: str, born: int) -> ExtentName:
        return cls(last_hash, n_chunks, codec, born, secrets.token_hex(16))

    @classmethod
    def parse(cls, text: str) -> ExtentName:
        m = _NAME.fullmatch(text)
        if m is None:
            raise Unusable(f"{text[:120]!r} is not an extent's name", kind="format", key=text[:120])
        return cls(bytes.fromhex(m[1]), int(m[2]), m[3], int(m[4]), m[5])

    def __str__(self) -> str:
        return f"{self.last_hash.hex()}.{self.n_chunks}.{self.codec}.{self.born}-{self.nonce}"


def space_prefix(space_id: str) -> str:
    return f"spaces/{space_id}/"


def extent_prefix(space_id: str, name: ExtentName) -> str:
    """Key prefix of the extent's Zarr array, without a trailing slash."""
    text = str(name)
    return f"spaces/{space_id}/extents/{text[:2]}/{text}"


def shard_key(space_id: str, name: ExtentName, grid: Grid, shard: int) -> str:
    """Object key of a shard: Zarr's default chunk key; a shard divides the token axis only once, so token index 0."""
    stage, group = grid.stage_and_group(shard)
    return f"{extent_prefix(space_id, name)}/c/0/{stage}/0/{group}/0"


@dataclass(frozen=True, slots=True)
class CellRef:
    """What the index knows of one stored cell; enough to fetch it by range and to verify it.

    (extent, shard, position) identifies its bytes for ever. offset and length: bytes within the shard object.
    checksum: XXH3-64 of the stored bytes.
    prefix_hash: of its chunk; parent: of the chunk before that, empty where it is not known; first_token: tokens of the
    prompt before its *extent*. From these a tier knows a cell's place in its prompt.
    """

    extent: ExtentName
    grid: Grid
    shard: int
    position: int
    offset: int
    length: int
    checksum: int
    prefix_hash: bytes
    parent: bytes
    first_token: int

    def __hash__(self) -> int:
        # A quarter of the time of all fields' hash, and many are looked up for each load.
        return hash((self.extent.nonce, self.shard, self.position))


@dataclass(frozen=True, slots=True)
class ExtentRecord:
    """An extent as the manifest keeps it: one `add` of a version.

    hashes: n_chunks × 16 bytes, prefix hashes of its chunks in order.
    lengths: u32 little-endian, [shard][chunk]: stored bytes of each cell; cells lie one after another from offset 0.
    sums: u64 little-endian, [shard][chunk]: XXH3-64 of each stored cell.
    parent: prefix hash of the chunk before the first (of the root where first_token is 0). raw_bytes: before coding.
    """

    name: ExtentName
    grid: Grid
    parent: bytes
    first_token: int
    hashes: bytes
    lengths: bytes
    sums: bytes
    raw_bytes: int

    def __post_init__(self) -> None:
        cells = self.name.n_chunks * self.grid.shards
        if (
            len(self.parent) != HASH_BYTES
            or len(self.hashes) != HASH_BYTES * self.name.n_chunks
            or self.hashes[-HASH_BYTES:] != self.name.last_hash
            or len(self.lengths) != 4 * cells
            or len(self.sums) != 8 * cells
            or self.first_token < 0
            or self.raw_bytes <= 0
        ):
            raise Unusable(f"extent {self.name}: record does not add up", kind="format", key=str(self.name))

    @property
    def n_chunks(self) -> int:
        return self.name.n_chunks

    def chunk_hashes(self) -> Iterator[bytes]:
        for i in range(self.n_chunks):
            yield self.chunk_hash(i)

    def chunk_hash(self, position: int) -> bytes:
        return self.hashes[HASH_BYTES * position : HASH_BYTES * (position + 1)]

    @property
    def encoded_bytes(self) -> int:
        return sum(struct.unpack(f"<{len(self.lengths) // 4}I", self.lengths))

    def cells(self, shard: int, start: int = 0, stop: int | None = None) -> list[CellRef]:
        """The cells of one shard at positions start … stop−1."""
        n = self.n_chunks
        stop = n if stop is None else stop
        if not (0 <= shard < self.grid.shards and 0 <= start <= stop <= n):
            raise Invalid(f"extent {self.name}: no cells {start}…{stop} in shard {shard}", kind="argument")
        lengths = struct.unpack_from(f"<{n}I", self.lengths, 4 * n * shard)
        sums = struct.unpack_from(f"<{n}Q", self.sums, 8 * n * shard)
        offset = sum(lengths[:start])
        out = []
        parent = self.chunk_hash(start - 1) if start else self.parent
        for i in range(start, stop):
            own = self.chunk_hash(i)
            out.append(
                CellRef(self.name, self.grid, shard, i, offset, lengths[i], sums[i], own, parent, self.first_token)
            )
            parent = own
            offset += lengths[i]
        return out


class ChunkRef(NamedTuple):
    """One matched chunk: the extent that holds it and its position there."""

    prefix_hash: bytes
    extent: ExtentRecord
    position: int

    def cell(self, shard: int) -> CellRef:
        return self.extent.cells(shard, self.position, self.position + 1)[0]


def runs_of(refs: Sequence[ChunkRef]) -> list[tuple[ExtentRecord, int, int]]:
    """Runs of consecutive positions in one extent: (extent, start, stop), in order. One range GET a run and shard."""
    runs: list[tuple[ExtentRecord, int, int]] = []
    for ref in refs:
        if runs and runs[-1][0].name == ref.extent.name and runs[-1][2] == ref.position:
            runs[-1] = (ref.extent, runs[-1][1], ref.position + 1)
        else:
            runs.append((ref.extent, ref.position, ref.position + 1))
    return runs
