"""`BufferPool`: memory comes back when its last view is gone, never before, and no more is kept than was asked."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmcache_s3.tiers.buffers import BufferPool

MIB = 1 << 20


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def test_memory_is_used_again_once_nobody_looks_at_it() -> None:
    pool = BufferPool(8 * MIB)
    first = pool.take(3 * MIB)
    place = address(first)
    assert (first.nbytes, first.readonly, pool.free_bytes) == (3 * MIB, False, 0)
    del first
    assert pool.free_bytes == 3 * MIB
    again = pool.take(3 * MIB - 5)
    assert (address(again), again.nbytes, pool.free_bytes) == (place, 3 * MIB - 5, 0)


def test_any_view_keeps_it() -> None:
    pool = BufferPool(8 * MIB)
    buffer = pool.take(MIB)
    buffer[:] = b"\7" * MIB
    cell = buffer[10:100].toreadonly()
    array = np.frombuffer(cell, np.uint8).reshape(9, 10)[3:, ::2]
    del buffer, cell
    other = pool.take(MIB)
    other[:] = b"\1" * MIB
    assert (array == 7).all()
    assert pool.free_bytes == 0
    del array
    assert pool.free_bytes == MIB


def test_no_more_is_kept_than_was_asked_and_nothing_after_the_end() -> None:
    pool = BufferPool(2 * MIB)
    buffers = [pool.take(MIB) for _ in range(4)]
    buffers.clear()
    assert pool.free_bytes == 2 * MIB
    late = pool.take(MIB)
    pool.close()
    del late
    assert pool.free_bytes == 0


def test_a_small_need_does_not_take_a_large_buffer() -> None:
    pool = BufferPool(64 * MIB)
    del (large := [pool.take(32 * MIB)])[0]
    assert not large
    small = pool.take(100)
    assert pool.free_bytes == 32 * MIB
    assert small.nbytes == 100


def test_the_last_view_may_die_anywhere() -> None:
    """Also in a thread that holds the pool's lock (the collector may run there), or while another holds it."""
    pool = BufferPool(8 * MIB)
    buffers = [pool.take(MIB), pool.take(MIB)]
    with pool._lock:
        buffers.pop()
        thread = threading.Thread(target=buffers.pop)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    kept = pool.take(MIB)
    assert pool.free_bytes == MIB
    assert kept.nbytes == MIB


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4 * MIB)), max_size=40))
def test_what_is_held_never_changes(steps: list[tuple[int, int]]) -> None:
    pool = BufferPool(6 * MIB)
    held: dict[int, tuple[memoryview, int]] = {}
    for mark, (slot, n_bytes) in enumerate(steps):
        buffer = pool.take(n_bytes)
        np.frombuffer(buffer, np.uint8)[:] = mark
        held[slot] = (buffer, mark)
        for view, written in held.values():
            array = np.frombuffer(view, np.uint8)
            assert array[0] == array[-1] == array[len(array) // 2] == written
        assert pool.free_bytes <= 6 * MIB
