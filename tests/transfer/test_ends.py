"""However a load or an upload ends: deadline, cancel, errors, close. Its buffers are never touched afterwards."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import LMCacheS3Error, Unavailable, Unusable
from lmcache_s3.testing.faults import Fault, FaultyStore, Verb
from lmcache_s3.testing.small import random_kv, same_bits
from lmcache_s3.testing.whole_arrays import GEOMETRY, GETS, SPACE, MakeTransfer, N, load, upload
from lmcache_s3.tiers.host import HostTier
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.transfer import Transfer
from lmcache_s3.types import ExtentName, Grid

TRANSFERS: frozenset[Verb] = frozenset({"get", "put"})


def test_the_deadline_leaves_what_is_whole_and_silences_the_sink(make: MakeTransfer, store: CountingStore) -> None:
    kv = random_kv(SPACE, 6 * N)
    chunks = upload(make(), kv)
    slow = FaultyStore(store, [Fault(mode="latency", verbs=GETS, latency_s=0.3, skip=3)])
    transfer = make(over=slow, io_threads=1, piece_bytes=1)
    calls: list[int] = []
    started_s = time.monotonic()
    handle = transfer.load(chunks, lambda chunk, *_: calls.append(chunk), deadline_s=0.15)
    report = handle.result(5)
    took_s = time.monotonic() - started_s
    at_the_end = list(calls)
    assert 0.1 < took_s < 0.29
    assert report.loaded_chunks == 3
    assert [(index, error.kind) for index, _, error in report.failed] == [
        (3, "timeout"),
        (4, "timeout"),
        (5, "timeout"),
    ]
    assert transfer.drain(5)
    assert calls == at_the_end
    assert transfer.budget.held_bytes == 0


def test_a_sink_under_way_at_the_deadline_ends_before_the_handle(make: MakeTransfer) -> None:
    transfer = make()
    chunks = upload(transfer, random_kv(SPACE, 3 * N))
    begun, ended = threading.Event(), threading.Event()

    def sink(*_: object) -> None:
        begun.set()
        time.sleep(0.2)
        ended.set()

    handle = transfer.load(chunks, sink, deadline_s=0.05)
    report = handle.result(5)
    assert ended.is_set() or not begun.is_set(), "on a busy machine none may begin in time"
    assert report.loaded_chunks < 3


def test_cancel_silences_the_sink(make: MakeTransfer, store: CountingStore) -> None:
    chunks = upload(make(), random_kv(SPACE, 3 * N))
    transfer = make(over=FaultyStore(store, [Fault(mode="latency", verbs=GETS, latency_s=0.1)]))
    calls: list[int] = []
    handle = transfer.load(chunks, lambda chunk, *_: calls.append(chunk))
    assert handle.cancel()
    with pytest.raises(Unavailable) as e:
        handle.result(0)
    assert e.value.kind == "cancelled"
    assert transfer.drain(5)
    assert calls == []


def test_a_sink_that_raises_ends_the_load_with_that(make: MakeTransfer) -> None:
    transfer = make(piece_bytes=1)
    chunks = upload(transfer, random_kv(SPACE, 5 * N))

    def sink(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        transfer.load(chunks, sink).result(5)
    assert transfer.drain(5)
    assert transfer.budget.held_bytes == 0
    assert transfer.metrics.count("bugs") >= 1


def test_close_with_work_in_flight(make: MakeTransfer, store: CountingStore) -> None:
    kv = random_kv(SPACE, 5 * N)
    chunks = upload(make(), kv)
    slow = FaultyStore(store, [Fault(mode="latency", verbs=TRANSFERS, latency_s=0.2)])
    transfer = make(over=slow, piece_bytes=1)
    calls: list[int] = []
    loading = transfer.load(chunks, lambda chunk, *_: calls.append(chunk))
    name = ExtentName.fresh(bytes(16), 1, "fast", 0)
    storing = transfer.upload_shard(name, Grid(), 0, 0, bytes(16), [kv[:, :, :N]])
    started_s = time.monotonic()
    transfer.close()
    assert time.monotonic() - started_s < 2
    assert {error.kind for _, _, error in loading.result(0).failed} == {"closed"}
    for handle in (storing, transfer.upload_shard(name, Grid(), 0, 0, bytes(16), [kv[:, :, :N]])):
        with pytest.raises(Unavailable) as e:
            handle.result(0)
        assert e.value.kind == "closed"
    assert transfer.load(chunks, lambda *_: None).result(0).failed[0][2].kind == "closed"
    assert calls == []
    transfer.close()


def test_a_failed_put_ends_the_upload_and_frees_its_memory(make: MakeTransfer, store: CountingStore) -> None:
    host = HostTier(1 << 20)
    for fault in (Fault(mode="error"), Fault(mode="latency", latency_s=0.2)):
        transfer = make(host, over=FaultyStore(store, [fault]))
        name = ExtentName.fresh(bytes(16), 1, "fast", 0)
        cells = [random_kv(SPACE, N)]
        handle = transfer.upload_shard(name, Grid(), 0, 0, bytes(16), cells, deadline_s=0.05)
        with pytest.raises(Unavailable) as e:
            handle.result(5)
        assert e.value.kind == ("network" if fault.mode == "error" else "timeout")
        assert transfer.drain(5)
        assert (transfer.budget.held_bytes, host.stats().cells) == (0, 0)


def test_a_codec_that_fails_ends_the_upload(make: MakeTransfer) -> None:
    transfer = make()
    codec = transfer.codec

    class Broken(type(codec)):  # type: ignore[misc]
        def encode_into(self, *_: object) -> None:
            raise self.error

        error: BaseException = MemoryError()

    for error in (MemoryError(), Unusable("no", kind="payload")):
        broken = Broken()
        broken.error = error
        transfer.codec = broken
        with pytest.raises(type(error)):
            upload(transfer, random_kv(SPACE, 3 * N))
        assert transfer.drain(5)
        assert transfer.budget.held_bytes == 0
    assert issubclass(Unusable, LMCacheS3Error)


def test_a_buffer_is_never_touched_after_its_handle_is_done(make: MakeTransfer, store: CountingStore) -> None:
    """However a load ends: in time, at a deadline, cancelled, by its sink; an engine reuses its blocks at once."""
    kv = random_kv(SPACE, 8 * N)
    chunks = upload(make(), kv)
    slow = FaultyStore(store, [Fault(mode="latency", verbs=GETS, latency_s=0.004, probability=0.5)], seed=3)
    transfer = make(over=slow, piece_bytes=1)
    rng = np.random.default_rng(5)
    ends: set[str] = set()
    for _ in range(60):
        out = np.zeros_like(kv)

        def sink(chunk: int, layers: range, heads: range, cell: np.ndarray, out: np.ndarray = out) -> None:
            if rng.random() < 0.02:
                raise ZeroDivisionError
            out[:, layers.start : layers.stop, chunk * N : (chunk + 1) * N, heads.start : heads.stop] = cell

        handle = transfer.load(chunks, sink, deadline_s=float(rng.uniform(0.001, 0.03)))
        if rng.random() < 0.3:
            time.sleep(float(rng.uniform(0, 0.01)))
            handle.cancel()
        while not handle.done():
            time.sleep(0)
        ours = out.copy()
        error = handle.error()
        if error is None:
            report = handle.result()
            loaded = report.loaded_chunks
            assert same_bits(ours[:, :, : loaded * N], kv[:, :, : loaded * N])
            assert (loaded == 8) == (not report.failed)
            ends.add("late" if report.failed else "whole")
        else:
            ends.add(type(error).__name__)
        out[:] = ours  # what the next owner writes
        assert transfer.drain(5)
        assert same_bits(out, ours)
    assert ends == {"late", "whole", "Unavailable", "ZeroDivisionError"}
    assert transfer.budget.held_bytes == 0


def test_no_thread_stays_behind(store: CountingStore) -> None:
    before = set(threading.enumerate())  # some of an earlier test's may still be ending

    def ours() -> list[str]:
        return [t.name for t in threading.enumerate() if t not in before and t.name.startswith("lmcache-s3")]

    transfer = Transfer(store, SPACE.id, GEOMETRY, make_codec("fast"), [HostTier(1 << 20)])
    load(transfer, upload(transfer, random_kv(SPACE, 3 * N)))
    assert ours()
    transfer.close()
    end_s = time.monotonic() + 5
    while ours() and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not ours()
