"""What becomes of an extent whose bytes were found unusable: hidden at once, read again, removed if it is true.

One read may lie (a bad network, a lagging replica), and a removal is for everybody: so the whole extent is read once
more from the store in the background, past all tiers. Unusable again → removed from the index. Right after all → shown
again. The store does not answer → hidden in this process until it does, within reason.
Raises nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lmcache_s3.calibration_store import attached
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.errors import LMCacheS3Error, Unavailable, Unusable
from lmcache_s3.extent import shard_index
from lmcache_s3.index.service import Index
from lmcache_s3.loading import Codecs
from lmcache_s3.metrics import Metrics
from lmcache_s3.tiers.object import ObjectTier
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import HASH_BYTES, CellRef, ExtentName, ExtentRecord, Geometry

_log = logging.getLogger("lmcache_s3.damage")
_ATTEMPTS = 8
_FIRST_PAUSE_S = 1.0
_SETTLE_S = 5.0


class DamageControl:
    """One background thread. Thread-safe.

    geometry: of the space; with it cells are decoded, too, and an extent that proves right is shown again. Without it
    one that only looks right stays hidden in this process. pause: waits so many seconds, True when closing.
    """

    def __init__(
        self,
        index: Index,
        store: ObjectStore,
        space_id: str,
        geometry: Geometry | None = None,
        *,
        metrics: Metrics | None = None,
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        self._index = index
        self._store = store
        self._bucket = ObjectTier(store, space_id, shard_index)
        self._geometry = geometry
        self._codecs = Codecs()
        self.metrics = metrics or Metrics()
        self._stopping = threading.Event()
        self._pause = pause or self._stopping.wait
        self._lock = threading.Condition()
        self._examined: set[ExtentName] = set()
        self._removing: set[ExtentName] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lmcache-s3-damage")

    def report(self, name: ExtentName, why: str) -> None:
        """`name` gave unusable bytes. Never blocks; reports of an extent under examination are one."""
        self._index.hide(name)
        with self._lock:
            if name in self._examined or self._stopping.is_set():
                return
            self._examined.add(name)
        self.metrics.add("damage_reports")
        future = self._thread.submit(self._examine, name, why)
        future.add_done_callback(lambda _: self._examined_it(name))

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was reported was examined, and removed if need be; False if that took longer."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._examined, timeout_s)

    def settled_soon(self) -> bool:
        """`settle` with little patience, for who would rather commit after pending removals than before."""
        return self.settle(_SETTLE_S)

    def close(self) -> None:
        """Gives up what is not examined yet; it stays hidden here."""
        with self._lock:
            self._stopping.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _examined_it(self, name: ExtentName) -> None:
        with self._lock:
            if name not in self._removing:
                self._examined.discard(name)
                self._lock.notify_all()

    def _remove(self, name: ExtentName, why: str) -> None:
        """Under examination until the removal is committed, or failed: then a new report begins anew."""
        with self._lock:
            self._removing.add(name)
        self._index.remove([name], why=why).add_done_callback(lambda _: self._removed(name))

    def _removed(self, name: ExtentName) -> None:
        with self._lock:
            self._removing.discard(name)
            self._examined.discard(name)
            self._lock.notify_all()

    def _examine(self, name: ExtentName, why: str) -> None:
        record = next((one.record for one in self._index.extents() if one.record.name == name), None)
        if record is None:
            return  # somebody removed it already
        pause_s = _FIRST_PAUSE_S
        for _ in range(_ATTEMPTS):
            try:
                with attached(self._store):
                    sound = self._check(record)
            except Unusable as error:
                if error.kind in ("codec", "calibration"):
                    _log.warning("extent %s cannot be decoded here, and is not used: %s", name, error)
                    return
                self.metrics.add("damage_confirmed")
                self._remove(name, f"{why}; read again: {error}")
                return
            except Unavailable:
                if self._pause(pause_s):
                    return
                pause_s *= 2
            except LMCacheS3Error as error:
                _log.warning("extent %s stays hidden, it could not be read again: %s", name, error)
                return
            else:
                self.metrics.add("damage_refuted")
                if sound:
                    self._index.show(name)
                return
        self._index.show(name)

    def _check(self, record: ExtentRecord) -> bool:
        """Read everything. True if it was decoded as well; raises what is wrong with it."""
        codec = self._codecs.find(record.name.codec)
        geometry = self._geometry
        if geometry is not None and not geometry.divides(record.grid):
            raise Unusable(f"extent {record.name}: its grid does not divide this model", kind="shape")
        for cell in _cells(record):
            [data] = self._bucket.get([cell])
            if geometry is not None:
                spec = CellSpec.of(geometry, record.grid)
                codec.decode(
                    data, spec, position_of(record, cell, geometry), np.empty(spec.shape, geometry.storage_dtype)
                )
            if self._stopping.is_set():
                raise Unavailable("closing", kind="closed")
        return geometry is not None


def _cells(record: ExtentRecord) -> Iterable[CellRef]:
    for shard in range(record.grid.shards):
        yield from record.cells(shard)


def position_of(record: ExtentRecord, cell: CellRef, geometry: Geometry) -> CellPosition:
    """Where a cell of an extent belongs in prompt and model."""
    return CellPosition(
        record.hashes[HASH_BYTES * cell.position : HASH_BYTES * (cell.position + 1)],
        record.first_token + cell.position * geometry.chunk_tokens,
        geometry.cell_layers(record.grid, cell.shard).start,
        geometry.cell_heads(record.grid, cell.shard).start,
    )
