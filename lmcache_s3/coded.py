"""Cells that a load hands over undecoded, to a sink that decodes them itself: on the device they go to.

Coded bytes cross the bus, decoded ones never lie in host memory. Everything about a cell that can be told without
decoding it is checked before it is handed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lmcache_s3.codecs.arrays import storage_dtype
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.errors import Unusable
from lmcache_s3.types import Buffer


@dataclass(slots=True, eq=False)
class Coded:
    """A stored cell whose checksum is right. data: to be looked at only during the call that got this.

    read: what its codec's own reader made of it; all checked but whether its streams are whole. unusable: what came out
    when somebody decoded it.
    """

    codec: KVCodec
    data: Buffer
    spec: CellSpec
    position: CellPosition
    read: Any
    unusable: Unusable | None = None

    def decoded(self) -> np.ndarray:
        """The cell, decoded on the host into new memory. Raises as `KVCodec.decode`."""
        out: np.ndarray = np.empty(self.spec.shape, storage_dtype(self.spec))
        self.codec.decode(self.data, self.spec, self.position, out)
        return out


class CodedSink(Protocol):
    """Called as a `Sink` is, and held to the same: from several threads at once, and never once the load is done."""

    def read(self, codec: KVCodec, data: Buffer, spec: CellSpec, position: CellPosition) -> Coded | None:
        """A cell to be handed over coded; None: it is to be decoded. May block. Raises as `KVCodec.decode`."""

    def put(self, chunk: int, layers: range, heads: range, cell: Coded) -> Unusable | None:
        """Decode it to where it belongs; what is wrong with it if that shows now. Arguments as a `Sink`'s, but that the
        cell is whole."""
