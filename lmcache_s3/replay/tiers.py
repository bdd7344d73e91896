"""Tiers of a replay: which chunks would be held. One runs the very policies that real tiers use, one libcachesim's.

All chunks take the same room, a last partial one too. A hit is a chunk held whose whole prefix is held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lmcache_s3.errors import Invalid
from lmcache_s3.replay.belady import BeladyPolicy
from lmcache_s3.replay.trace import Trace, Use
from lmcache_s3.tiers.eviction.base import EvictionPolicy, Item
from lmcache_s3.tiers.eviction.hazard import HazardPolicy
from lmcache_s3.tiers.eviction.lru import LRUPolicy

OURS: dict[str, Callable[[Trace], EvictionPolicy]] = {
    "hazard": lambda trace: HazardPolicy(),
    "lru": lambda trace: LRUPolicy(),
    "belady": BeladyPolicy,
}
STANDARD = {"s3-fifo": "S3FIFO", "arc": "ARC", "w-tinylfu": "WTinyLFU", "sieve": "Sieve", "lhd": "LHD", "gdsf": "GDSF"}
"""Of libcachesim, which knows nothing of prefixes: it may keep a chunk whose parent is gone, which is no hit then."""
POLICIES = (*OURS, *STANDARD)


class ReplayTier(Protocol):
    def serve(self, use: Use) -> tuple[list[bool], int]:
        """A request comes by: which of its chunks were held, and how many are held newly afterwards."""
        ...


def make_tier(policy: str, trace: Trace, capacity_bytes: int, chunk_bytes: int) -> ReplayTier:
    """Raises `Invalid` for an unknown policy, and if libcachesim is needed and not there."""
    n_chunks = capacity_bytes // chunk_bytes
    if policy in OURS:
        return PolicyTier(OURS[policy](trace), n_chunks, trace.chunk_tokens, chunk_bytes)
    if policy in STANDARD:
        return StandardTier(policy, n_chunks)
    raise Invalid(f"{policy!r} is no policy; there are {', '.join(POLICIES)}", kind="argument")


class PolicyTier:
    def __init__(self, policy: EvictionPolicy, n_chunks: int, chunk_tokens: int, chunk_bytes: int) -> None:
        self._policy, self._n_chunks = policy, n_chunks
        self._chunk_tokens, self._chunk_bytes = chunk_tokens, chunk_bytes
        self._held: set[object] = set()

    def serve(self, use: Use) -> tuple[list[bool], int]:
        chunks = use.chunks
        here = [chunk in self._held for chunk in chunks]
        items = [
            Item(chunk, chunks[i - 1] if i else None, i * self._chunk_tokens, self._chunk_bytes)
            for i, chunk in enumerate(chunks)
        ]
        self._policy.use(items, use.time_s)
        spare = frozenset(chunks)
        added = 0
        for item, is_here in zip(items, here, strict=True):
            if is_here:
                continue
            if len(self._held) >= self._n_chunks:
                if not self._policy.admit(item, use.time_s, spare):
                    break
                victim = self._policy.victim(use.time_s, spare)
                self._policy.remove(victim)
                self._held.discard(victim)
            self._policy.add(item, use.time_s)
            self._held.add(item.key)
            added += 1
        return here, added


class StandardTier:
    def __init__(self, policy: str, n_chunks: int) -> None:
        try:
            import libcachesim
        except ImportError as e:
            raise Invalid(
                f"policy {policy} needs libcachesim: pip install 'lmcache-s3[analysis]'", kind="setting"
            ) from e
        self._cache: Any = getattr(libcachesim, STANDARD[policy])(cache_size=max(1, n_chunks))
        self._request: Any = libcachesim.Request()
        self._request.obj_size = 1

    def serve(self, use: Use) -> tuple[list[bool], int]:
        self._request.clock_time = int(use.time_s)
        here = []
        for chunk in reversed(use.chunks):  # ends first: beginnings count as used last
            self._request.obj_id = chunk
            here.append(bool(self._cache.get(self._request)))
        here.reverse()
        return here, here.count(False)
