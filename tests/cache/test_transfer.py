"""The data path: grids, tiers, deadlines, the memory budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Invalid, LMCacheS3Error, Unavailable, Unusable
from lmcache_s3.loading import LoadReport
from lmcache_s3.publish import make_record
from lmcache_s3.testing.faults import Fault, FaultyStore, Verb
from lmcache_s3.testing.small import fresh_memory_url, random_kv, same_bits, small_space
from lmcache_s3.tiers.base import Tier
from lmcache_s3.tiers.disk import DiskTier
from lmcache_s3.tiers.host import HostTier
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.transfer import Transfer, TransferSettings
from lmcache_s3.types import ChunkRef, ExtentName, Geometry, Grid, shard_key

SPACE = small_space()
GEOMETRY = SPACE.geometry
N = GEOMETRY.chunk_tokens
WHOLE = Grid()
GETS: frozenset[Verb] = frozenset({"get"})
TRANSFERS: frozenset[Verb] = frozenset({"get", "put"})
MakeTransfer = Callable[..., Transfer]


@pytest.fixture
def store() -> CountingStore:
    return CountingStore(open_store(fresh_memory_url()))


@pytest.fixture
def make(store: CountingStore) -> Iterator[MakeTransfer]:
    made: list[Transfer] = []

    def make(
        *tiers: Tier, over: object = store, codec: str = "fast", geometry: Geometry = GEOMETRY, **settings: object
    ) -> Transfer:
        known = TransferSettings(**({"io_threads": 4, "staging_bytes": 8 << 20} | settings))  # type: ignore[arg-type]
        transfer = Transfer(over, SPACE.id, geometry, make_codec(codec), tiers, settings=known)  # type: ignore[arg-type]
        made.append(transfer)
        return transfer

    yield make
    for transfer in made:
        transfer.close()


def upload(transfer: Transfer, kv: np.ndarray, grid: Grid = WHOLE, *, first_token: int = 0) -> list[ChunkRef]:
    """Store KV of whole chunks as one extent; returns its chunks."""
    geometry = transfer.geometry
    n = geometry.chunk_tokens
    n_chunks = kv.shape[2] // n
    hashes = [np.random.default_rng(kv.shape[2] + i + first_token).bytes(16) for i in range(n_chunks)]
    name = ExtentName.fresh(hashes[-1], n_chunks, transfer.codec.id, 0)
    handles = []
    for shard in range(grid.shards):
        layers, heads = geometry.cell_layers(grid, shard), geometry.cell_heads(grid, shard)
        mine = kv[:, layers.start : layers.stop, :, heads.start : heads.stop]
        cells = [mine[:, :, i * n : (i + 1) * n] for i in range(n_chunks)]
        handles.append(transfer.upload_shard(name, grid, shard, first_token, b"".join(hashes), cells))
    shards = [handle.result(10) for handle in handles]
    record = make_record(name, grid, bytes(16), first_token, b"".join(hashes), kv.nbytes, shards)
    return [ChunkRef(hashes[i], record, i) for i in range(n_chunks)]


def load(
    transfer: Transfer, chunks: list[ChunkRef], layers: range | None = None, heads: range | None = None, **kw: float
) -> tuple[np.ndarray, LoadReport, list[tuple[int, range, range]]]:
    """Load into a fresh array (zeros where nothing came); also tells the sink's calls."""
    geometry = transfer.geometry
    out = np.zeros(
        (geometry.kv, geometry.layers, len(chunks) * N, geometry.heads, geometry.head_dim), geometry.storage_dtype
    )
    calls: list[tuple[int, range, range]] = []

    def sink(chunk: int, layers: range, heads: range, cell: np.ndarray) -> None:
        calls.append((chunk, layers, heads))
        assert cell.shape == (geometry.kv, len(layers), N, len(heads), geometry.head_dim)
        out[:, layers.start : layers.stop, chunk * N : (chunk + 1) * N, heads.start : heads.stop] = cell

    handle = transfer.load(chunks, sink, layers=layers, heads=heads, deadline_s=kw.get("deadline_s"))
    return out, handle.result(20), calls


# --- grids


