"""An open-addressing table from 16-byte hashes to row numbers: what the index's replica looks chunks up in.

`slots` (u32, a power of two of them) hold row + 1, 0 for empty. A row lies at the first free slot from its home on,
home being the upper bits of `first half of the hash · seed`. Rows are inserted in ascending order among equal hashes
and never taken out, so the oldest row of a hash comes first on the probe path. Callers keep the load below ¾, so every
probe ends. `seed` (odd, random) keeps crafted hashes from sharing a home.

A row is visible to a reader of version v if it is below the reader's `rows` and its owner's `removed_at` is above v.
Writers only append rows and lower `removed_at` from "never" to a newer version, so readers of older versions need no
lock.

`match` and `find` keep the GIL: they take microseconds, and getting it back could take longer. Threads: any number of
readers, one writer. Raises nothing. The readable form is a dict from hash to a list of rows; the tests compare.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from lmcache_s3.kernels.jit import kernel

NEVER = np.iinfo(np.uint64).max
"""`removed_at` of an owner that is live."""


_AHEAD = 32
"""Rows whose slots are fetched at once."""
_NOBODY = np.empty(0, np.int64)
MOST_OF_AN_OWNER = 2**16
"""Rows of an owner, at most."""


def shift_of(slots: np.ndarray) -> np.uint64:
    """How far a 64-bit product is shifted down to be a slot number."""
    return np.uint64(64 - (slots.size.bit_length() - 1))


@kernel
def insert(
    slots: np.ndarray,
    seed: np.uint64,
    shift: np.uint64,
    hashes: np.ndarray,
    owner: np.ndarray,
    starts: np.ndarray,
    rows: np.ndarray,
    keys: np.ndarray,
) -> np.int64:
    """Insert `rows` (i64) with hashes `keys` (u64 [n, 2], as in `hashes`, but side by side).

    hashes u64 [row, 2]; owner u32 [row]; starts i64 [owner]: an owner's first row. Returns 0; or −1 − the owner that
    holds one hash twice: the table is then unusable.
    """
    n, mask = rows.size, np.uint64(slots.size - 1)
    touched = np.uint32(0)
    for first in range(0, n, _AHEAD):
        end = min(n, first + _AHEAD)
        # Independent loads, so that their cache misses overlap; the loop below then finds its slots in the cache.
        for i in range(first, end):
            touched |= slots[(keys[i, 0] * seed) >> shift]
        for i in range(first, end):
            row, at = rows[i], (keys[i, 0] * seed) >> shift
            while slots[at] != 0:
                other = np.int64(slots[at]) - 1
                # An owner's rows lie together: only they can lie between its first row and this one. Few are so near.
                near = row - MOST_OF_AN_OWNER < other < row and starts[owner[row]] <= other
                if near and hashes[other, 0] == keys[i, 0] and hashes[other, 1] == keys[i, 1]:
                    return np.int64(-1) - np.int64(owner[row])
                at = (at + np.uint64(1)) & mask
            slots[at] = np.uint32(row + 1)
    return np.int64(0) if touched >= 0 else np.int64(1)


@kernel
def _oldest(
    slots: np.ndarray,
    seed: np.uint64,
    shift: np.uint64,
    hashes: np.ndarray,
    owner: np.ndarray,
    removed_at: np.ndarray,
    rows: int,
    version: np.uint64,
    hidden: np.ndarray,
    first: np.uint64,
    second: np.uint64,
) -> np.int64:
    """The oldest visible row of a hash (its halves) whose owner is not in `hidden`, or −1."""
    mask = np.uint64(slots.size - 1)
    at = (first * seed) >> shift
    while slots[at] != 0:
        row = np.int64(slots[at]) - 1
        if row < rows and hashes[row, 0] == first and hashes[row, 1] == second:
            who = np.int64(owner[row])
            if removed_at[who] > version:
                seen = True
                for k in range(hidden.size):
                    if hidden[k] == who:
                        seen = False
                if seen:
                    return row
        at = (at + np.uint64(1)) & mask
    return np.int64(-1)


@partial(kernel, nogil=False)
def match(
    slots: np.ndarray,
    seed: np.uint64,
    shift: np.uint64,
    hashes: np.ndarray,
    owner: np.ndarray,
    removed_at: np.ndarray,
    rows: int,
    version: np.uint64,
    hidden: np.ndarray,
    keys: np.ndarray,
    out: np.ndarray,
) -> np.int64:
    """Fill out[i] with the oldest visible row of keys[i] (u64 [n, 2]) up to the first that has none; how many have.

    hidden: i64, owners that are passed over.
    """
    for i in range(keys.shape[0]):
        row = _oldest(slots, seed, shift, hashes, owner, removed_at, rows, version, hidden, keys[i, 0], keys[i, 1])
        if row < 0:
            return np.int64(i)
        out[i] = row
    return np.int64(keys.shape[0])


@partial(kernel, nogil=False)
def find(
    slots: np.ndarray,
    seed: np.uint64,
    shift: np.uint64,
    hashes: np.ndarray,
    owner: np.ndarray,
    removed_at: np.ndarray,
    rows: int,
    version: np.uint64,
    key: np.ndarray,
    out: np.ndarray,
) -> int:
    """All visible rows of one hash (u64 [2]), oldest first, as many as `out` takes; how many there are."""
    mask = np.uint64(slots.size - 1)
    at = (key[0] * seed) >> shift
    n = 0
    while slots[at] != 0:
        row = np.int64(slots[at]) - 1
        if row < rows and hashes[row, 0] == key[0] and hashes[row, 1] == key[1] and removed_at[owner[row]] > version:
            if n < out.size:
                out[n] = row
            n += 1
        at = (at + np.uint64(1)) & mask
    return n


@kernel
def resolve(
    slots: np.ndarray,
    seed: np.uint64,
    shift: np.uint64,
    hashes: np.ndarray,
    owner: np.ndarray,
    removed_at: np.ndarray,
    rows: int,
    version: np.uint64,
    keys: np.ndarray,
    out: np.ndarray,
) -> None:
    """out[i] = the oldest visible row of keys[i] (u64 [n, 2]), or −1. For bulk work: releases the GIL."""
    for i in range(keys.shape[0]):
        out[i] = _oldest(slots, seed, shift, hashes, owner, removed_at, rows, version, _NOBODY, keys[i, 0], keys[i, 1])


@kernel
def to_entries(values: np.ndarray, firsts: np.ndarray, counts: np.ndarray, widths: np.ndarray, out: np.ndarray) -> None:
    """Reorder cells from an extent's order [shard][chunk] to that of entries, [chunk][shard].

    Extent i has counts[i] chunks and widths[i] shards; its cells lie from firsts[i] on in `values`, and end to end in
    `out`.
    """
    at = 0
    for i in range(firsts.size):
        n, w, base = counts[i], widths[i], firsts[i]
        for j in range(n):
            for s in range(w):
                out[at] = values[base + s * n + j]
                at += 1


@kernel
def place_entries(
    hashes: np.ndarray,
    owner: np.ndarray,
    position: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    sums: np.ndarray,
    shard: np.uint64,
    shard_shift: np.uint64,
    starts: np.ndarray,
    counts: np.ndarray,
    widths: np.ndarray,
    cells: np.ndarray,
    all_hashes: np.ndarray,
    all_lengths: np.ndarray,
    all_sums: np.ndarray,
    filled: np.ndarray,
    begin: int,
    until: int,
) -> np.int64:
    """Put entries from `begin` on where their extents keep them, up to the first whose row is `until` or more; its
    number. Cells turn to [shard][chunk].

    Entry i is chunk position[i] of owner[i] and has `lengths` and `sums` offsets[i] … offsets[i + 1] − 1, one a shard.
    starts, counts, widths, cells: by owner, its first row, rows, shards and first cell. Returns −1 − i for the first
    entry i that has no such place, lies not behind the one before, has not widths[owner[i]] cells, or whose hash's
    first two bytes shifted down by shard_shift are not `shard`; none after it is placed.
    """
    before = np.int64(-1)
    if begin > 0:
        before = starts[owner[begin - 1]] + np.int64(position[begin - 1])
    for i in range(begin, owner.size):
        o, p = np.int64(owner[i]), np.int64(position[i])
        if o >= counts.size or p >= counts[o]:
            return np.int64(-1 - i)
        row, first, width, first_half = starts[o] + p, np.int64(offsets[i]), widths[o], hashes[i, 0]
        if row >= until:
            return np.int64(i)
        top = ((first_half & np.uint64(255)) << np.uint64(8)) | ((first_half >> np.uint64(8)) & np.uint64(255))
        if row <= before or np.int64(offsets[i + 1]) - first != width or (top >> shard_shift) != shard:
            return np.int64(-1 - i)
        before = row
        all_hashes[row, 0], all_hashes[row, 1] = first_half, hashes[i, 1]
        filled[row] = True
        base = cells[o] + p
        for s in range(width):
            all_lengths[base + s * counts[o]] = lengths[first + s]
            all_sums[base + s * counts[o]] = sums[first + s]
    return np.int64(owner.size)


@kernel
def sums_of(values: np.ndarray, firsts: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> None:
    """out[i] = the sum of values[firsts[i] : firsts[i] + lengths[i]]."""
    for i in range(firsts.size):
        total = np.int64(0)
        for j in range(lengths[i]):
            total += np.int64(values[firsts[i] + j])
        out[i] = total
