"""Run a trace through tiers and a bucket; count hits by tier, bytes moved, requests and dollars.

Each chunk is had from the first tier that holds it; every tier is then offered the whole prompt, so what was found
below moves up. The bucket keeps what it takes. Requests to the bucket: an extent of new chunks is two PUTs, and a
second with commits a third; a run of cells read from one extent is one GET. Prices are S3 Standard's.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmcache_s3.analysis.pulse import DOLLARS_PER_GET, DOLLARS_PER_PUT
from lmcache_s3.replay.tiers import make_tier
from lmcache_s3.replay.trace import Trace, Use
from lmcache_s3.tiers.eviction.admission import SecondTouch

OBJECT = "object"


@dataclass(frozen=True, slots=True)
class TierPlan:
    """One tier. capacity_bytes: None of the bucket, which has no end."""

    name: str
    capacity_bytes: int | None


@dataclass(slots=True)
class Outcome:
    """What a policy made of the trace. By tier: tokens had from it, bytes read and written."""

    policy: str
    input_tokens: int
    hit_tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    read_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    written_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    puts: int = 0
    gets: int = 0
    stored_bytes: int = 0
    """In the bucket at the end."""

    @property
    def hit_rate(self) -> float:
        return sum(self.hit_tokens.values()) / max(1, self.input_tokens)

    @property
    def request_dollars(self) -> float:
        return self.puts * DOLLARS_PER_PUT + self.gets * DOLLARS_PER_GET


class Bucket:
    """What lies in the object tier. admission: None takes all."""

    def __init__(self, admission: SecondTouch | None = None, extent_chunks: int = 16) -> None:
        self._admission, self._extent_chunks = admission, extent_chunks
        self._extents: dict[int, int] = {}
        self._last_extent = 0
        self._version_s: int | None = None
        self.puts = 0

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._extents

    def __len__(self) -> int:
        return len(self._extents)

    def gets(self, chunks: Sequence[int]) -> int:
        return len({self._extents[chunk] for chunk in chunks})

    def offer(self, use: Use) -> int:
        """Chunks stored newly."""
        new = [chunk for chunk in use.chunks if chunk not in self._extents]
        if self._admission is not None:
            new = new[: self._admission.admit([_hash(chunk) for chunk in new])]
        for i, chunk in enumerate(new):
            self._last_extent += i % self._extent_chunks == 0
            self._extents[chunk] = self._last_extent
        if new:
            self.puts += 2 * -(-len(new) // self._extent_chunks) + (int(use.time_s) != self._version_s)
            self._version_s = int(use.time_s)
        return len(new)


def replay(
    trace: Trace,
    policy: str,
    tiers: Sequence[TierPlan],
    bytes_per_token: int,
    *,
    admission: SecondTouch | None = None,
    extent_chunks: int = 16,
) -> Outcome:
    """tiers: fast → slow; one of no capacity is the bucket, and the last. Raises `Invalid` for an unknown policy."""
    chunk_bytes = trace.chunk_tokens * bytes_per_token
    local = [
        (one.name, make_tier(policy, trace, one.capacity_bytes, chunk_bytes))
        for one in tiers
        if one.capacity_bytes is not None
    ]
    has_bucket = len(local) < len(tiers)
    bucket = Bucket(admission, extent_chunks)
    out = Outcome(policy, trace.input_tokens)
    for use in trace.uses:
        served = [tier.serve(use) for _, tier in local]
        from_bucket: list[int] = []
        for i, chunk in enumerate(use.chunks):
            name = next((name for (name, _), (here, _) in zip(local, served, strict=True) if here[i]), None)
            if name is None:
                if not has_bucket or chunk not in bucket:
                    break
                from_bucket.append(chunk)
                name = OBJECT
            out.hit_tokens[name] += trace.tokens_of(use, i + 1) - trace.tokens_of(use, i)
            out.read_bytes[name] += chunk_bytes
        for (name, _), (_, added) in zip(local, served, strict=True):
            out.written_bytes[name] += added * chunk_bytes
        if has_bucket:
            out.gets += bucket.gets(from_bucket)
            out.written_bytes[OBJECT] += bucket.offer(use) * chunk_bytes
    out.puts = bucket.puts
    out.stored_bytes = len(bucket) * chunk_bytes
    return out


def _hash(chunk: int) -> bytes:
    return hashlib.sha256(chunk.to_bytes(8, "little")).digest()[:16]
