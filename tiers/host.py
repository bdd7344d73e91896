"""The host tier: stored cells in this process's memory, page-locked where there is CUDA.

Cells are copied in, so a caller may reuse its buffers at once; `get` hands out the kept bytes themselves, uncopied and
read-only. As long as anybody refers to them, their slot is not used for anything else: an evicted cell lives on while
somebody reads it, and counts against the budget until then. Verified on the way in.
Raises what the `Tier` port says.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Sequence

import numpy as np

from lmcache_s3.errors import Unavailable, Unusable
from lmcache_s3.tiers.budgeted import BudgetedTier
from lmcache_s3.tiers.eviction.base import EvictionPolicy
from lmcache_s3.tiers.pinning import pin_for_cuda
from lmcache_s3.tiers.slabs import Slabs, Slot, slot_bytes
from lmcache_s3.types import Buffer, CellRef


class HostTier(BudgetedTier[Slot]):
    """Cells in host memory, which takes at most `budget_bytes` of it, all in."""

    def __init__(self, budget_bytes: int, *, eviction: EvictionPolicy | None = None, chunk_tokens: int = 256) -> None:
        super().__init__("host", budget_bytes, eviction=eviction, chunk_tokens=chunk_tokens)
        self._slabs = Slabs(budget_bytes, pin_for_cuda)
        self._returned: queue.SimpleQueue[Slot] = queue.SimpleQueue()

    @property
    def mapped_bytes(self) -> int:
        """Memory taken from the system."""
        return self._slabs.mapped_bytes

    def _room_of(self, length: int) -> int:
        return slot_bytes(length)

    def _allot(self, cell: CellRef, n_bytes: int) -> Slot | None:
        try:
            slot = self._slabs.take(n_bytes)
        except OSError as e:
            raise Unavailable(f"no memory left: {e.strerror}", kind="full", key="host_bytes") from e
        if slot is not None:
            slot.pins = 1  # until it is written
        return slot

    def _write(self, cells: Sequence[tuple[CellRef, Slot, Buffer]]) -> None:
        for cell, slot, data in cells:
            np.copyto(slot.memory(cell.length), np.frombuffer(data, np.uint8))
        for _, slot, _ in cells:
            self._returned.put(slot)

    def _unwritten(self, held: Slot) -> None:
        held.pins -= 1

    def _lend(self, held: Slot) -> None:
        held.pins += 1

    def _is_lent(self, held: Slot) -> bool:
        return held.pins > 0

    def _read(self, cells: Sequence[tuple[CellRef, Slot]]) -> list[Buffer | Unusable]:
        out: list[Buffer | Unusable] = []
        for cell, slot in cells:
            lease = slot.memory(cell.length)  # every view leads to this very object, which therefore dies last
            lease.flags.writeable = False
            weakref.finalize(lease, self._give_back, slot).atexit = False
            out.append(lease.data)
        return out

    def _give_back(self, slot: Slot) -> None:
        """Runs wherever the last view dies, be it in this thread with our lock held: so it never waits for that."""
        self._returned.put(slot)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        while True:
            try:
                slot = self._returned.get_nowait()
            except queue.Empty:
                return
            slot.pins -= 1
            if slot.freed and not slot.pins:
                self._used_bytes -= slot.slab.slot_bytes
                self._slabs.give(slot)

    def _drop(self, held: Slot, n_bytes: int) -> int:
        if held.pins:
            held.freed = True
            return 0
        self._slabs.give(held)
        return n_bytes

    def close(self) -> None:
        """All memory is given back, that of cells still looked at when the last view of them dies."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for place in list(self._entries):
                    self._remove(place)
                self._slabs.close()
