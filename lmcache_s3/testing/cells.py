"""Stored cells made of random bytes, for tests of what keeps cells."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lmcache_s3.codecs.checksum import xxh3
from lmcache_s3.types import Buffer, CellRef, ExtentName, Grid

Cells = list[tuple[CellRef, bytes]]
_WHOLE = Grid()


def make_cells(rng: random.Random, lengths: Sequence[int], *, shard: int = 0, grid: Grid = _WHOLE) -> Cells:
    """A whole shard of random cells of those lengths, of an extent with a name of its own."""
    n = len(lengths)
    name = ExtentName(rng.randbytes(16), n, "fast", rng.randrange(100), rng.randbytes(16).hex())
    out: Cells = []
    offset, parent = 0, bytes(16)
    for i, length in enumerate(lengths):
        data, own = rng.randbytes(length), name.last_hash if i == n - 1 else rng.randbytes(16)
        out.append((CellRef(name, grid, shard, i, offset, length, xxh3(data), own, parent, 0), data))
        offset, parent = offset + length, own
    return out


def refs(cells: Cells) -> list[CellRef]:
    return [cell for cell, _ in cells]


def plain(buffers: Sequence[Buffer]) -> list[bytes]:
    return [bytes(one) for one in buffers]
