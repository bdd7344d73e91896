"""Loads and prefetches of overlapping cells, with cancels, deadlines, errors, damage, slow requests, little memory.

All end, with the right bytes or an error, and nothing is left behind.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.codecs.fast import FastCodec
from lmcache_s3.errors import Unavailable
from lmcache_s3.handle import Handle
from lmcache_s3.loading import LoadReport
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.small import random_kv, same_bits
from lmcache_s3.testing.whole_arrays import GEOMETRY, GETS, SPACE, CopiedCodec, MakeTransfer, N, upload
from lmcache_s3.tiers.host import HostTier
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.types import Grid

_CHUNKS = 20
_CELL = GEOMETRY.chunk_bytes // 2 + 4


@pytest.mark.parametrize("codec", [FastCodec(), CopiedCodec()], ids=["viewed", "decoded"])
@pytest.mark.parametrize("seed", range(6))
def test_a_storm_of_loads_of_the_same_cells(
    make: MakeTransfer, store: CountingStore, seed: int, codec: KVCodec
) -> None:
    rng = random.Random(seed)
    kv = random_kv(SPACE, _CHUNKS * N, seed=seed)
    chunks = upload(make(codec=codec), kv, Grid(1, 2))
    faulty = FaultyStore(store, seed=seed)
    host = HostTier(12 * _CELL)
    transfer = make(
        host,
        over=faulty,
        codec=codec,
        staging_bytes=rng.choice((10, 40, 400)) * _CELL,
        piece_bytes=rng.choice((1, 4 * _CELL)),
    )
    faulty.faults = [
        Fault(mode="latency", verbs=GETS, latency_s=0.05, probability=0.02),
        Fault(mode="latency", verbs=GETS, latency_s=0.004, probability=0.5),
        Fault(mode="error", verbs=GETS, probability=0.04),
        Fault(mode="flip", verbs=GETS, probability=0.01),
    ]
    running: list[tuple[Handle[LoadReport], np.ndarray | None, int, int, range]] = []
    whole, ended = 0, Counter[str]()
    for _ in range(120):
        deed = rng.random()
        if deed < 0.15 and running:
            rng.choice(running)[0].cancel()
            continue
        first = rng.randrange(_CHUNKS) if rng.random() < 0.5 else 0
        stop = rng.randrange(first, _CHUNKS) + 1
        heads = rng.choice((range(4), range(2), range(1, 3)))
        options: dict[str, Any] = {"heads": heads, "deadline_s": rng.choice((0.003, 0.02, 20, 20, 20, 20))}
        if deed < 0.3:
            running.append((transfer.prefetch(chunks[first:stop], **options), None, first, stop, heads))
        else:
            sink = _Sink(np.zeros_like(kv[:, :, first * N : stop * N]), rng.randrange(4000))
            running.append((transfer.load(chunks[first:stop], sink, **options), sink.out, first, stop, heads))
        if rng.random() < 0.3:
            time.sleep(rng.random() * 0.01)
    for handle, out, first, stop, heads in running:
        try:
            report = handle.result(30)
        except ZeroDivisionError:
            continue
        except Unavailable as e:
            ended[e.kind] += 1
            continue
        whole += report.loaded_chunks == stop - first
        assert (report.loaded_chunks == stop - first) == (not report.failed)
        assert {error.kind for _, _, error in report.failed} <= {"timeout", "network", "checksum"}
        if out is not None:
            mine = slice(heads.start, heads.stop)
            loaded = kv[:, :, first * N : (first + report.loaded_chunks) * N, mine]
            assert same_bits(out[:, :, : report.loaded_chunks * N, mine], loaded)
    assert ended.keys() <= {"cancelled"}
    assert transfer.drain(20)
    assert len(transfer._load_means.sharing.in_flight) == 0
    assert transfer.budget.held_bytes == 0
    assert transfer.budget.peak_bytes <= transfer.budget.total_bytes
    assert whole >= 20
    assert transfer.metrics.count("shared_cells") > 0


class _Sink:
    """Copies; raises at its `last` call."""

    def __init__(self, out: np.ndarray, last: int) -> None:
        self.out, self._last, self._calls = out, last, 0

    def __call__(self, chunk: int, layers: range, heads: range, cell: np.ndarray) -> None:
        self._calls += 1
        if self._calls == self._last:
            raise ZeroDivisionError
        self.out[:, layers.start : layers.stop, chunk * N : (chunk + 1) * N, heads.start : heads.stop] = cell