@pytest.mark.parametrize("grid", [Grid(), Grid(1, 2), Grid(2, 1), Grid(2, 4), Grid(4, 4)], ids=str)
def test_what_one_grid_wrote_every_other_reads(make: MakeTransfer, grid: Grid) -> None:
    transfer = make(piece_bytes=10_000)
    kv = random_kv(SPACE, 5 * N)
    chunks = upload(transfer, kv, grid)
    for stages, groups in ((1, 1), (1, 2), (2, 1), (4, 4)):
        reader = Grid(stages, groups)
        for shard in range(reader.shards):
            layers, heads = GEOMETRY.cell_layers(reader, shard), GEOMETRY.cell_heads(reader, shard)
            out, report, calls = load(transfer, chunks, layers, heads)
            assert report.loaded_chunks == 5
            assert not report.failed
            wanted = np.zeros_like(kv)
            index = np.s_[:, layers.start : layers.stop, :, heads.start : heads.stop]
            wanted[index] = kv[index]
            assert same_bits(out, wanted)
            overlapping = [
                other
                for other in range(grid.shards)
                if set(GEOMETRY.cell_layers(grid, other)) & set(layers)
                and set(GEOMETRY.cell_heads(grid, other)) & set(heads)
            ]
            assert len(calls) == len({(c, str(a), str(b)) for c, a, b in calls}) == 5 * len(overlapping)


def test_odd_layers_and_heads_are_cut_out(make: MakeTransfer) -> None:
    transfer = make()
    kv = random_kv(SPACE, 2 * N)
    chunks = upload(transfer, kv, Grid(2, 2))
    out, report, _ = load(transfer, chunks[1:], range(1, 3), range(1, 4))
    assert report.loaded_chunks == 1
    assert same_bits(out[:, 1:3, :, 1:4], kv[:, 1:3, N:, 1:4])
    assert np.count_nonzero(out) == np.count_nonzero(out[:, 1:3, :, 1:4])


def test_several_extents_and_codecs_in_one_load(make: MakeTransfer) -> None:
    kv = random_kv(SPACE, 6 * N)
    chunks: list[ChunkRef] = []
    for i, codec in enumerate(("fast", "safetensors", "torch")):
        part = kv[:, :, 2 * i * N : 2 * (i + 1) * N]
        chunks += upload(make(codec=codec), part, Grid(1, 1 + i % 2), first_token=2 * i * N)
    out, report, _ = load(make(), chunks)
    assert (report.loaded_chunks, report.requests) == (6, 4)
    assert same_bits(out, kv)


@pytest.mark.parametrize(("layers", "heads"), [(range(5), None), (range(0), None), (None, range(0, 4, 2))])
def test_nonsense_is_refused(make: MakeTransfer, layers: range | None, heads: range | None) -> None:
    transfer = make()
    with pytest.raises(Invalid, match="not within the model"):
        transfer.load([], lambda *_: None, layers=layers, heads=heads)


def test_uploads_that_do_not_add_up_are_refused(make: MakeTransfer) -> None:
    transfer = make()
    cell = random_kv(SPACE, N)
    name = ExtentName.fresh(bytes(16), 1, "fast", 0)
    good = (name, Grid(), 0, 0, bytes(16), [cell])
    for i, bad in [(0, replace(name, codec="torch")), (1, Grid(3, 1)), (2, 1), (4, b""), (5, []), (5, [cell[:, 1:]])]:
        arguments = [*good[:i], bad, *good[i + 1 :]]
        with pytest.raises(Invalid):
            transfer.upload_shard(*arguments)  # type: ignore[arg-type]


def test_nothing_to_load_is_done_at_once(make: MakeTransfer) -> None:
    assert make().load([], lambda *_: None).result(0) == LoadReport(0)


# --- pieces, requests, tiers


def test_pieces_bound_requests_from_both_sides(make: MakeTransfer, store: CountingStore) -> None:
    kv = random_kv(SPACE, 8 * N)
    chunks = upload(make(), kv)
    cell_bytes = chunks[0].cell(0).length
    for piece_bytes, requests in ((64 << 20, 1), (4 * cell_bytes, 2), (1, 8)):
        before = store.counts["get"]
        out, report, _ = load(make(piece_bytes=piece_bytes), chunks)
        assert report.requests == store.counts["get"] - before == requests
        assert report.tier_bytes == {"object": 8 * cell_bytes}
        assert same_bits(out, kv)


