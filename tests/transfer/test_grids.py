"""Grids and arguments of the data path: what one grid wrote every other reads, and nonsense is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lmcache_s3.errors import Invalid
from lmcache_s3.loading import LoadReport
from lmcache_s3.testing.small import random_kv, same_bits
from lmcache_s3.testing.whole_arrays import GEOMETRY, SPACE, MakeTransfer, N, load, upload
from lmcache_s3.types import ChunkRef, ExtentName, Grid


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
