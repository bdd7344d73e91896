"""The memory budget: bytes in flight stay within it, stores that do not fit are dropped, loads wait."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from lmcache_s3.errors import Invalid, Unavailable
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.small import random_kv, same_bits, small_space
from lmcache_s3.testing.whole_arrays import SPACE, CopiedCodec, MakeTransfer, N, load, upload
from lmcache_s3.tiers import buffers
from lmcache_s3.tiers.host import HostTier
from lmcache_s3.tiers.stores.counting import CountingStore


def test_bytes_in_flight_stay_within_the_budget(make: MakeTransfer, store: CountingStore) -> None:
    kv = random_kv(SPACE, 64 * N)
    chunks = upload(make(), kv)
    cell_bytes = chunks[0].cell(0).length
    # Slow enough that several are in flight at once, however busy the machine is.
    slow = FaultyStore(store, [Fault(mode="latency", verbs=frozenset({"get"}), latency_s=0.005)])
    transfer = make(HostTier(1 << 20), over=slow, io_threads=8, staging_bytes=5 * cell_bytes, piece_bytes=1)
    for _ in range(2):
        out, report, _ = load(transfer, chunks)
        assert not report.failed
        assert same_bits(out, kv)
    assert transfer.drain(5)
    assert 2 * cell_bytes <= transfer.budget.peak_bytes <= 5 * cell_bytes
    assert transfer.budget.held_bytes == 0


def test_a_store_that_does_not_fit_is_dropped_at_once_and_loads_go_on(make: MakeTransfer) -> None:
    kv = random_kv(SPACE, 16 * N)
    chunks = upload(make(), kv)
    transfer = make(staging_bytes=8 * chunks[0].cell(0).length)
    with pytest.raises(Unavailable) as e:
        upload(transfer, kv)
    assert (e.value.kind, e.value.key) == ("full", "staging_bytes")
    assert transfer.drain(5)
    assert transfer.budget.held_bytes == 0
    assert load(transfer, chunks)[1].loaded_chunks == 16
    assert same_bits(load(transfer, upload(transfer, kv[:, :, : 3 * N]))[0], kv[:, :, : 3 * N])


def test_a_load_waits_for_memory_within_its_deadline(make: MakeTransfer) -> None:
    transfer = make()
    chunks = upload(transfer, random_kv(SPACE, 2 * N))
    free = transfer.budget.total_bytes
    assert transfer.budget.try_take(free)
    report = load(transfer, chunks, deadline_s=0.1)[1]
    assert [error.kind for _, _, error in report.failed] == ["timeout", "timeout"]
    threading.Timer(0.1, transfer.budget.give_back, [free]).start()
    assert load(transfer, chunks, deadline_s=5)[1].loaded_chunks == 2


@pytest.mark.parametrize("codec", ["fast", "lossless"])
def test_a_system_without_memory_costs_no_budget(
    make: MakeTransfer, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    kv = random_kv(SPACE, 4 * N)
    transfer = make(codec=codec)
    chunks = upload(transfer, kv)
    assert transfer.drain(5)
    transfer.buffers._free.clear()

    def fails(n_bytes: int) -> np.ndarray:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(buffers, "_allocated", fails)
        with pytest.raises(MemoryError):
            load(transfer, chunks)
        with pytest.raises(MemoryError):
            upload(transfer, kv)
        assert transfer.drain(5)
    assert transfer.budget.held_bytes == 0
    assert same_bits(load(transfer, chunks)[0], kv)


def test_a_bug_in_a_store_costs_no_budget(
    make: MakeTransfer, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cell that would have been decoded, and of each part of a read."""
    geometry = small_space(chunk_tokens=1 << 14).geometry
    kv = random_kv(small_space(chunk_tokens=1 << 14), 1 << 14)
    transfer = make(codec=CopiedCodec(), geometry=geometry, staging_bytes=64 << 20, piece_bytes=4 << 20)
    whole = random_kv(SPACE, 2 * N)
    other = make(codec=CopiedCodec())

    def fails(*_: object) -> None:
        raise ZeroDivisionError

    for one, kv_of_it in ((transfer, kv), (other, whole)):
        chunks = upload(one, kv_of_it)
        with monkeypatch.context() as broken:
            broken.setattr(store, "get_into", fails)
            with pytest.raises(ZeroDivisionError):
                one.load(chunks, lambda *_: None).result(10)
            assert one.drain(5)
        assert one.budget.held_bytes == 0
        assert not one.load(chunks, lambda *_: None).result(10).failed


