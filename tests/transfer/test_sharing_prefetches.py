"""Prefetches beside loads and other prefetches of the same cells: no load waits for one, none fetches twice."""

from __future__ import annotations

from lmcache_s3.testing.gated import GatedStore
from lmcache_s3.testing.loads_under_way import Loading, at_rest
from lmcache_s3.testing.small import random_kv, same_bits
from lmcache_s3.testing.whole_arrays import GEOMETRY, SPACE, MakeTransfer, N, upload
from lmcache_s3.tiers.host import HostTier

CELL = GEOMETRY.chunk_bytes + 4  # as `fast` stores it


def test_prefetches_of_one_prompt_fetch_it_once(make: MakeTransfer, gate: GatedStore) -> None:
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(make(), kv)
    host = HostTier(1 << 20)
    transfer = make(host, over=gate)
    handles = [transfer.prefetch(chunks) for _ in range(5)]
    gate.open()
    assert [handle.result(20).loaded_chunks for handle in handles] == [4] * 5
    assert host.stats().cells == 4
    assert len(gate.asked) == 1
    assert at_rest(transfer)


def test_a_prefetch_waits_for_a_load_and_its_cells_are_there_when_it_is_done(
    make: MakeTransfer, gate: GatedStore
) -> None:
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(make(), kv)
    host = HostTier(1 << 20)
    transfer = make(host, over=gate)
    loading = Loading(transfer, chunks)
    prefetch = transfer.prefetch(chunks)
    gate.open()
    assert prefetch.result(20).loaded_chunks == loading.report().loaded_chunks == 4
    assert same_bits(loading.out, kv)
    assert transfer.drain(10), "the load's own promotions, too"
    assert host.match_prefix([chunk.cell(0) for chunk in chunks]) == 4
    assert len(gate.asked) == 1
    assert at_rest(transfer)


def test_a_load_does_not_wait_for_a_prefetch_which_leaves_it_to_the_load(make: MakeTransfer, gate: GatedStore) -> None:
    """All slots are busy: the prefetch's turn comes when the load fetches what it wanted."""
    kv = random_kv(SPACE, 8 * N)
    other = upload(make(), random_kv(SPACE, 4 * N, seed=1))
    chunks = upload(make(), kv)
    host = HostTier(1 << 20)
    transfer = make(host, over=gate, piece_bytes=1)
    busy = Loading(transfer, other)
    gate.wait_for(4)
    prefetch, second = transfer.prefetch(chunks[:4]), transfer.prefetch(chunks[:4])
    loading = Loading(transfer, chunks[:4])
    assert len(gate.asked) == 4
    gate.answer(*[None] * 4)
    gate.wait_for(4)
    gate.open()
    assert loading.report().loaded_chunks == busy.report().loaded_chunks == 4
    assert same_bits(loading.out, kv[:, :, : 4 * N])
    assert prefetch.result(20).loaded_chunks == second.result(20).loaded_chunks == 4
    assert transfer.drain(10), "who of the three keeps a cell in the tier is chance"
    assert host.match_prefix([chunk.cell(0) for chunk in chunks[:4]]) == 4
    assert len(gate.asked) <= 4 + 4 + 4
    assert at_rest(transfer)


def test_a_cancelled_prefetch_is_taken_over(make: MakeTransfer, gate: GatedStore) -> None:
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(make(), kv)
    transfer = make(HostTier(1 << 20), over=gate)
    first, second = transfer.prefetch(chunks), transfer.prefetch(chunks)
    gate.wait_for(1)
    loading = Loading(transfer, chunks)
    gate.wait_for(2)
    assert first.cancel()
    gate.open()
    assert second.result(20).loaded_chunks == loading.report().loaded_chunks == 4
    assert same_bits(loading.out, kv)
    assert len(gate.asked) == 2, "the load's and the cancelled one's; the other prefetch waits for the load"
    assert at_rest(transfer)
