"""Loads that are under way in a test, and when a transfer has come to rest."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmcache_s3.handle import Handle
from lmcache_s3.loading import LoadReport
from lmcache_s3.testing.whole_arrays import N
from lmcache_s3.transfer import Transfer
from lmcache_s3.types import ChunkRef


@dataclass
class Loading:
    """A load under way into an array of its own."""

    transfer: Transfer
    chunks: list[ChunkRef]
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        geometry = self.transfer.geometry
        shape = (geometry.kv, geometry.layers, len(self.chunks) * N, geometry.heads, geometry.head_dim)
        self.out = np.zeros(shape, geometry.storage_dtype)
        self.handle: Handle[LoadReport] = self.transfer.load(self.chunks, self.sink, **self.options)

    def sink(self, chunk: int, layers: range, heads: range, cell: np.ndarray) -> None:
        self.out[:, layers.start : layers.stop, chunk * N : (chunk + 1) * N, heads.start : heads.stop] = cell

    def report(self) -> LoadReport:
        return self.handle.result(20)


def at_rest(transfer: Transfer) -> bool:
    """Nothing goes on, nobody holds memory, nobody waits."""
    return transfer.drain(10) and transfer.budget.held_bytes == 0 and len(transfer._load_means.sharing.in_flight) == 0


def await_waiting(transfer: Transfer, cells: int) -> None:
    """Until so many cells are waited for."""
    flights = transfer._load_means.sharing.in_flight._flights
    end_s = time.monotonic() + 20
    while sum(len(waiting) for _, waiting in list(flights.values())) != cells:
        assert time.monotonic() < end_s
        time.sleep(0.001)
