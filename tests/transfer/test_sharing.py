"""Several loads of the same cells at once: each cell is fetched once, and nobody comes to harm by another."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.fast import FastCodec
from lmcache_s3.coded import Coded
from lmcache_s3.errors import Unavailable, Unusable
from lmcache_s3.testing.gated import GatedStore
from lmcache_s3.testing.loads_under_way import Loading, at_rest, await_waiting
from lmcache_s3.testing.small import random_kv, same_bits
from lmcache_s3.testing.whole_arrays import GEOMETRY, SPACE, CopiedCodec, MakeTransfer, N, load, upload
from lmcache_s3.tiers.host import HostTier
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.types import Buffer, ChunkRef, Grid, shard_key

CELL = GEOMETRY.chunk_bytes + 4  # as `fast` stores it
DOWN = Unavailable("injected", kind="network")


@pytest.mark.parametrize("codec", ["fast", "safetensors", "torch"])
def test_many_loads_of_one_prompt_fetch_it_once(
    make: MakeTransfer, store: CountingStore, gate: GatedStore, codec: str
) -> None:
    kv = random_kv(SPACE, 8 * N)
    chunks = upload(make(codec=codec), kv)
    transfer = make(over=gate, codec=codec)
    loads = [Loading(transfer, chunks) for _ in range(6)]
    gate.open()
    assert [one.report().loaded_chunks for one in loads] == [8] * 6
    assert all(same_bits(one.out, kv) for one in loads)
    stored = sum(chunk.cell(0).length for chunk in chunks)
    assert sum(n_bytes for _, n_bytes in gate.asked) == stored
    assert sum(one.report().requests for one in loads) == len(gate.asked) == 1
    assert all(one.report().tier_bytes == {"object": stored} for one in loads)
    assert all(one.handle.done_bytes == stored for one in loads)
    assert (transfer.metrics.count("shared_cells"), transfer.metrics.count("shared_bytes")) == (5 * 8, 5 * stored)
    stats = transfer.stats()["object"]
    assert (stats.hits, stats.read_bytes, stats.bad_cells) == (8, stored, 0)
    assert at_rest(transfer)


def test_what_overlaps_in_part_is_fetched_once(make: MakeTransfer, gate: GatedStore) -> None:
    kv = random_kv(SPACE, 12 * N)
    chunks = upload(make(), kv)
    transfer = make(over=gate, piece_bytes=3 * CELL)
    spans = [(0, 5), (3, 9), (0, 12), (11, 12), (4, 6)]
    loads = [Loading(transfer, chunks[a:b]) for a, b in spans]
    gate.open()
    for (a, b), one in zip(spans, loads, strict=True):
        assert not one.report().failed
        assert same_bits(one.out, kv[:, :, a * N : b * N])
    assert sum(n_bytes for _, n_bytes in gate.asked) == 12 * CELL
    assert transfer.metrics.count("shared_cells") == (9 - 3) + 12 + 1 + 2 - (12 - 5)
    assert at_rest(transfer)


def test_loads_of_different_heads_share_the_shards_they_both_want(make: MakeTransfer, gate: GatedStore) -> None:
    kv = random_kv(SPACE, 2 * N)
    chunks = upload(make(), kv, Grid(1, 2))
    transfer = make(over=gate)
    loads = {heads: Loading(transfer, chunks, {"heads": range(*heads)}) for heads in ((0, 4), (0, 1), (1, 3))}
    gate.open()
    for (first, stop), one in loads.items():
        assert one.report().loaded_chunks == 2
        assert same_bits(one.out[:, :, :, first:stop], kv[:, :, :, first:stop])
    assert sum(n_bytes for _, n_bytes in gate.asked) == 4 * (GEOMETRY.chunk_bytes // 2 + 4)
    assert at_rest(transfer)


@pytest.mark.parametrize("end", ["cancel", "deadline", "sink"])
def test_who_waits_begins_again_when_the_first_ends_early(make: MakeTransfer, gate: GatedStore, end: str) -> None:
    kv = random_kv(SPACE, 8 * N)
    chunks = upload(make(), kv)
    transfer = make(over=gate, piece_bytes=1)

    def fails(*_: object) -> None:
        raise ZeroDivisionError

    first = transfer.load(chunks, fails, deadline_s=0.2 if end == "deadline" else None)
    others = [Loading(transfer, chunks) for _ in range(3)]
    gate.wait_for(4)
    if end == "cancel":
        assert first.cancel()
    elif end == "sink":
        gate.answer(None)
    if end == "deadline":
        assert len(first.result(20).failed) == 8
    else:
        with pytest.raises((Unavailable, ZeroDivisionError)):
            first.result(20)
    await_waiting(transfer, 2 * 8)
    gate.open()
    for one in others:
        assert one.report().loaded_chunks == 8
        assert same_bits(one.out, kv)
    assert len(gate.asked) <= 4 + 8, "one of the others fetched for all of them"
    assert at_rest(transfer)


def test_a_load_that_waits_ends_at_its_own_deadline_or_cancel(make: MakeTransfer, gate: GatedStore) -> None:
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(make(), kv)
    transfer = make(over=gate)
    first = Loading(transfer, chunks)
    late, cancelled = Loading(transfer, chunks, {"deadline_s": 0.1}), Loading(transfer, chunks)
    gate.wait_for(1)
    assert {error.kind for _, _, error in late.report().failed} == {"timeout"}
    assert cancelled.handle.cancel()
    gate.open()
    assert first.report().loaded_chunks == 4
    assert transfer.drain(10)
    assert not late.out.any()
    assert not cancelled.out.any()
    assert transfer.metrics.count("shared_cells") == 0
    assert at_rest(transfer)


def test_a_sink_that_raises_harms_its_own_load_only(make: MakeTransfer, gate: GatedStore) -> None:
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(make(), kv)
    transfer = make(over=gate)

    def fails(*_: object) -> None:
        raise ZeroDivisionError

    first, wrong = Loading(transfer, chunks), transfer.load(chunks, fails)
    last = Loading(transfer, chunks)
    gate.open()
    with pytest.raises(ZeroDivisionError) as e:
        wrong.result(20)
    assert any("in fails" in note for note in e.value.__notes__)
    for one in (first, last):
        assert one.report().loaded_chunks == 4
        assert same_bits(one.out, kv)
    assert len(gate.asked) == 1
    assert at_rest(transfer)


def test_a_load_that_is_interrupted_while_it_begins_is_waited_for_by_nobody(
    make: MakeTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(make(), kv)
    transfer = make()

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(transfer._load_means.reader, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Loading(transfer, chunks)
    after = Loading(transfer, chunks, {"deadline_s": 5})
    assert after.report().loaded_chunks == 4
    assert same_bits(after.out, kv)
    assert at_rest(transfer)


def test_one_error_of_the_store_fails_one_load(make: MakeTransfer, gate: GatedStore) -> None:
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(make(), kv)
    transfer = make(over=gate)
    loads = [Loading(transfer, chunks) for _ in range(4)]
    gate.answer(DOWN)
    assert loads[0].report().failed[0][2] is DOWN
    await_waiting(transfer, 2 * 4)
    gate.open()
    for one in loads[1:]:
        assert one.report().loaded_chunks == 4
        assert same_bits(one.out, kv)
    assert len(gate.asked) == 2
    assert at_rest(transfer)


def test_a_store_that_fails_twice_has_failed_for_all(make: MakeTransfer, gate: GatedStore) -> None:
    chunks = upload(make(), random_kv(SPACE, 4 * N))
    transfer = make(over=gate)
    loads = [Loading(transfer, chunks) for _ in range(5)]
    gate.answer(DOWN)
    assert loads[0].report().failed[0][2] is DOWN
    await_waiting(transfer, 3 * 4)
    gate.answer(DOWN)
    for one in loads:
        assert {error.kind for _, _, error in one.report().failed} == {"network"}
    assert len(gate.asked) == 2
    assert at_rest(transfer)


@pytest.mark.parametrize("kind", ["checksum", "missing", "truncated"])
def test_damage_is_found_once_and_told_to_all(
    make: MakeTransfer, store: CountingStore, gate: GatedStore, kind: str
) -> None:
    kv = random_kv(SPACE, 6 * N)
    chunks = upload(make(), kv)
    key = shard_key(SPACE.id, chunks[0].extent.name, Grid(), 0)
    body = bytearray(store.get(key))
    if kind == "missing":
        store.delete(key)
    elif kind == "truncated":
        store.put(key, body[: 3 * CELL + 100])
    else:
        body[3 * CELL + 50] ^= 1
        store.put(key, body)
    transfer = make(over=gate)
    loads = [Loading(transfer, chunks) for _ in range(4)]
    gate.open()
    whole = 0 if kind == "missing" else 3
    for one in loads:
        report = one.report()
        assert report.loaded_chunks == whole
        assert (report.failed[0][0], report.failed[0][2].kind) == (whole, kind)
        assert isinstance(report.failed[0][2], Unusable)
        assert same_bits(one.out[:, :, : whole * N], kv[:, :, : whole * N])
    stats = transfer.stats()["object"]
    if kind == "missing":
        assert (stats.misses, len(gate.asked)) == (1, 1)
    elif kind == "checksum":
        assert (stats.bad_cells, len(gate.asked)) == (1, 1)
    else:
        assert len(gate.asked) <= 1 + 6, "all of it, then one by one; not once for each load"
    assert at_rest(transfer)


@pytest.mark.parametrize("codec", [FastCodec(), CopiedCodec()], ids=["viewed", "decoded"])
def test_no_sink_can_change_what_the_next_one_gets(make: MakeTransfer, codec: KVCodec) -> None:
    transfer = make(codec=codec)
    chunks = upload(transfer, random_kv(SPACE, N))

    def writes(_chunk: int, _layers: range, _heads: range, cell: np.ndarray) -> None:
        cell[:] = 0

    with pytest.raises(ValueError, match="read-only"):
        transfer.load(chunks, writes).result(20)


class CodedLoading(Loading):
    """One that takes cells undecoded, and is its own `CodedSink`. verdict: what it says of each."""

    verdict: Unusable | None = None

    def __post_init__(self) -> None:
        self.options = self.options | {"coded": self}
        super().__post_init__()

    def read(self, codec: KVCodec, data: Buffer, spec: CellSpec, position: CellPosition) -> Coded:
        return Coded(codec, data, spec, position, None)

    def put(self, chunk: int, layers: range, heads: range, cell: Coded) -> Unusable | None:
        if self.verdict is None:
            self.sink(chunk, layers, heads, cell.decoded())
        return self.verdict


class Distrusting(CodedLoading):
    verdict = Unusable("injected", kind="payload")


@pytest.mark.parametrize("kinds", [(Loading, CodedLoading), (CodedLoading, Loading, CodedLoading)])
def test_loads_that_decode_themselves_share_with_those_that_do_not(
    make: MakeTransfer, gate: GatedStore, kinds: tuple[type[Loading], ...]
) -> None:
    kv = random_kv(SPACE, 3 * N)
    chunks = upload(make(codec=CopiedCodec()), kv)
    transfer = make(over=gate, codec=CopiedCodec())
    loads = [kind(transfer, chunks) for kind in kinds]
    gate.open()
    for one in loads:
        assert one.report().loaded_chunks == 3
        assert same_bits(one.out, kv)
    assert len(gate.asked) == 1
    assert at_rest(transfer)


def test_a_prefetch_takes_what_another_load_decodes_itself_as_it_is(make: MakeTransfer, gate: GatedStore) -> None:
    class Counting(CopiedCodec):
        decoded = 0

        def decode(self, data: Buffer, spec: CellSpec, position: CellPosition | None, out: np.ndarray) -> None:
            self.decoded += 1
            super().decode(data, spec, position, out)

    kv = random_kv(SPACE, 3 * N)
    chunks = upload(make(codec=CopiedCodec()), kv)
    host, codec = HostTier(1 << 20), Counting()
    transfer = make(host, over=gate, codec=codec)
    loading, prefetch = CodedLoading(transfer, chunks), transfer.prefetch(chunks)
    gate.open()
    assert loading.report().loaded_chunks == prefetch.result(20).loaded_chunks == 3
    assert same_bits(loading.out, kv)
    assert codec.decoded == 3, "by the load's own sink, and for nobody else"
    assert transfer.drain(10)
    assert host.match_prefix([chunk.cell(0) for chunk in chunks]) == 3
    assert at_rest(transfer)


def test_damage_that_shows_when_a_cell_is_put_fails_who_was_told(make: MakeTransfer, gate: GatedStore) -> None:
    kv = random_kv(SPACE, N)
    chunks = upload(make(), kv)
    for kinds, loaded in (((Distrusting, CodedLoading), [0, 0]), ((CodedLoading, Distrusting, Loading), [1, 0, 1])):
        transfer = make(over=gate)
        loads = [kind(transfer, chunks) for kind in kinds]
        gate.answer(None)
        assert [one.report().loaded_chunks for one in loads] == loaded
        assert {one.report().failed[0][2].kind for one in loads if one.report().failed} == {"payload"}
        assert at_rest(transfer)


def test_a_lie_about_a_chunk_is_not_shared(make: MakeTransfer, gate: GatedStore) -> None:
    """The same cell, but said to belong elsewhere: its header says no, to who claims that and to nobody else."""
    kv = random_kv(SPACE, N)
    chunks = upload(make(codec="safetensors"), kv)
    transfer = make(over=gate, codec="safetensors")
    wrong = Loading(transfer, [ChunkRef(bytes(16), chunks[0].extent, 0)])
    right = Loading(transfer, chunks)
    gate.open()
    assert wrong.report().failed[0][2].kind == "position"
    assert right.report().loaded_chunks == 1
    assert same_bits(right.out, kv)


def test_what_lies_behind_a_failure_is_not_waited_for(
    make: MakeTransfer, store: CountingStore, gate: GatedStore
) -> None:
    """Another load fetches the rest of the prompt, and takes long; the beginning has failed for this one."""
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(make(), kv)
    bad = upload(make(), random_kv(SPACE, N, seed=1), first_token=7)
    store.delete(shard_key(SPACE.id, bad[0].extent.name, Grid(), 0))
    transfer = make(over=gate, piece_bytes=1)
    first = Loading(transfer, chunks[1:4])
    gate.wait_for(3)
    second = Loading(transfer, bad + chunks[1:4])
    gate.wait_for(4)
    gate.answer(*[None] * 4)
    assert second.report().failed[0][2].kind == "missing"
    assert first.report().loaded_chunks == 3
    third = Loading(transfer, chunks)
    gate.wait_for(4)
    fourth = Loading(transfer, [*bad, *chunks])
    assert not fourth.handle.done()
    gate.open()
    assert third.report().loaded_chunks == 4
    assert fourth.report().failed[0][2].kind == "missing"
    assert at_rest(transfer)


def test_what_lies_behind_a_chunk_that_cannot_even_be_tried_is_not_waited_for(
    make: MakeTransfer, gate: GatedStore
) -> None:
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(make(), kv)
    record = chunks[0].extent
    strange = replace(record, name=replace(record.name, codec="nobody-knows"))
    transfer = make(over=gate)
    first = Loading(transfer, chunks)
    gate.wait_for(1)
    second = Loading(transfer, [ChunkRef(chunks[0].prefix_hash, strange, 0), *chunks])
    assert second.report().failed[0][2].kind == "codec"
    assert not first.handle.done()
    gate.open()
    assert first.report().loaded_chunks == 4
    assert at_rest(transfer)


@pytest.mark.parametrize("codec", [FastCodec(), CopiedCodec()], ids=["viewed", "decoded"])
def test_a_budget_of_a_few_cells_serves_many_loads_of_the_same(
    make: MakeTransfer, store: CountingStore, codec: KVCodec
) -> None:
    """Who waits holds no memory that who fetches needs, and what is shared is counted once."""
    kv = random_kv(SPACE, 24 * N)
    chunks = upload(make(codec=codec), kv)
    transfer = make(HostTier(1 << 22), codec=codec, staging_bytes=6 * CELL, piece_bytes=1)
    spans = [(a % 5, 24 - a % 3) for a in range(12)]
    loads = [Loading(transfer, chunks[a:b]) for a, b in spans]
    for (a, b), one in zip(spans, loads, strict=True):
        assert not one.report().failed
        assert same_bits(one.out, kv[:, :, a * N : b * N])
    assert transfer.budget.peak_bytes <= transfer.budget.total_bytes
    assert transfer.buffers.peak_bytes <= transfer.budget.total_bytes
    assert at_rest(transfer)


def test_a_request_that_hangs_is_overtaken_for_all_who_wait(make: MakeTransfer, gate: GatedStore) -> None:
    kv = random_kv(SPACE, 4 * N)
    chunks = upload(make(), kv)
    transfer = make(over=gate)
    gate.answer(*[None] * 40)
    for _ in range(40):
        assert load(transfer, chunks)[1].loaded_chunks == 4
    hedged = transfer.metrics.count("hedged_requests_won")
    loads = [Loading(transfer, chunks) for _ in range(3)]
    gate.wait_for(2)
    gate.answer(None)
    for one in loads:
        assert one.report().loaded_chunks == 4
        assert same_bits(one.out, kv)
    assert len(gate.asked) == 40 + 2
    assert transfer.metrics.count("hedged_requests_won") == hedged + 1 or transfer.drain(0) is False
    gate.open()
    assert at_rest(transfer)


def test_closing_ends_who_fetches_and_who_waits(make: MakeTransfer, gate: GatedStore) -> None:
    chunks = upload(make(), random_kv(SPACE, 4 * N))
    transfer = make(over=gate)
    loads = [Loading(transfer, chunks) for _ in range(3)]
    gate.wait_for(1)
    threading.Timer(0.1, gate.open).start()
    transfer.close()
    for one in loads:
        assert {error.kind for _, _, error in one.handle.result(0).failed} == {"closed"}
        assert not one.out.any()


def test_a_chunk_asked_for_twice_by_one_load_is_fetched_once(make: MakeTransfer, gate: GatedStore) -> None:
    kv = random_kv(SPACE, 2 * N)
    chunks = upload(make(), kv)
    transfer = make(over=gate)
    gate.open()
    twice = Loading(transfer, [chunks[0], chunks[1], chunks[0]])
    assert twice.report().loaded_chunks == 3
    assert same_bits(twice.out, np.concatenate([kv, kv[:, :, :N]], axis=2))
    assert sum(n_bytes for _, n_bytes in gate.asked) == 2 * CELL
    assert at_rest(transfer)
