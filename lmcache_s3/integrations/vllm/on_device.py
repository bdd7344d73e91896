"""Stored cells into an engine's blocks by the blocks' own device: what crosses the bus is coded.

Cells of several threads and loads that are ready together are decoded together: whoever finds the device free takes
all that wait, the others wait for him. Work is queued on a stream of its own, after what the engine had queued on its
own when the load began, and is waited for before anybody is told.

Nobody is to be trusted with tokens unseen: a decoder is made only after it has decoded made-up cells of this model on
this device, into memory laid out as the engine's, to the bits that the host gives, with the same verdict on damaged
ones. And of each kind of cell the first that is loaded is decoded on the host, too, and compared with what the blocks
hold. A decoder that is wrong once, or that fails for another reason than memory, is never asked again; what it was to
decode is decoded on the host. Only the host's word makes a cell unusable.

This is the only module here that draws in Triton: import it where blocks lie on a GPU. Raises nothing but from
`CodedSink.read`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import numpy as np
import torch

from lmcache_s3.codecs import cachegen, transform
from lmcache_s3.codecs.arrays import storage_dtype
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.device import on, place_cachegen
from lmcache_s3.codecs.device_proof import made_cells
from lmcache_s3.codecs.device_transform import place_transform
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.coded import Coded, CodedSink
from lmcache_s3.errors import Unusable
from lmcache_s3.integrations.vllm.blocks import EngineBlocks, integers
from lmcache_s3.kernels.device_cachegen import UNSIGNED, Places
from lmcache_s3.types import Buffer, KVDtype

logger = logging.getLogger("lmcache_s3.vllm")

Place = Callable[[Sequence[Any], CellSpec, Places], Sequence[Unusable | None]]
"""Cells as their codec's `read_cell` gave them, to where they belong."""
READ: Mapping[str, Callable[[Buffer, CellSpec, CellPosition], Any]] = {
    "cachegen": cachegen.read_cell,
    "transform": transform.read_cell,
}
PLACE: Mapping[str, Place] = {"cachegen": place_cachegen, "transform": place_transform}

_MOST_VALUES = 1 << 27
"""Decoded at once: a byte each of device memory that the engine does not know of, and where only a part of a cell is
wanted, the cell."""
_MOST_KINDS = 256
"""Kinds of cells remembered as compared."""
_PROOF_LAYERS = 2
_PROOF_BLOCKS = 2
"""Of a made-up cell, the engine's kernel blocks."""


class Verdict(Enum):
    PLACED = auto()
    DECLINED = auto()
    """Nobody decoded it."""


Outcome = Verdict | Unusable
"""`Unusable`: the device says so. Let the host look before anybody believes it."""


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """A cell to decode. layers, heads: of the model, and tokens: of the cell, what is wanted of it. ids: the kernel
    blocks of those tokens. after: what must be done on the device before they are written."""

    cell: Coded
    layers: range
    heads: range
    tokens: range
    ids: np.ndarray
    after: torch.cuda.Event | None = None

    @property
    def is_whole(self) -> bool:
        """All of the cell is wanted."""
        _, layers, tokens, heads, _ = self.cell.spec.shape
        return (len(self.layers), len(self.tokens), len(self.heads)) == (layers, tokens, heads)

    @property
    def group(self) -> Hashable:
        """Equal for cells that can be decoded together."""
        return self.cell.codec.id, self.cell.spec, self.layers, self.heads, self.is_whole

    def cut(self) -> tuple[slice, slice, slice, slice]:
        """What is wanted of the cell's first four axes."""
        position = self.cell.position
        layers, heads = (
            slice(of.start - first, of.stop - first)
            for of, first in ((self.layers, position.first_layer), (self.heads, position.first_head))
        )
        return slice(None), layers, slice(self.tokens.start, self.tokens.stop), heads


@dataclass(slots=True, eq=False)
class _Entry:
    order: Order
    outcome: Outcome | None = None


class _Disagreement(Exception):
    """The device and the host do not say the same."""


