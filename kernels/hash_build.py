"""Filling an empty table of `hash_index` with many rows at once, in several threads and within their caches.

Inserting millions of rows one after another is a cache miss each. So rows are first sorted by the region of the table
that their home is in (`count`, `scatter`: one pass each over the hashes), then each region is filled by itself
(`fill`): 2¹⁶ slots fit into a core's cache, and no two threads touch one region. A row that finds no free slot up to
its region's end is left over, to be inserted by `hash_index.insert` afterwards.

The result is a table as `hash_index` describes it: rows of one hash share a home, so they stay in the order they came,
and where one of them is left over so are those after it.
Threads: calls for different parts or regions may run at once. Raises nothing.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels.hash_index import MOST_OF_AN_OWNER
from lmcache_s3.kernels.jit import kernel

REGION_BITS = 16


@kernel
def count(
    hashes: np.ndarray,
    seed: np.uint64,
    shift: np.uint64,
    region_shift: np.uint64,
    begin: int,
    end: int,
    out: np.ndarray,
) -> None:
    """out[r] += how many of the rows begin … end − 1 have their home in region r. hashes: u64 [row, 2]."""
    for row in range(begin, end):
        out[((hashes[row, 0] * seed) >> shift) >> region_shift] += 1


@kernel
def scatter(
    hashes: np.ndarray,
    seed: np.uint64,
    shift: np.uint64,
    region_shift: np.uint64,
    begin: int,
    end: int,
    at: np.ndarray,
    rows: np.ndarray,
    homes: np.ndarray,
) -> None:
    """Write rows begin … end − 1 and their homes (u32) to where at[r], counted up, says for their region r."""
    for row in range(begin, end):
        home = (hashes[row, 0] * seed) >> shift
        r = home >> region_shift
        i = at[r]
        at[r] = i + 1
        rows[i] = row
        homes[i] = home


@kernel
def fill(
    slots: np.ndarray,
    hashes: np.ndarray,
    owner: np.ndarray,
    starts: np.ndarray,
    rows: np.ndarray,
    homes: np.ndarray,
    end: int,
    left: np.ndarray,
) -> np.int64:
    """Insert `rows`, all with homes in the region of slots that ends before `end`; how many were left over, in `left`.

    As in `hash_index.insert`, an owner that holds one hash twice makes the table unusable: −1 − its number.
    """
    n = 0
    for i in range(rows.size):
        row, at = np.int64(rows[i]), np.int64(homes[i])
        while at < end and slots[at] != 0:
            other = np.int64(slots[at]) - 1
            # An owner's rows lie together: only they can lie between its first row and this one. Few are so near.
            near = row - MOST_OF_AN_OWNER < other < row and starts[owner[row]] <= other
            if near and hashes[other, 0] == hashes[row, 0] and hashes[other, 1] == hashes[row, 1]:
                return np.int64(-1) - np.int64(owner[row])
            at += 1
        if at < end:
            slots[at] = np.uint32(row + 1)
        else:
            left[n] = rows[i]
            n += 1
    return np.int64(n)
