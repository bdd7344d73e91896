"""Looking at what is cached: `spaces`, `extents`, `chunks` as pandas tables; `catalog` and `check` without pandas.

Importing this package imports no pandas; calling the three functions does (extra `analysis`).
"""

from lmcache_s3.analysis.frames import chunks, extents, spaces

__all__ = ["chunks", "extents", "spaces"]
