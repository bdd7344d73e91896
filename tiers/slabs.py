"""Memory in slots of a few sizes, within a budget: what a host tier keeps cells in.

A slot's size is one of eight to each doubling, in whole pages, so at most an eighth (or the rest of a page) of it is
wasted. Slots of one size lie in *slabs*, each an anonymous mapping of its own of about a 256th of the budget. When a
size runs out, a slab is mapped, as long as the budget lasts; then slabs of other sizes make way: empty ones first, else
one is emptied by moving what it holds into free slots of its size elsewhere. So memory never lies about in pieces of
the wrong size: what is free but of no use to a cell is less than a slab for each size in use, plus what is pinned.

Invariant: bytes mapped ≤ budget. Memory that was used once is used again without being faulted in anew. Not
thread-safe: its owner holds a lock. No room is an answer; raises `OSError` where the system has less than the budget.
"""

from __future__ import annotations

import heapq
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

PAGE_BYTES = mmap.PAGESIZE
_STEPS = 8
_SLABS = 256
_LARGEST_SLAB_BYTES = 32 << 20
_HUGE_BYTES = 2 << 20

Undo = Callable[[], None]
Pin = Callable[[np.ndarray], Undo | None]
"""Makes a slab's memory fit for a device's DMA; what it returns, if anything, undoes that before it is unmapped."""


def slot_bytes(n_bytes: int) -> int:
    """Size of the slot that `n_bytes` get."""
    pages = max(1, -(-n_bytes // PAGE_BYTES))
    step = 1 << max(0, (pages - 1).bit_length() - _STEPS.bit_length())
    return -(-pages // step) * step * PAGE_BYTES


@dataclass(slots=True, eq=False)
class Slot:
    """Room for one cell. pins: readers and writers that need it to stay where it is; the owner counts them."""

    slab: Slab
    index: int
    pins: int = 0
    freed: bool = False
    """Given up by its owner, while pinned."""

    def memory(self, n_bytes: int) -> np.ndarray:
        """Its first `n_bytes`, uint8, writeable. Good until it is freed, or moved (never while pinned)."""
        start = self.index * self.slab.slot_bytes
        return self.slab.memory[start : start + n_bytes]


@dataclass(slots=True, eq=False)
class Slab:
    """number: slabs of low numbers are filled first, so that others run empty."""

    number: int
    slot_bytes: int
    memory: np.ndarray
    unpin: Undo | None
    free: list[int]
    live: dict[int, Slot] = field(default_factory=dict)
    queued: bool = False
    gone: bool = False

    def __lt__(self, other: Slab) -> bool:
        return self.number < other.number

    @property
    def movable(self) -> bool:
        return all(not slot.pins for slot in self.live.values())


@dataclass(slots=True, eq=False)
class _Size:
    """All slabs of one slot size. with_room: a heap of slabs that may have a free slot."""

    slots_a_slab: int
    slabs: set[Slab] = field(default_factory=set)
    with_room: list[Slab] = field(default_factory=list)
    free: int = 0


class Slabs:
    """budget_bytes: most memory mapped at a time. pin: see `Pin`; None: ordinary memory."""

    def __init__(self, budget_bytes: int, pin: Pin | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.mapped_bytes = 0
        self._pin = pin
        target = max(PAGE_BYTES, min(budget_bytes // _SLABS, _LARGEST_SLAB_BYTES))
        self._target_bytes = 1 << (target.bit_length() - 1)
        self._sizes: dict[int, _Size] = {}
        self._numbers = 0
        self._closed = False

    def take(self, n_bytes: int) -> Slot | None:
        """A slot of at least `n_bytes`; None if all that could be freed for it is held."""
        size_bytes = slot_bytes(n_bytes)
        size = self._sizes.get(size_bytes)
        if size is None:
            size = self._sizes[size_bytes] = _Size(max(1, self._target_bytes // size_bytes))
        slab = self._with_room(size)
        if slab is None:
            slab_bytes = size_bytes * size.slots_a_slab
            while self.mapped_bytes + slab_bytes > self.budget_bytes:
                if not self._reclaim(size):
                    return None
            slab = self._map(size_bytes, size)
        return self._occupy(slab, size)

    def give(self, slot: Slot) -> None:
        """A slot is free again; nobody may look at it any more."""
        slab = slot.slab
        size = self._sizes[slab.slot_bytes]
        del slab.live[slot.index]
        slab.free.append(slot.index)
        size.free += 1
        self._queue(size, slab)
        if self._closed and not slab.live:
            self._unmap(size, slab)

    def close(self) -> None:
        """Unmap what is empty, now and whenever a slot comes back."""
        self._closed = True
        for size in self._sizes.values():
            for slab in [slab for slab in size.slabs if not slab.live]:
                self._unmap(size, slab)

    def _with_room(self, size: _Size) -> Slab | None:
        while size.with_room:
            slab = size.with_room[0]
            if slab.free and not slab.gone:
                return slab
            heapq.heappop(size.with_room)
            slab.queued = False
        return None

    def _queue(self, size: _Size, slab: Slab) -> None:
        if not slab.queued:
            slab.queued = True
            heapq.heappush(size.with_room, slab)

    def _occupy(self, slab: Slab, size: _Size, slot: Slot | None = None) -> Slot:
        index = slab.free.pop()
        size.free -= 1
        if slot is None:
            slot = Slot(slab, index)
        slot.slab, slot.index = slab, index
        slab.live[index] = slot
        return slot

    def _map(self, size_bytes: int, size: _Size) -> Slab:
        n_bytes = size_bytes * size.slots_a_slab
        mapping = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if n_bytes >= _HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(mapping, np.uint8)  # the mapping lives as long as any view of it
        self._numbers += 1
        slab = Slab(
            self._numbers,
            size_bytes,
            memory,
            None if self._pin is None else self._pin(memory),
            list(range(size.slots_a_slab))[::-1],
        )
        size.slabs.add(slab)
        size.free += size.slots_a_slab
        self.mapped_bytes += n_bytes
        self._queue(size, slab)
        return slab

    def _unmap(self, size: _Size, slab: Slab) -> None:
        slab.gone = True
        size.slabs.discard(slab)
        size.free -= len(slab.free)
        self.mapped_bytes -= slab.memory.nbytes
        if slab.unpin is not None:
            slab.unpin()
        slab.memory = _NOTHING

    def _reclaim(self, but: _Size) -> bool:
        """Unmap a slab of another size: an empty one, or one whose cells fit into free slots of other slabs."""
        for size in self._sizes.values():
            if size is but or size.free < size.slots_a_slab:
                continue
            emptiest_first = sorted(size.slabs, key=lambda one: len(one.live))
            slab = next((one for one in emptiest_first if one.movable), None)
            if slab is None:
                continue
            self._empty(size, slab)
            self._unmap(size, slab)
            return True
        return False

    def _empty(self, size: _Size, slab: Slab) -> None:
        """Move what it holds; the size's other slabs have room for it."""
        slab.gone = True  # not a target
        for slot in list(slab.live.values()):
            target = self._with_room(size)
            assert target is not None, "other slabs have as many free slots as this one has cells"
            source = slot.memory(slab.slot_bytes)
            del slab.live[slot.index]
            slab.free.append(slot.index)
            size.free += 1
            self._occupy(target, size, slot)
            np.copyto(slot.memory(slab.slot_bytes), source)


_NOTHING = np.empty(0, np.uint8)
