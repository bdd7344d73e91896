"""The two checksums of a stored cell: crc32c inside it (Zarr readers), XXH3-64 beside it (the index).

Never a CRC of a CRC-closed cell: crc32c over payload‖crc32c is the same constant for every cell, so swapped cells would
pass; hence XXH3-64 in the index. Both release the GIL for large buffers. Raises nothing.
"""

from __future__ import annotations

import google_crc32c
import numpy as np
import xxhash

from lmcache_s3.types import Buffer


def crc32c(data: Buffer, start: int = 0) -> int:
    """crc32c of `data`, going on from `start` (the crc of what came before). No copy of the data."""
    if len(data) == 0:
        return start
    # The C function takes bytes and NumPy arrays, but no memoryview.
    return int(google_crc32c.extend(start, data if isinstance(data, bytes) else np.frombuffer(data, np.uint8)))


def xxh3(cell: Buffer) -> int:
    """XXH3-64 of a whole stored cell, as the index keeps it."""
    return xxhash.xxh3_64_intdigest(cell)