class DeviceDecoder:
    """Thread-safe. place: by codec."""

    def __init__(self, blocks: EngineBlocks, place: Mapping[str, Place] = PLACE) -> None:
        self.blocks, self._place = blocks, place
        self._device = blocks.views[0].device
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._waiting: deque[_Entry] = deque()
        self._turn = threading.Lock()
        self._compared: set[Hashable] = set()
        self.is_trusted = True
        self.decoded_cells = 0

    def takes(self, codec: str) -> bool:
        return self.is_trusted and codec in self._place

    def sink(self, place: Callable[[int], tuple[np.ndarray, range]], after: torch.cuda.Event | None) -> CodedSink:
        """For one load. place: of a chunk its blocks, and which of its tokens they are for. after: as in `Order`."""
        return _Sink(self, place, after)

    def put(self, orders: Sequence[Order]) -> list[Outcome]:
        """Decode cells and wait until they are where they belong. What is declined was not, or not rightly, written."""
        entries = [_Entry(order) for order in orders]
        with self._lock:
            self._waiting.extend(entries)
        with self._turn:
            while any(entry.outcome is None for entry in entries):
                self._run(self._next())
            self.decoded_cells += sum(entry.outcome is Verdict.PLACED for entry in entries)
        return [entry.outcome or Verdict.DECLINED for entry in entries]

    def _next(self) -> list[_Entry]:
        """What is decoded together next."""
        batch: list[_Entry] = []
        values = 0
        with self._lock:
            while self._waiting:
                values += int(np.prod(self._waiting[0].order.cell.spec.shape))
                if batch and values > _MOST_VALUES:
                    break
                batch.append(self._waiting.popleft())
        return batch

    def _run(self, batch: Sequence[_Entry]) -> None:
        outcomes: dict[_Entry, Outcome] = {}
        try:
            if self.is_trusted:
                found = self.decode([entry.order for entry in batch])
                outcomes = dict(zip(batch, found, strict=True))
        except torch.OutOfMemoryError:
            logger.info("no memory on %s to decode %d cells: the host does", self._device, len(batch))
        except Exception as error:  # noqa: BLE001 - whatever a device may say: the host decodes
            self.distrust(error)
        for entry in batch:
            entry.outcome = outcomes.get(entry, Verdict.DECLINED)

    def distrust(self, why: Exception) -> None:
        """Ask the device no more."""
        with self._lock:
            was_trusted, self.is_trusted = self.is_trusted, False
        if was_trusted:
            logger.warning("cells are decoded on the host from now on, not on %s: %r", self._device, why)

    def decode(self, orders: Sequence[Order]) -> list[Outcome]:
        """Decode cells together; for one thread at a time. Raises whatever goes wrong: nothing is being written then,
        but what was may be wrong."""
        stream: AbstractContextManager[object] = nullcontext()
        if self._stream is not None:
            stream = torch.cuda.stream(self._stream)
        together = Counter(order.group for order in orders)
        with on(self._device), stream:
            outcomes = self._decode(orders)
            for order, outcome in zip(orders, outcomes, strict=True):
                if outcome is Verdict.PLACED:
                    self._compare_first(order, together[order.group])
        return outcomes

    def _decode(self, orders: Sequence[Order]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        groups: dict[Hashable, list[int]] = {}
        for i, order in enumerate(orders):
            if order.after is not None and self._stream is not None:
                self._stream.wait_event(order.after)
            groups.setdefault(order.group, []).append(i)
        try:
            for group in groups.values():
                found = self._decode_group([orders[i] for i in group])
                outcomes.update(zip(group, found, strict=True))
        finally:  # also if something failed: nothing of ours may be written once anybody was told
            if self._stream is not None:
                self._stream.synchronize()
        return [outcomes[i] for i in range(len(orders))]

    def _decode_group(self, orders: Sequence[Order]) -> list[Outcome]:
        """Cells of one group."""
        first = orders[0]
        spec, place = first.cell.spec, self._place[first.cell.codec.id]
        cells = [order.cell.read for order in orders]
        places = self._places(orders) if first.is_whole else None
        if places is not None:
            return [outcome or Verdict.PLACED for outcome in place(cells, spec, places)]
        beside = torch.empty((len(cells), *spec.shape), dtype=_unsigned(spec), device=self._device)
        outcomes: list[Outcome] = []
        for i, outcome in enumerate(place(cells, spec, Places.dense(beside))):
            if outcome is None:
                order = orders[i]
                self.blocks.scatter_there(order.ids, order.layers, order.heads, beside[i][order.cut()])
            outcomes.append(outcome or Verdict.PLACED)
        return outcomes

    def _places(self, orders: Sequence[Order]) -> Places | None:
        blocks, first = self.blocks, orders[0]
        layers = blocks.views[first.layers.start - blocks.layers.start : first.layers.stop - blocks.layers.start]
        ids = np.stack([order.ids for order in orders])
        return Places.paged(layers, ids, blocks.plane, blocks.local_heads(first.heads))

    def _compare_first(self, order: Order, together: int) -> None:
        """Of each kind of cells the first one, with what the host makes of it. together: how many were decoded so, for
        Triton compiles kernels anew for 1 and for multiples of 16. Raises `_Disagreement`."""
        cell = order.cell
        form = (_is_coded(cell), _calibration_of(cell), cell.position.first_token == 0)
        kind = (order.group, form, together == 1, together % 16 == 0)
        if kind in self._compared:
            return
        wanted = cell.decoded()[order.cut()]
        blocks = self.blocks
        found = blocks.gather(order.ids)
        first = order.layers.start - blocks.layers.start
        heads = blocks.local_heads(order.heads)
        found = found[:, first : first + len(order.layers), :, heads.start : heads.stop]
        if wanted.tobytes() != found.tobytes():
            raise _Disagreement(f"a cell of codec {cell.codec.id} decoded to other bits than on the host")
        if len(self._compared) >= _MOST_KINDS:
            self._compared.clear()
        self._compared.add(kind)


def proven_decoder(
    blocks: EngineBlocks, codec: str, kv_dtype: KVDtype, place: Mapping[str, Place] = PLACE
) -> DeviceDecoder | None:
    """A decoder into these blocks of what this codec stored, if its device shows that it can; None, and one warning, if
    not. Takes some seconds where Triton has not compiled its kernels yet."""
    try:
        # In a thread of its own, as loads are: the engine's may be using a memory pool that does not outlive its sleep,
        # but the tables that are made here are kept.
        with ThreadPoolExecutor(1, "lmcache-s3-proof") as thread:
            thread.submit(_prove, blocks, codec, kv_dtype, place).result()
        return DeviceDecoder(blocks, {codec: place[codec]})
    except Exception as error:  # noqa: BLE001 - the engine is starting, and does without
        device = blocks.views[0].device
        logger.warning("cells are decoded on the host, %s did not prove that it can: %r", device, error)
        return None


def _prove(blocks: EngineBlocks, codec: str, kv_dtype: KVDtype, place: Mapping[str, Place]) -> None:
    """Decode made-up cells into two twins of the blocks, once by the device and once on the host, and compare all
    memory. Raises `_Disagreement`, or whatever the device may say."""
    n_layers, slots = min(len(blocks.layers), _PROOF_LAYERS), blocks.plane.slots
    kv, _, channels = blocks.plane.index.shape
    spec = CellSpec((kv, n_layers, _PROOF_BLOCKS * slots, len(blocks.heads), channels), kv_dtype)
    orders = _proof_orders(made_cells(codec, spec), codec, spec, slots)
    if not any(_is_coded(order.cell) for order in orders):
        raise _Disagreement(f"made-up cells of {spec} are all stored raw: nothing is proven")
    used = sum(order.ids.size for order in orders)
    by_device, by_host = (blocks.twin(used + 3, n_layers) for _ in range(2))
    for view in (*by_device.views, *by_host.views):
        integers(view).fill_(1)
    begun = by_device.mark()  # this thread's stream fills what the decoder's own writes to: nothing else orders the two
    outcomes = DeviceDecoder(by_device, place).decode([replace(order, after=begun) for order in orders])
    for order, outcome in zip(orders, outcomes, strict=True):
        twins = [by_host]
        try:
            decoded = order.cell.decoded()
        except Unusable as e:
            if not isinstance(outcome, Unusable):
                raise _Disagreement(f"a made-up cell can be used there, on the host not: {e}") from e
            twins.append(by_device)  # where it was to be may be anything
            decoded = np.zeros(spec.shape, storage_dtype(spec))
        else:
            if isinstance(outcome, Unusable):
                raise _Disagreement(f"a made-up cell cannot be used there, on the host it can: {outcome}")
        for twin in twins:
            twin.scatter(order.ids, order.layers, order.heads, decoded[order.cut()])
    for here, there in zip(by_device.views, by_host.views, strict=True):
        if not torch.equal(_as_bytes(here), _as_bytes(there)):
            raise _Disagreement("made-up cells decoded to other bits than on the host, or beside their places")


def _proof_orders(cells: Sequence[tuple[bytes, CellPosition]], codec: str, spec: CellSpec, slots: int) -> list[Order]:
    """Each cell whole, and a part of the first; blocks in no order, with some between that nobody is to touch."""
    _, n_layers, n_tokens, n_heads, _ = spec.shape
    reader = make_codec(codec)
    coded: list[Coded] = []
    for data, at in cells:
        with contextlib.suppress(Unusable):  # so damaged that it does not come to decoding
            coded.append(Coded(reader, data, spec, at, READ[codec](data, spec, at)))
    ids = np.arange(1, 1 + _PROOF_BLOCKS * len(coded) + 1)[::-1]
    whole = (range(n_layers), range(n_heads), range(n_tokens))
    orders = [
        Order(cell, *whole, ids[_PROOF_BLOCKS * i : _PROOF_BLOCKS * (i + 1)].copy()) for i, cell in enumerate(coded)
    ]
    part = (range(n_layers - 1, n_layers), range(n_heads - 1, n_heads), range(n_tokens - slots, n_tokens))
    return [*orders, Order(coded[0], *part, ids[-1:].copy())]


def _as_bytes(view: torch.Tensor) -> torch.Tensor:
    return view.contiguous().view(torch.uint8)


class _Sink:
    """Takes a load's cells (`CodedSink`)."""

    def __init__(
        self, decoder: DeviceDecoder, place: Callable[[int], tuple[np.ndarray, range]], after: torch.cuda.Event | None
    ) -> None:
        self._decoder, self._place, self._after = decoder, place, after

    def read(self, codec: KVCodec, data: Buffer, spec: CellSpec, position: CellPosition) -> Coded | None:
        if not self._decoder.takes(codec.id):
            return None
        return Coded(codec, data, spec, position, READ[codec.id](data, spec, position))

    def put(self, chunk: int, layers: range, heads: range, cell: Coded) -> Unusable | None:
        ids, tokens = self._place(chunk)
        order = Order(cell, layers, heads, tokens, ids, self._after)
        (outcome,) = self._decoder.put([order])
        if outcome is Verdict.PLACED:
            return None
        try:
            decoded = cell.decoded()
        except Unusable as e:
            return e
        if isinstance(outcome, Unusable):
            self._decoder.distrust(outcome)
        self._decoder.blocks.scatter(ids, layers, heads, decoded[order.cut()], after=self._after)
        return None


def _unsigned(spec: CellSpec) -> torch.dtype:
    return UNSIGNED[8 * storage_dtype(spec).itemsize]


def _is_coded(cell: Coded) -> bool:
    return isinstance(cell.read, transform.Cell) or (isinstance(cell.read, tuple) and cell.read[1] is not None)


def _calibration_of(cell: Coded) -> str:
    return cell.read.calibration.digest if isinstance(cell.read, transform.Cell) else ""
