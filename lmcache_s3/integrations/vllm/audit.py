"""Proof that what was loaded is what was stored: with LMCACHE_S3_AUDIT_FILE set, a line for each raw chunk.

`{"op": "store"|"load", "hash": prefix hash, "shard": "layers×heads", "xxh3": of the raw bits}`: at a store the bits
gathered from the engine, at a load the bits read back from the engine's blocks after they were written there. The
benchmarks and tests compare the two. Costs a gather for each load: off unless asked for.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from lmcache_s3.integrations.vllm.blocks import EngineBlocks
from lmcache_s3.integrations.vllm.metadata import GatherOrder, LoadOrder
from lmcache_s3.types import Geometry

AUDIT_FILE = "LMCACHE_S3_AUDIT_FILE"


class Audit:
    """Appends lines to one file; used by the engine's worker thread alone."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("a", buffering=1)

    @classmethod
    def from_environment(cls) -> Audit | None:
        path = os.environ.get(AUDIT_FILE)
        return cls(Path(path)) if path else None

    def stored(self, order: GatherOrder, chunk: np.ndarray, blocks: EngineBlocks) -> None:
        self._line("store", order.prefix_hash, blocks, chunk)

    def loaded(self, order: LoadOrder, blocks: EngineBlocks, geometry: Geometry) -> None:
        for i, chunk in enumerate(order.chunks):
            begin = order.first_chunk_token + i * geometry.chunk_tokens - order.start_token
            if begin >= 0:  # a chunk whose head the engine had itself is not wholly ours
                ids = blocks.ids(order.block_ids, begin, begin + geometry.chunk_tokens)
                self._line("load", chunk.prefix_hash, blocks, blocks.gather(ids))

    def _line(self, op: str, prefix_hash: bytes, blocks: EngineBlocks, chunk: np.ndarray) -> None:
        shard = f"{blocks.layers.start}-{blocks.layers.stop}×{blocks.heads.start}-{blocks.heads.stop}"
        digest = xxhash.xxh3_64_hexdigest(chunk.tobytes())
        self._file.write(json.dumps({"op": op, "hash": prefix_hash.hex(), "shard": shard, "xxh3": digest}) + "\n")

    def close(self) -> None:
        self._file.close()