def test_a_budget_below_one_chunk_is_refused(make: MakeTransfer) -> None:
    with pytest.raises(
        Invalid, match=r"staging_bytes=1000 does not hold a chunk of this model: give at least \d+"
    ) as e:
        make(staging_bytes=1_000)
    assert e.value.key == "staging_bytes"


@pytest.mark.parametrize("codec", ["torch", "safetensors", "lossless"])
@pytest.mark.parametrize("times", [1, 1.1, 1.5])
def test_promotions_that_wait_leave_room_for_what_they_wait_for(make: MakeTransfer, codec: str, times: float) -> None:
    """In the least budget that is accepted, too, though decoding takes many times the cell."""
    with pytest.raises(Invalid) as e:
        make(codec=codec, staging_bytes=1)
    least = int(str(e.value).rpartition(" ")[2])
    kv = random_kv(SPACE, 24 * N)
    chunks = upload(make(codec=codec), kv)
    transfer = make(HostTier(1 << 22), codec=codec, staging_bytes=int(least * times))
    out, report, _ = load(transfer, chunks, deadline_s=10)
    assert report.loaded_chunks == 24
    assert same_bits(out, kv)
    assert transfer.drain(5)
    assert transfer.budget.held_bytes == 0


def test_an_upload_whose_first_cells_fail_gives_all_memory_back(make: MakeTransfer) -> None:
    """However early it fails: later cells may not have been handed to a thread yet."""
    kv = random_kv(SPACE, 16 * N)
    transfer = make(staging_bytes=40 * kv.nbytes // 16, io_threads=1)  # 5 % of it: room for two cells
    room = transfer.budget.total_bytes
    for taken in (room, int(room * 0.7)):
        assert transfer.budget.try_take(taken)
        with pytest.raises(Unavailable):
            upload(transfer, kv)
        assert transfer.drain(5)
        transfer.budget.give_back(taken)
        assert transfer.budget.held_bytes == 0


def test_a_load_does_not_starve_on_its_own_promotions(make: MakeTransfer) -> None:
    """A budget of a few cells: what waits for the end of the load must not hold what the load needs."""
    kv = random_kv(SPACE, 32 * N)
    chunks = upload(make(), kv)
    cell_bytes = chunks[0].cell(0).length
    transfer = make(HostTier(1 << 22), io_threads=4, staging_bytes=4 * cell_bytes, piece_bytes=1)
    out, report, _ = load(transfer, chunks, deadline_s=20)
    assert not report.failed
    assert same_bits(out, kv)
    assert transfer.drain(5)
    assert transfer.budget.held_bytes == 0


def test_small_codes_of_large_cells_do_not_ask_for_more_memory_than_there_is(
    make: MakeTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many cells in one piece, many cores, a small budget: fewer are decoded at once."""
    monkeypatch.setattr("lmcache_s3.transfer._cores", lambda: 16)
    monkeypatch.setattr("lmcache_s3.pipeline._TASK_BYTES", 1)
    geometry = small_space(chunk_tokens=128).geometry
    kv = np.zeros((2, 4, 32 * 128, 4, 8), np.uint16)
    chunks = upload(make(codec="cachegen", geometry=geometry, staging_bytes=64 << 20), kv)
    transfer = make(codec="cachegen", geometry=geometry, staging_bytes=5 * geometry.chunk_bytes, io_threads=16)
    handle = transfer.load(chunks, lambda *_: None, deadline_s=20)
    assert handle.result(20).loaded_chunks == 32
    assert transfer.drain(5)
    assert transfer.buffers.peak_bytes <= transfer.budget.total_bytes
    assert transfer.budget.held_bytes == 0
