"""`Slabs`: what slots hold stays as it is, memory stays within the budget, and what is free is of use to any size."""

from __future__ import annotations

import gc
import random
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmcache_s3.testing.cells import make_cells, refs
from lmcache_s3.tiers.host import HostTier
from lmcache_s3.tiers.pinning import pin_for_cuda
from lmcache_s3.tiers.slabs import PAGE_BYTES, Slabs, Slot, slot_bytes

MIB = 1 << 20


def test_a_slot_wastes_an_eighth_at_most() -> None:
    sizes = [slot_bytes(n * PAGE_BYTES) for n in range(1, 40_000)]
    assert all(n * PAGE_BYTES <= size < n * PAGE_BYTES * 9 / 8 for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 16 + 8 * 11 + 2
    assert [slot_bytes(n) for n in (1, PAGE_BYTES, PAGE_BYTES + 1)] == [PAGE_BYTES, PAGE_BYTES, 2 * PAGE_BYTES]


class SlabsMachine(RuleBasedStateMachine):
    """Slots of random sizes are taken, pinned and given back in any order, within a budget."""

    @initialize(pages=st.integers(1, 3000), seed=st.integers(0, 2**32))
    def start(self, pages: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.slabs = Slabs(pages * PAGE_BYTES)
        self.held: list[tuple[Slot, int, int]] = []
        self.mark = 0

    @property
    def held_bytes(self) -> int:
        return sum(slot_bytes(n_bytes) for _, n_bytes, _ in self.held)

    def waste_bytes(self) -> int:
        """The bound: less than a slab for each size in use, and all of those that somebody pinned."""
        pinned = {slot.slab for slot, _, _ in self.held if slot.pins}
        slab_bytes = {slot.slab.slot_bytes: slot.slab.memory.nbytes for slot, _, _ in self.held}
        return sum(slab_bytes.values()) + sum(slab.memory.nbytes for slab in pinned)

    @rule(n=st.integers(1, 60), largest=st.sampled_from([3, 40, 300]))
    def take(self, n: int, largest: int) -> None:
        for _ in range(n):
            n_bytes = self.rng.randrange(1, largest * PAGE_BYTES)
            slot = self.slabs.take(n_bytes)
            if slot is None:
                slab_bytes = max(slot_bytes(n_bytes), self.slabs._target_bytes)
                assert self.held_bytes + self.waste_bytes() + slab_bytes > self.slabs.budget_bytes
                return
            self.mark += 1
            slot.memory(n_bytes)[:] = self.mark % 251
            self.held.append((slot, n_bytes, self.mark))

    @precondition(lambda self: bool(getattr(self, "held", None)))
    @rule(share=st.floats(0, 1))
    def give(self, share: float) -> None:
        for _ in range(int(len(self.held) * share)):
            i = self.rng.randrange(len(self.held))
            if not self.held[i][0].pins:
                self.slabs.give(self.held.pop(i)[0])

    @precondition(lambda self: bool(getattr(self, "held", None)))
    @rule(n=st.integers(1, 5), pins=st.integers(0, 1))
    def pin(self, n: int, pins: int) -> None:
        for _ in range(n):
            self.rng.choice(self.held)[0].pins = pins

    @invariant()
    def nothing_changes_and_nothing_is_over(self) -> None:
        if not hasattr(self, "slabs"):
            return
        for slot, n_bytes, mark in self.held:
            memory = slot.memory(n_bytes)
            assert memory.nbytes == n_bytes
            assert memory[0] == memory[-1] == memory[n_bytes // 2] == mark % 251
        assert self.held_bytes <= self.slabs.mapped_bytes <= self.slabs.budget_bytes
        places = {(slot.slab.number, slot.index) for slot, _, _ in self.held}
        assert len(places) == len(self.held)

    def teardown(self) -> None:
        if hasattr(self, "slabs"):
            self.slabs.close()
            for slot, _, _ in self.held:
                self.slabs.give(slot)
            assert self.slabs.mapped_bytes == 0


TestSlabs = SlabsMachine.TestCase
TestSlabs.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_pinned_slots_stay_where_they_are_and_others_make_way() -> None:
    slabs = Slabs(256 * 16 * PAGE_BYTES)  # slabs of 16 pages
    small = [slabs.take(PAGE_BYTES) for _ in range(256 * 16)]
    assert slabs.take(1) is None
    kept = small[::16]
    for i, slot in enumerate(small):
        assert slot is not None
        if i % 16:
            slabs.give(slot)
        else:
            slot.memory(8)[:] = i // 16 % 256
    assert slabs.take(8 * PAGE_BYTES) is not None, "the few left are moved together"
    for slot in kept:
        assert slot is not None
        slot.pins = 1
    taken = 0
    while slabs.take(8 * PAGE_BYTES) is not None:
        taken += 1
    assert taken == 1, "the second half of the slab that was freed"
    for slot in kept:
        assert slot is not None
        slot.pins = 0
    while slabs.take(8 * PAGE_BYTES) is not None:
        taken += 1
    assert taken == 2 * (256 - 16) - 1
    assert [int(slot.memory(8)[3]) for slot in kept if slot is not None] == list(range(256))


def test_memory_is_pinned_and_unpinned_with_its_slab() -> None:
    pinned: set[int] = set()

    def pin(memory: np.ndarray) -> object:
        address = memory.ctypes.data
        pinned.add(address)
        return lambda: pinned.remove(address)

    slabs = Slabs(MIB, pin)  # type: ignore[arg-type]
    slots = [slabs.take(100_000) for _ in range(4)]
    assert len(pinned) == 4
    slabs.close()
    assert len(pinned) == 4
    for slot in slots:
        assert slot is not None
        slabs.give(slot)
    assert not pinned


@pytest.mark.parametrize("refuses", [False, True])
def test_cuda_locks_pages_where_a_process_uses_it(monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
    locked: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:
            locked[address] = n_bytes
            return 2 if refuses else 0

        def cudaHostUnregister(self, address: int) -> int:
            del locked[address]
            return 0

    begun = False
    cuda = types.SimpleNamespace(is_initialized=lambda: begun, cudart=Runtime)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    memory = np.empty(1000, np.uint8)
    assert pin_for_cuda(memory) is None
    assert not locked
    begun = True
    undo = pin_for_cuda(memory)
    assert locked == {memory.ctypes.data: 1000}
    assert (undo is None) == refuses
    if undo is not None:
        undo()
        assert not locked


# --- the host tier on top


def test_an_evicted_cells_memory_is_not_used_again_while_somebody_looks(tmp_path: Path) -> None:
    tier, rng = HostTier(MIB), random.Random(1)
    cells = make_cells(rng, [100_000])
    tier.put(cells)
    array = np.frombuffer(tier.get(refs(cells))[0], np.uint8)[10:20]
    tier.evict(MIB)
    for _ in range(40):
        tier.put(make_cells(rng, [100_000]))
        assert bytes(array) == cells[0][1][10:20]
        assert tier.mapped_bytes <= MIB
    assert tier.stats().used_bytes <= MIB
    before = tier.stats().used_bytes
    del array
    gc.collect()
    assert before - tier.stats().used_bytes == slot_bytes(100_000)
    tier.close()


def test_what_is_looked_at_outlives_the_tier() -> None:
    tier = HostTier(MIB)
    cells = make_cells(random.Random(1), [100_000, 50_000])
    tier.put(cells)
    view = tier.get(refs(cells)[:1])[0]
    slabs = tier._slabs
    gone = weakref.ref(tier)
    tier.close()
    assert slabs.mapped_bytes == slot_bytes(100_000)
    assert bytes(view) == cells[0][1]
    del view
    assert slabs.mapped_bytes == 0
    del tier
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("seed", range(3))
def test_a_drift_of_sizes_does_not_fragment(seed: int) -> None:
    """Cells of one size, then of another, and mixed: at all times most of the budget holds cells."""
    tier, rng = HostTier(16 * MIB), random.Random(seed)
    largest = 20_000
    for step in range(900):
        if step % 150 == 0:
            largest = rng.choice([20_000, 60_000, 200_000])
        tier.put(make_cells(rng, [rng.randrange(largest // 2, largest) for _ in range(4)]))
        assert tier.mapped_bytes <= 16 * MIB
        if step > 450:
            assert tier.stats().used_bytes > 0.8 * 16 * MIB
    tier.close()