def test_what_was_uploaded_comes_from_the_host_and_what_was_loaded_is_promoted(
    make: MakeTransfer, store: CountingStore, tmp_path: Path
) -> None:
    kv = random_kv(SPACE, 4 * N)
    writer = make(HostTier(1 << 20))
    chunks = upload(writer, kv)
    assert writer.drain(5)
    assert store.counts["get"] == 0
    assert set(load(writer, chunks)[1].tier_bytes) == {"host"}
    host, disk = HostTier(1 << 20), DiskTier(tmp_path, 1 << 20)
    reader = make(host, disk)
    for source in ("object", "host"):
        out, report, _ = load(reader, chunks)
        assert set(report.tier_bytes) == {source}
        assert same_bits(out, kv)
        assert reader.drain(5)
    host.evict(1 << 20)
    out, report, _ = load(reader, chunks)
    assert (set(report.tier_bytes), report.requests) == ({"disk"}, 0)
    assert same_bits(out, kv)
    assert reader.drain(5)
    assert host.stats().cells == 4
    assert reader.budget.held_bytes == 0


def test_each_cell_comes_from_the_fastest_tier_that_has_it(make: MakeTransfer, tmp_path: Path) -> None:
    host, disk = HostTier(1 << 20), DiskTier(tmp_path, 1 << 20)
    transfer = make(host, disk)
    kv = random_kv(SPACE, 6 * N)
    chunks = upload(transfer, kv)
    assert transfer.drain(5)
    cells = [chunk.cell(0) for chunk in chunks]
    host.discard(cells[2:])
    disk.discard([cells[1], cells[4]])
    out, report, _ = load(transfer, chunks)
    n = cells[0].length
    assert report.tier_bytes == {"host": 2 * n, "disk": 3 * n, "object": n}
    assert same_bits(out, kv)


def test_a_damaged_disk_is_passed_over_and_mended(make: MakeTransfer, tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 20)
    transfer = make(disk)
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(transfer, kv)
    assert transfer.drain(5)
    files = sorted(file for file in (tmp_path / "cells").rglob("*") if file.is_file())
    files[1].write_bytes(files[2].read_bytes())
    files[3].write_bytes(files[3].read_bytes()[:-1])
    out, report, _ = load(transfer, chunks)
    assert not report.failed
    assert report.requests == 2
    assert same_bits(out, kv)
    assert transfer.drain(5)
    assert disk.stats().bad_cells == 2
    assert load(transfer, chunks)[1].requests == 0


def test_prefetch_brings_cells_into_a_tier(make: MakeTransfer, tmp_path: Path) -> None:
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(make(), kv)
    transfer = make(HostTier(1 << 20), DiskTier(tmp_path, 1 << 20))
    assert transfer.prefetch(chunks, "disk").result(5).loaded_chunks == 4
    assert [transfer.stats()[name].cells for name in ("host", "disk")] == [0, 4]
    assert transfer.prefetch(chunks, "host").result(5).tier_bytes == {"disk": sum(c.cell(0).length for c in chunks)}
    assert transfer.stats()["host"].cells == 4
    for name in ("device", "object"):
        with pytest.raises(Invalid, match="there is: host, disk"):
            transfer.prefetch(chunks, name)


# --- damage


@pytest.mark.parametrize("kind", ["missing", "truncated", "checksum", "swapped"])
def test_damage_fails_its_chunk_and_leaves_the_prefix(make: MakeTransfer, store: CountingStore, kind: str) -> None:
    transfer = make()
    kv = random_kv(SPACE, 6 * N)
    chunks = upload(transfer, kv)
    key = shard_key(SPACE.id, chunks[0].extent.name, Grid(), 0)
    body = bytearray(store.get(key))
    a, b = chunks[3].cell(0), chunks[4].cell(0)
    if kind == "missing":
        store.delete(key)
    else:
        if kind == "truncated":
            del body[a.offset + 100 :]
        elif kind == "checksum":
            body[a.offset + 5] ^= 16
        else:
            first, second = body[a.offset : b.offset], body[b.offset : b.offset + b.length]
            body[a.offset : b.offset + b.length] = second + first
        store.put(key, body)
    out, report, _ = load(transfer, chunks)
    loaded = 0 if kind == "missing" else 3
    assert report.loaded_chunks == loaded
    assert same_bits(out[:, :, : loaded * N], kv[:, :, : loaded * N])
    index, name, error = report.failed[0]
    assert (index, name) == (loaded, chunks[0].extent.name)
    assert isinstance(error, Unusable)
    assert error.kind == ("checksum" if kind == "swapped" else kind)


