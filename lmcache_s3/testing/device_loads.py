"""Loads of a worker role into blocks that their device decodes into itself: on CPU tensors, in Triton's interpreter.

What is loaded is compared with what a worker of the host's path loads, all memory of the blocks. Each check raises
`AssertionError`; run them by `Interpreter`. `directory` is where their bucket lies, a new one.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.cachegen import CachegenCodec
from lmcache_s3.codecs.device_proof import made_cells
from lmcache_s3.codecs.dtypes import from_float32
from lmcache_s3.codecs.header import HEADER_BYTES, wrap
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.coded import Coded
from lmcache_s3.config import load_settings
from lmcache_s3.errors import Unusable
from lmcache_s3.identity import KVGroup
from lmcache_s3.integrations.vllm import worker as worker_module
from lmcache_s3.integrations.vllm.metadata import LoadOrder, StepOrders, WorkerReport
from lmcache_s3.integrations.vllm.model import ModelFacts
from lmcache_s3.integrations.vllm.worker import WorkerRole
from lmcache_s3.testing.calibrations import made_calibration
from lmcache_s3.testing.whole_arrays import upload
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.transfer import Transfer
from lmcache_s3.types import HASH_BYTES, ChunkRef, Geometry, Grid

if TYPE_CHECKING:
    from lmcache_s3.integrations.vllm.on_device import DeviceDecoder, Order, Place
    from lmcache_s3.kernels.device_cachegen import Places

LAYERS, HEADS, DIM = 2, 2, 16
CHUNK, BLOCK = 16, 4
"""Tokens. A cell is of other shape than those that a decoder proves itself by."""
CHUNKS = 2
_BLOCKS = CHUNKS * CHUNK // BLOCK + 3
_SPACE = "0" * 32
_SPEC = CellSpec((2, LAYERS, CHUNK, HEADS, DIM), "bfloat16")
_POSITION = CellPosition(bytes(HASH_BYTES), CHUNK, 0, 0)


class _Attention:
    """Keeps each slot's K and V side by side."""

    def do_kv_cache_update(
        self, layer: object, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        where = slots // cache.shape[2], slice(None), slots % cache.shape[2]
        cache[where] = torch.cat((k, v), dim=2).to(cache.dtype)


def _facts(tensor_parallel: int) -> ModelFacts:
    return ModelFacts(
        path="/nowhere",
        revision=None,
        name="small",
        group=KVGroup("full", LAYERS, 2, HEADS, DIM),
        kv_dtype="bfloat16",
        rope={},
        quantisation=None,
        block_tokens=BLOCK,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=1,
    )


def _codec(name: str) -> KVCodec:
    if name != "transform":
        return make_codec(name)
    spec = CellSpec((2, LAYERS, CHUNK, HEADS, DIM), "bfloat16")
    return make_codec(
        name, {"calibration": calibrations.register(made_calibration(spec, unit_heads=1, streams=(1, 0)))}
    )


@contextmanager
def _short_proof(cells: int) -> Iterator[None]:
    """The interpreter takes its time."""
    if not cells:
        yield
        return
    from lmcache_s3.integrations.vllm import on_device

    with mock.patch.object(on_device, "made_cells", lambda codec, spec: made_cells(codec, spec)[:cells]):
        yield


class Bucket:
    """Stored chunks, and workers that load them. damage: of the first chunk's cells, in their streams."""

    def __init__(self, directory: str, codec: str, *, damage: bool = False) -> None:
        self._url = f"file://{directory}"
        self._codec = _codec(codec)
        geometry = Geometry(2, LAYERS, HEADS, DIM, "bfloat16", CHUNK)
        values = np.random.default_rng(7).standard_normal((2, LAYERS, CHUNKS * CHUNK, HEADS, DIM))
        kv = from_float32(values.astype(np.float32), "bfloat16")
        self._stored = self._codec.encode(kv[:, :, :CHUNK], _SPEC, _POSITION)  # also compiles what `upload` runs
        store = open_store(self._url)
        transfer = Transfer(store, _SPACE, geometry, _Damaging() if damage else self._codec, [])
        self.chunks: Sequence[ChunkRef] = upload(transfer, kv, Grid())
        transfer.close()
        store.close()

    def order(self, i: int) -> Order:
        """A cell, to be decoded into the i-th of as many blocks as it takes; i: 0 or 1."""
        from lmcache_s3.integrations.vllm.on_device import READ, Order

        read = READ[self._codec.id](self._stored, _SPEC, _POSITION)
        cell = Coded(self._codec, self._stored, _SPEC, _POSITION, read)
        n = CHUNK // BLOCK
        return Order(cell, range(LAYERS), range(HEADS), range(CHUNK), np.arange(n * i, n * (i + 1)))

    @contextmanager
    def worker(self, *, there: bool, tensor_parallel: int = 1, rank: int = 0, proof: int = 1) -> Iterator[WorkerRole]:
        """there: its device may decode into its blocks, if it proves itself by so many of the made-up cells; 0: all."""
        settings = load_settings(url=self._url, chunk_tokens=CHUNK, weights_digest="ab" * 32, host_bytes="8MiB")
        names = [f"layers.{i}.attn" for i in range(LAYERS)]
        attention = SimpleNamespace(impl=_Attention(), dtype=torch.bfloat16)
        facts = _facts(tensor_parallel)
        worker = WorkerRole(
            facts, settings, self._codec, attention_layers=dict.fromkeys(names, attention), tensor_rank=rank
        )
        heads = len(facts.heads_of(rank))
        caches = {name: torch.zeros(_BLOCKS, heads, BLOCK, 2 * DIM, dtype=torch.bfloat16) for name in names}
        devices = {"cpu"} if there else worker_module.DECODING_DEVICES
        with mock.patch.object(worker_module, "DECODING_DEVICES", devices), _short_proof(proof if there else 0):
            worker.register(caches)
        try:
            yield worker
        finally:
            worker.close(5)


def decoder_of(worker: WorkerRole) -> DeviceDecoder:
    assert worker._decoder is not None, "the device did not prove itself"
    return worker._decoder


def load(worker: WorkerRole, chunks: Sequence[ChunkRef], start_token: int = 0, request: str = "r") -> bool:
    """From a token of the first chunk on; whether all of it came."""
    end = len(chunks) * CHUNK
    ids = tuple(range(_BLOCKS - 1, 0, -1))[: (end - start_token) // BLOCK]
    order = LoadOrder(request, tuple(chunks), 0, start_token, end, ids)
    worker.start_loads(StepOrders(space_id=_SPACE, loads=[order]))
    give_up_s = time.monotonic() + 300
    while time.monotonic() < give_up_s:
        done, failed = worker.take_finished()
        if request in done:
            return request not in failed
        time.sleep(0.01)
    raise AssertionError("a load did not end")


def memory(worker: WorkerRole) -> bytes:
    """All of a worker's blocks."""
    assert worker._blocks is not None
    return b"".join(view.view(torch.int16).numpy().tobytes() for view in worker._blocks.views)


def wipe(worker: WorkerRole) -> None:
    assert worker._blocks is not None
    for view in worker._blocks.views:
        view.zero_()


def check_loads(directory: str, codec: str) -> None:
    """Whole cells, and parts: from within a chunk, and of a rank that has one of two heads."""
    bucket = Bucket(directory, codec)
    for parallel, rank, proof in ((1, 0, 0), (2, 1, 2)):
        with (
            bucket.worker(there=True, tensor_parallel=parallel, rank=rank, proof=proof) as ours,
            bucket.worker(there=False, tensor_parallel=parallel, rank=rank) as hosts,
        ):
            assert hosts._decoder is None
            for start in (0, BLOCK):
                for worker in (ours, hosts):
                    wipe(worker)
                    assert load(worker, bucket.chunks, start)
                assert any(memory(hosts))
                assert memory(ours) == memory(hosts), f"rank {rank} of {parallel}, from {start}: not the host's bits"
            assert decoder_of(ours).decoded_cells == 2 * CHUNKS
            assert decoder_of(ours).is_trusted


def check_without_triton(directory: str) -> None:
    """Where blocks do not lie on a GPU, nothing draws in Triton's kernels."""
    bucket = Bucket(directory, "cachegen")
    with bucket.worker(there=False) as worker:
        assert load(worker, bucket.chunks)
        drawn_in = [name for name in sys.modules if name.startswith("lmcache_s3.kernels.triton_")]
        assert not drawn_in, drawn_in


def check_misbehaviour(directory: str, how: str) -> None:
    """A device that does not do what it showed: what is loaded is the host's all the same."""
    from lmcache_s3.integrations.vllm import on_device

    bucket = Bucket(directory, "cachegen")
    with (
        _warnings() as warnings,
        mock.patch.dict(on_device.PLACE, {"cachegen": _misbehaving(how, on_device.PLACE["cachegen"])}),
        bucket.worker(there=True) as ours,
        bucket.worker(there=False) as hosts,
    ):
        assert (ours._decoder is None) == (how == "always lies"), "the proof saw it or saw what is not"
        assert load(ours, bucket.chunks)
        assert load(hosts, bucket.chunks)
        assert memory(ours) == memory(hosts), f"{how}: other bits than the host's"
        if how == "no memory":
            assert decoder_of(ours).is_trusted
            assert not warnings
        else:
            assert how == "always lies" or not decoder_of(ours).is_trusted
            assert len(warnings) == 1, warnings
        assert ours._decoder is None or not ours._decoder.decoded_cells


def check_damage(directory: str) -> None:
    """Streams that are not whole: the load fails as the host's does, and the extent is told of."""
    bucket = Bucket(directory, "cachegen", damage=True)
    told: list[WorkerReport | None] = []
    for there in (True, False):
        with bucket.worker(there=there) as worker:
            assert not load(worker, bucket.chunks)
            told.append(worker.take_report())
            if there:
                assert decoder_of(worker).is_trusted
    ours, hosts = told
    assert ours is not None
    assert hosts is not None
    assert ours.bad == hosts.bad
    assert ours.bad[0].unusable


def check_order(directory: str) -> None:
    """A GPU's streams know nothing of one another: whatever is decoded comes after what was queued when it was asked
    for, a worker's loads as much as the proof's cells, whose blocks were filled just before."""
    from lmcache_s3.integrations.vllm import on_device
    from lmcache_s3.integrations.vllm.blocks import EngineBlocks

    bucket = Bucket(directory, "cachegen")
    marks: list[object] = []
    waited: list[object] = []

    def mark(self: EngineBlocks) -> Any:
        assert all(bool(view.any()) for view in self.views), "marked before the blocks were filled"
        marks.append(object())
        return marks[-1]

    real = on_device.DeviceDecoder.decode

    def decode(self: DeviceDecoder, orders: Sequence[Order]) -> Any:
        waited.extend(order.after for order in orders)
        return real(self, orders)

    with (
        mock.patch.object(EngineBlocks, "mark", mark),
        mock.patch.object(on_device.DeviceDecoder, "decode", decode),
        bucket.worker(there=True) as ours,
    ):
        assert len(marks) == 1, "the proof"
        for view in decoder_of(ours).blocks.views:
            view.fill_(1)
        assert load(ours, bucket.chunks)
        assert decoder_of(ours).decoded_cells == CHUNKS
    assert len(marks) == 2
    assert set(waited) == set(marks), "something was decoded in no order"


def check_together(directory: str) -> None:
    """What becomes ready while the device is busy is decoded together after that."""
    from lmcache_s3.integrations.vllm import on_device

    bucket = Bucket(directory, "cachegen")
    real = on_device.PLACE["cachegen"]
    sizes: list[int] = []
    busy, free = threading.Event(), threading.Event()

    def place(cells: Sequence[Any], spec: CellSpec, places: Places) -> Sequence[Unusable | None]:
        if spec.shape[2] == CHUNK:
            sizes.append(len(cells))
            busy.set()
            assert free.wait(60)
        return real(cells, spec, places)

    with mock.patch.dict(on_device.PLACE, {"cachegen": place}), bucket.worker(there=True) as ours:
        decoder = decoder_of(ours)
        first, *others = (threading.Thread(target=decoder.put, args=([bucket.order(i)],)) for i in (0, 0, 1))
        first.start()
        assert busy.wait(60)
        for thread in others:
            thread.start()
        while len(decoder._waiting) < len(others):
            time.sleep(0.01)
        free.set()
        for thread in (first, *others):
            thread.join(120)
        assert sizes == [1, 2], sizes
        assert decoder.decoded_cells == 3


def _misbehaving(how: str, place: Place) -> Place:
    def instead(cells: Sequence[Any], spec: CellSpec, places: Places) -> Sequence[Unusable | None]:
        is_real = spec.shape[2] == CHUNK
        if is_real and how == "raises":
            raise RuntimeError("no such launch")
        if is_real and how == "no memory":
            raise torch.OutOfMemoryError
        if is_real and how == "calls them damaged":
            return [Unusable("so it says", kind="payload")] * len(cells)
        outcomes = place(cells, spec, places)
        if how == "always lies" or (is_real and how == "lies of real cells"):
            ctypes.c_uint16.from_address(int(places.addresses[0, 0]) + 2 * int(places.tokens[0, 0, 0])).value ^= 1
        return outcomes

    return instead


MISBEHAVIOURS = ("always lies", "lies of real cells", "calls them damaged", "raises", "no memory")


class _Damaging(CachegenCodec):
    """The last of a stream's bytes are wrong, in the first chunk; all else is as it should be."""

    def encode(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> bytes:
        data = super().encode(cell, spec, position)
        if position.first_token:
            return data
        payload = bytearray(data[HEADER_BYTES:])
        payload[-1] ^= 0x10
        payload[-2] ^= 0x10
        return wrap(bytes(payload), spec, position)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lmcache_s3.vllm")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
