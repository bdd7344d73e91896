"""What the two roles of the connector tell each other, step by step.

Scheduler → workers: `StepOrders` (what to load, gather and upload). Workers → scheduler: `WorkerReport` (what is
stored, what failed). Both are plain values; vLLM carries them between its own processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from lmcache_s3.types import ChunkRef, ExtentName, Grid


@dataclass(frozen=True)
class LoadOrder:
    """Load chunks into a waiting request's blocks.

    chunks: the first one may begin before start_token (the engine has its head already). Tokens start_token …
    end_token−1 of the request go into `block_ids`, block after block.
    """

    request_id: str
    chunks: tuple[ChunkRef, ...]
    first_chunk_token: int
    start_token: int
    end_token: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class GatherOrder:
    """Copy one full chunk out of the engine after this step's forward; `staging` names the extent to be."""

    staging: str
    position: int
    prefix_hash: bytes
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class UploadOrder:
    """All chunks of an extent are gathered: encode and upload, or with `to_rest` keep the cells for a `RestedOrder`.

    parent: prefix hash of the chunk before the first.
    """

    staging: str
    name: ExtentName
    grid: Grid
    first_token: int
    hashes: bytes
    parent: bytes
    to_rest: bool


@dataclass(frozen=True)
class RestedOrder:
    """Upload an extent made of chunks that rest, named as they rest."""

    name: ExtentName
    grid: Grid
    first_token: int
    chunks: tuple[ChunkRef, ...]


@dataclass(frozen=True)
class PrefetchOrder:
    """Bring chunks from the bucket into the nearest tier; a load for the same request takes its place."""

    request_id: str
    chunks: tuple[ChunkRef, ...]


@dataclass
class StepOrders(KVConnectorMetadata):
    """One step's orders. `fail`: requests whose load cannot be ordered; workers report them failed at once. `forget`:
    extents whose cells need not rest any more.

    calibration: digest of the one to store with, where the codec needs one.
    """

    space_id: str | None = None
    calibration: str | None = None
    loads: list[LoadOrder] = field(default_factory=list)
    prefetches: list[PrefetchOrder] = field(default_factory=list)
    gathers: list[GatherOrder] = field(default_factory=list)
    uploads: list[UploadOrder] = field(default_factory=list)
    rested: list[RestedOrder] = field(default_factory=list)
    forget: list[ExtentName] = field(default_factory=list)
    discard: list[str] = field(default_factory=list)
    fail: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StoredPart:
    """One shard of an extent is in the store. lengths: u32, sums: u64, little-endian, one a chunk."""

    name: str
    shard: int
    lengths: bytes
    sums: bytes
    n_bytes: int


@dataclass(frozen=True)
class FailedPart:
    """A shard could not be stored: the extent is given up."""

    name: str
    kind: str
    message: str


@dataclass(frozen=True)
class BadExtent:
    """A request's load met bytes of this extent that it could not use, or get. kind: as in `LMCacheS3Error.kind`."""

    request_id: str
    extent: str
    unusable: bool
    kind: str
    message: str


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """What happened on one worker since the last step; `aggregate` joins ranks, the scheduler counts across steps."""

    stored: list[StoredPart] = field(default_factory=list)
    failed: list[FailedPart] = field(default_factory=list)
    bad: list[BadExtent] = field(default_factory=list)
    loads_done: int = 0
    off: str | None = None
    """Why a rank can neither load nor store; then nobody does."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        assert isinstance(other, WorkerReport)
        return WorkerReport(
            self.stored + other.stored,
            self.failed + other.failed,
            self.bad + other.bad,
            self.loads_done + other.loads_done,
            self.off or other.off,
        )

    def __bool__(self) -> bool:
        return bool(self.stored or self.failed or self.bad or self.loads_done or self.off)
