"""Requests that hang are asked for again: the load ends, in time, with the right bytes; memory goes when it can."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.small import random_kv, same_bits
from lmcache_s3.testing.whole_arrays import GETS, SPACE, MakeTransfer, N, load, upload
from lmcache_s3.tiers.buffers import rounded
from lmcache_s3.tiers.host import HostTier
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.transfer import Transfer


class Hanging:
    """Requests that hang until `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def sleep(self, seconds: float) -> None:
        self.go.wait(20)


def learnt(transfer: Transfer, chunks: list) -> None:
    """Load often enough that it is known how long requests take."""
    for _ in range(6):
        assert load(transfer, chunks)[1].loaded_chunks == len(chunks)


def test_a_request_that_hangs_is_overtaken(make: MakeTransfer, store: CountingStore) -> None:
    kv = random_kv(SPACE, 8 * N)
    chunks = upload(make(), kv)
    hanging = Hanging()
    faulty = FaultyStore(store, sleep=hanging.sleep)
    transfer = make(over=faulty, piece_bytes=1)
    learnt(transfer, chunks)
    faulty.faults = [Fault(mode="latency", verbs=GETS, times=1, skip=2)]
    out, report, _ = load(transfer, chunks)
    assert report.loaded_chunks == 8
    assert report.requests >= 9
    assert same_bits(out, kv)
    assert transfer.metrics.count("hedged_requests_won") >= 1
    assert transfer.budget.held_bytes > 0, "the first request may still write"
    hanging.go.set()
    assert transfer.drain(10)
    assert transfer.budget.held_bytes == 0


def test_a_store_that_hangs_for_everybody_is_not_asked_twice_for_everything(
    make: MakeTransfer, store: CountingStore
) -> None:
    chunks = upload(make(), random_kv(SPACE, 8 * N))
    hanging = Hanging()
    faulty = FaultyStore(store, sleep=hanging.sleep)
    transfer = make(over=faulty, piece_bytes=1)
    learnt(transfer, chunks)
    faulty.faults = [Fault(mode="latency", verbs=GETS)]
    report = load(transfer, chunks, deadline_s=0.5)[1]
    assert {error.kind for _, _, error in report.failed} == {"timeout"}
    assert report.requests <= 4 + 4
    hanging.go.set()
    assert transfer.drain(10)
    assert transfer.budget.held_bytes == 0


def test_a_second_request_without_memory_is_not_made(make: MakeTransfer, store: CountingStore) -> None:
    kv = random_kv(SPACE, 8 * N)
    chunks = upload(make(), kv)
    faulty = FaultyStore(store)
    transfer = make(over=faulty, piece_bytes=1)
    learnt(transfer, chunks)
    hedged = transfer.metrics.count("hedged_requests")
    taken = transfer.budget.total_bytes - rounded(chunks[0].cell(0).length)
    assert transfer.budget.try_take(taken)  # room for one piece alone
    faulty.faults = [Fault(mode="latency", verbs=GETS, latency_s=0.2, times=1)]
    out, report, _ = load(transfer, chunks)
    assert (report.loaded_chunks, report.requests) == (8, 8)
    assert same_bits(out, kv)
    assert transfer.metrics.count("hedged_requests") == hedged
    transfer.budget.give_back(taken)


@pytest.mark.parametrize("hung", [0, 1, 2])
def test_a_cell_in_several_parts_survives_one_that_hangs(
    make: MakeTransfer, store: CountingStore, monkeypatch: pytest.MonkeyPatch, hung: int
) -> None:
    """The parts that were answered are put together with the second answer, in memory nobody writes to."""
    monkeypatch.setattr("lmcache_s3.reading._LEAST_PART_BYTES", 3000)
    kv = random_kv(SPACE, 2 * N)
    chunks = upload(make(), kv)
    hanging = Hanging()
    faulty = FaultyStore(store, sleep=hanging.sleep)
    transfer = make(over=faulty, piece_bytes=3000, io_threads=8)
    learnt(transfer, chunks)
    before = store.counts["get"]
    faulty.faults = [Fault(mode="latency", verbs=GETS, times=1, skip=hung)]
    out, report, _ = load(transfer, chunks)
    assert report.loaded_chunks == 2
    assert same_bits(out, kv)
    assert store.counts["get"] - before >= 6
    hanging.go.set()
    assert transfer.drain(10)
    assert transfer.budget.held_bytes == 0


def test_gaps_are_read_through_where_that_is_cheaper(make: MakeTransfer, store: CountingStore, tmp_path: Path) -> None:
    kv = random_kv(SPACE, 9 * N)
    chunks = upload(make(), kv)
    host = HostTier(1 << 20)
    transfer = make(host)
    assert transfer.prefetch([chunks[4]]).result(10).loaded_chunks == 1
    before = store.counts["get"]
    out, report, _ = load(transfer, chunks)
    assert same_bits(out, kv)
    n = chunks[0].cell(0).length
    assert report.tier_bytes == {"host": n, "object": 8 * n}
    assert store.counts["get"] - before == report.requests == 1