def test_a_valid_cell_of_another_place_is_refused_by_its_position(make: MakeTransfer) -> None:
    """The index's checksum matches, but the cell says that it belongs elsewhere."""
    transfer = make(codec="safetensors")
    chunks = upload(transfer, random_kv(SPACE, 2 * N))
    lie = [ChunkRef(bytes(16), chunks[0].extent, 0), chunks[1]]
    _, report, calls = load(transfer, lie)
    assert report.loaded_chunks == 0
    assert report.failed[0][2].kind == "position"
    assert not [call for call in calls if call[0] == 0]


def test_what_cannot_be_right_is_not_asked_for(make: MakeTransfer, store: CountingStore) -> None:
    transfer = make()
    [chunk] = upload(transfer, random_kv(SPACE, N))
    record = chunk.extent
    lies = {
        "oversized": replace(record, lengths=(2**32 - 1).to_bytes(4, "little")),
        "truncated": replace(record, lengths=bytes(4)),
        "codec": replace(record, name=replace(record.name, codec="zstd")),
        "shape": replace(record, grid=Grid(3, 1), lengths=record.lengths * 3, sums=record.sums * 3),
    }
    before = store.counts["get"]
    for kind, lie in lies.items():
        _, report, _ = load(transfer, [ChunkRef(chunk.prefix_hash, lie, 0)])
        [(index, name, error)] = report.failed
        assert (index, name, error.kind, type(error)) == (0, lie.name, kind, Unusable)
    assert store.counts["get"] == before


def test_chunks_behind_the_first_failure_are_not_fetched(make: MakeTransfer, store: CountingStore) -> None:
    kv = random_kv(SPACE, 30 * N)
    chunks = upload(make(), kv)
    faulty = FaultyStore(store, [Fault(mode="error", verbs=GETS, times=1)])
    transfer = make(over=faulty, io_threads=1, piece_bytes=1)
    _, report, _ = load(transfer, chunks)
    assert (report.loaded_chunks, report.requests) == (0, 1)
    assert [index for index, _, _ in report.failed] == [0]
    assert isinstance(report.failed[0][2], Unavailable)


# --- ends


def test_the_deadline_leaves_what_is_whole_and_silences_the_sink(make: MakeTransfer, store: CountingStore) -> None:
    kv = random_kv(SPACE, 6 * N)
    chunks = upload(make(), kv)
    slow = FaultyStore(store, [Fault(mode="latency", verbs=GETS, latency_s=0.3, skip=3)])
    transfer = make(over=slow, io_threads=2, piece_bytes=1)
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
    ended = threading.Event()

    def sink(*_: object) -> None:
        time.sleep(0.2)
        ended.set()

    handle = transfer.load(chunks, sink, deadline_s=0.05)
    report = handle.result(5)
    assert ended.is_set()
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


# --- memory


def test_bytes_in_flight_stay_within_the_budget(make: MakeTransfer) -> None:
    kv = random_kv(SPACE, 64 * N)
    chunks = upload(make(), kv)
    cell_bytes = chunks[0].cell(0).length
    transfer = make(HostTier(1 << 20), io_threads=8, staging_bytes=5 * cell_bytes, piece_bytes=1)
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


def test_a_budget_below_one_chunk_is_refused(make: MakeTransfer) -> None:
    with pytest.raises(
        Invalid, match=r"staging_bytes=1000 does not hold a chunk of this model: give at least \d+"
    ) as e:
        make(staging_bytes=1_000)
    assert e.value.key == "staging_bytes"


def test_a_codec_that_fails_ends_the_upload(make: MakeTransfer) -> None:
    transfer = make()
    codec = transfer.codec

    class Broken(type(codec)):  # type: ignore[misc]
        def encode(self, *_: object) -> bytes:
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


def test_promotions_of_a_load_wait_for_its_end(make: MakeTransfer) -> None:
    chunks = upload(make(), random_kv(SPACE, 8 * N))
    transfer = make(HostTier(1 << 20), io_threads=1, piece_bytes=1)
    kept: list[int] = []

    def sink(chunk: int, layers: range, heads: range, cell: np.ndarray) -> None:
        kept.append(transfer.stats()["host"].cells)

    assert transfer.load(chunks, sink).result(10).loaded_chunks == 8
    assert set(kept) == {0}
    assert transfer.drain(5)
    assert transfer.stats()["host"].cells == len(kept)


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
