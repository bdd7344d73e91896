"""Whole arrays of a small model up and down through a `Transfer`: what arrived, and what the sink was called with.

For tests of the data path. Raises what the transfer raises.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.fast import FastCodec
from lmcache_s3.loading import LoadReport
from lmcache_s3.publish import make_record
from lmcache_s3.testing.faults import Verb
from lmcache_s3.testing.small import small_space
from lmcache_s3.transfer import Transfer
from lmcache_s3.types import Buffer, ChunkRef, ExtentName, Grid

SPACE = small_space()
GEOMETRY = SPACE.geometry
N = GEOMETRY.chunk_tokens
WHOLE = Grid()
GETS: frozenset[Verb] = frozenset({"get"})
MakeTransfer = Callable[..., Transfer]


class CopiedCodec(FastCodec):
    """`fast`, but decoded into memory of its own as other codecs are, and with no more of it than that."""

    view = KVCodec.view  # type: ignore[assignment]

    def decode(self, data: Buffer, spec: CellSpec, position: CellPosition | None, out: np.ndarray) -> None:
        np.copyto(out, FastCodec.view(self, data, spec, position))


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
