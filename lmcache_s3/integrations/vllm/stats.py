"""The connector's counters: to vLLM's log and Prometheus through its hooks, and to a file for programs that watch.

Names carry their unit. A role adds to `Counters` from any thread. `LMCACHE_S3_STATS_FILE=path` makes each role write
its totals as JSON to `<path>.<role>.<rank>` (replaced atomically, when they changed).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

STATS_FILE = "LMCACHE_S3_STATS_FILE"

HELP = {
    "lookups": "prefix look-ups",
    "lookup_requests": "store requests that look-ups made and so waited for; anything but 0 is a defect",
    "matched_requests": "requests with a match in the index",
    "matched_tokens": "tokens found in the index beyond the engine's own cache",
    "prefetched_requests": "requests whose KV was brought nearer while they waited in the engine's queue",
    "dropped_prefetches": "prefetches left out because too many were under way",
    "loaded_requests": "requests whose load ended whole",
    "loaded_tokens": "tokens loaded into the engine",
    "failed_loads": "requests whose load failed and were computed instead",
    "bad_chunks": "chunks whose stored bytes could not be used",
    "stored_chunks": "chunks uploaded",
    "rested_chunks": "chunks that rested before they were uploaded (write-behind)",
    "stored_extents": "extents committed to the index",
    "void_extents": "extents whose commit came too late",
    "failed_extents": "extents given up before they were committed",
    "dropped_chunks": "chunks not stored because the staging memory was full",
    "skipped_requests": "requests not cached: embeddings, streaming sessions, adapters or media without a digest",
    "internal_errors": "errors inside the connector, each answered by computing",
}
"""What each counter of vLLM's hooks means."""


class Counters:
    """Totals since start and the part not yet handed to vLLM. Thread-safe."""

    def __init__(self, role: str, rank: int = 0) -> None:
        self._lock = threading.Lock()
        self._totals: dict[str, float] = {}
        self._fresh: dict[str, float] = {}
        self._facts: dict[str, Any] = {"role": role, "rank": rank}
        path = os.environ.get(STATS_FILE)
        self._path = Path(f"{path}.{role}.{rank}") if path else None
        self._written: dict[str, Any] = {}

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._totals[name] = self._totals.get(name, 0) + amount
                if name in HELP:
                    self._fresh[name] = self._fresh.get(name, 0) + amount

    def total(self, name: str) -> float:
        with self._lock:
            return self._totals.get(name, 0)

    def take(self) -> dict[str, float]:
        """What was added since the last take, for vLLM's hooks."""
        with self._lock:
            fresh, self._fresh = self._fresh, {}
            return fresh

    def write(self, facts: Mapping[str, Any]) -> None:
        """Write totals and `facts` to the stats file, if there is one and something changed."""
        if self._path is None:
            return
        with self._lock:
            now = {**dict.fromkeys(HELP, 0), **self._facts, **facts, **self._totals}
            if now == self._written:
                return
            temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(now))
            temporary.replace(self._path)
            self._written = now


class ConnectorStats(KVConnectorStats):
    """Counter increments of one interval, summed over ranks and roles."""

    data: dict[str, float]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not any(self.data.values())


class ConnectorPromMetrics(KVConnectorPromMetrics):
    """`vllm:lmcache_s3_<counter>` on the engine's /metrics page."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._by_engine: dict[int, dict[str, Any]] = {}
        for name, text in HELP.items():
            counter = self._counter_cls(
                name=f"vllm:lmcache_s3_{name}", documentation=f"LMCache-S3: {text}.", labelnames=self._labelnames
            )
            for engine, labels in self.per_engine_labelvalues.items():
                self._by_engine.setdefault(engine, {})[name] = counter.labels(*labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, amount in transfer_stats_data.items():
            counter = self._by_engine.get(engine_idx, {}).get(name)
            if counter is not None:
                counter.inc(amount)
