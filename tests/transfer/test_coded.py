"""Cells handed over coded, to sinks that decode them themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.coded import Coded
from lmcache_s3.errors import Unavailable, Unusable
from lmcache_s3.handle import Handle
from lmcache_s3.loading import LoadReport
from lmcache_s3.testing.gated import GatedStore
from lmcache_s3.testing.small import random_kv, same_bits
from lmcache_s3.testing.whole_arrays import GEOMETRY, SPACE, MakeTransfer, N, upload
from lmcache_s3.tiers.host import HostTier
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.transfer import Transfer
from lmcache_s3.types import ChunkRef

CHUNKS = 6


class Device:
    """Decodes what it takes into an array of its own; what it does not take, the host decodes for it.

    takes: by the cell's first token. verdict: what it finds wrong with a chunk.
    """

    def __init__(
        self,
        takes: Callable[[int], bool] = lambda token: True,
        verdict: Callable[[int], Unusable | None] = lambda chunk: None,
    ) -> None:
        self._takes, self._verdict = takes, verdict
        self.out = np.zeros((*GEOMETRY.chunk_shape[:2], CHUNKS * N, *GEOMETRY.chunk_shape[3:]), GEOMETRY.storage_dtype)
        self.put_chunks: list[int] = []
        self.host_chunks: list[int] = []
        self._lock = threading.Lock()

    def read(self, codec: KVCodec, data: object, spec: CellSpec, position: CellPosition) -> Coded | None:
        assert isinstance(data, bytes | memoryview)
        return Coded(codec, data, spec, position, None) if self._takes(position.first_token) else None

    def put(self, chunk: int, layers: range, heads: range, cell: Coded) -> Unusable | None:
        with self._lock:
            self.put_chunks.append(chunk)
        if (error := self._verdict(chunk)) is not None:
            return error
        self._write(chunk, layers, heads, cell.decoded()[:, layers.start : layers.stop, :, heads.start : heads.stop])
        return None

    def host(self, chunk: int, layers: range, heads: range, cell: np.ndarray) -> None:
        with self._lock:
            self.host_chunks.append(chunk)
        self._write(chunk, layers, heads, cell)

    def _write(self, chunk: int, layers: range, heads: range, cell: np.ndarray) -> None:
        self.out[:, layers.start : layers.stop, chunk * N : (chunk + 1) * N, heads.start : heads.stop] = cell

    def load(self, transfer: Transfer, chunks: list[ChunkRef], heads: range | None = None) -> Handle[LoadReport]:
        return transfer.load(chunks, self.host, heads=heads, coded=self)


@pytest.mark.parametrize("near", [False, True])
def test_what_a_sink_takes_is_not_decoded_for_it(make: MakeTransfer, near: bool) -> None:
    """From the bucket, and from the host tier."""
    kv = random_kv(SPACE, CHUNKS * N)
    transfer = make(HostTier(1 << 20))
    chunks = upload(transfer if near else make(), kv)
    device = Device(takes=lambda token: token // N % 3 != 1)
    assert device.load(transfer, chunks).result(20).loaded_chunks == CHUNKS
    assert same_bits(device.out, kv)
    assert sorted(device.put_chunks) == [0, 2, 3, 5]
    assert sorted(device.host_chunks) == [1, 4]
    assert transfer.drain(10)
    assert transfer.budget.held_bytes == 0


def test_what_it_finds_unusable_fails_its_chunk_and_leaves_the_tiers(make: MakeTransfer) -> None:
    kv = random_kv(SPACE, CHUNKS * N)
    host = HostTier(1 << 20)
    chunks = upload(make(host), kv)
    transfer = make(host)
    assert host.match_prefix([chunk.cell(0) for chunk in chunks]) == CHUNKS
    device = Device(verdict=lambda chunk: Unusable("not whole", kind="payload") if chunk == 3 else None)
    report = device.load(transfer, chunks).result(20)
    assert report.loaded_chunks == 3
    assert [(i, error.kind) for i, _, error in report.failed] == [(3, "payload")]
    assert same_bits(device.out[:, :, : 3 * N], kv[:, :, : 3 * N])
    assert transfer.drain(10)
    assert host.match_prefix([chunk.cell(0) for chunk in chunks]) == 3


@pytest.mark.parametrize("error", [Unusable("bad", kind="header"), Unavailable("away", kind="network")])
def test_what_cannot_be_read_fails_as_what_cannot_be_decoded(make: MakeTransfer, error: Exception) -> None:
    class Reads(Device):
        def read(self, codec: KVCodec, data: object, spec: CellSpec, position: CellPosition) -> Coded | None:
            if position.first_token == 2 * N:
                raise error
            return super().read(codec, data, spec, position)

    chunks = upload(make(), random_kv(SPACE, CHUNKS * N))
    report = Reads().load(make(), chunks).result(20)
    assert report.loaded_chunks == 2
    assert report.failed[0][2] is error


def test_loads_at_once_fetch_once_and_each_has_its_cells_put(make: MakeTransfer, store: CountingStore) -> None:
    """They want different heads of the cells, and one of them takes none coded."""
    kv = random_kv(SPACE, CHUNKS * N)
    chunks = upload(make(), kv)
    gate = GatedStore(store)
    transfer = make(over=gate)
    wanted = [range(4), range(1, 3), range(4)]
    devices = [Device(), Device(), Device(takes=lambda token: False)]
    handles = [device.load(transfer, chunks, heads) for device, heads in zip(devices, wanted, strict=True)]
    gate.open()
    assert [handle.result(20).loaded_chunks for handle in handles] == [CHUNKS] * 3
    for device, heads in zip(devices, wanted, strict=True):
        assert same_bits(device.out[:, :, :, heads.start : heads.stop], kv[:, :, :, heads.start : heads.stop])
    assert len(gate.asked) == 1
    assert sorted(devices[1].put_chunks) == list(range(CHUNKS))
