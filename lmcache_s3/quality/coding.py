"""A prompt's KV through a codec, cell by cell, as `Cache.store` and a load would take it.

Pure but for what the codec computes. Raises what the codec raises; `Invalid` for KV that is not whole chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.errors import Invalid
from lmcache_s3.identity import prefix_hashes
from lmcache_s3.quality.model import KV, LayerGroup
from lmcache_s3.types import Grid, KVDtype

_NO_SPACE = "0" * 64
"""Hashes only mark cells here: nothing is looked up by them."""


class Coder(Protocol):
    """Something that codes cells and can be measured. name: for tables; unique in a run."""

    @property
    def name(self) -> str: ...

    def code(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> tuple[int, np.ndarray]:
        """Stored bytes of a cell, and the cell that they decode to (storage dtype, a new array)."""
        ...


class CodecCoder:
    """Any of our codecs, by its port: the bytes are those that would lie in the bucket, header and all."""

    def __init__(self, codec: KVCodec) -> None:
        self.codec = codec

    @property
    def name(self) -> str:
        return self.codec.id if self.codec.exact else f"{self.codec.id}-{self.codec.level}"

    def code(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> tuple[int, np.ndarray]:
        stored = self.codec.encode(cell, spec, position)
        decoded = np.empty_like(cell, order="C")
        self.codec.decode(stored, spec, position, decoded)
        return len(stored), decoded


def through(
    coder: Coder,
    kv: KV,
    groups: Sequence[LayerGroup],
    tokens: Sequence[int],
    kv_dtype: KVDtype,
    *,
    chunk_tokens: int,
    grid: Grid = Grid(),  # noqa: B008 - a value
) -> tuple[KV, int]:
    """The KV after coding, and the bytes it was stored in. tokens: the prompt, as many as the KV has.

    grid: of cells; one that does not divide a group leaves that group whole.
    """
    if len(tokens) % chunk_tokens or any(bits.shape[2] != len(tokens) for bits in kv):
        raise Invalid(f"KV of {len(tokens)} tokens is not whole chunks of {chunk_tokens}", kind="argument")
    hashes = prefix_hashes(_NO_SPACE, tokens, chunk_tokens)
    decoded, stored_bytes = [np.empty_like(bits) for bits in kv], 0
    for bits, out, group in zip(kv, decoded, groups, strict=True):
        geometry = group.geometry(kv_dtype, chunk_tokens)
        used = grid if geometry.divides(grid) else Grid()
        spec = CellSpec.of(geometry, used)
        for chunk, prefix_hash in enumerate(hashes):
            for shard in range(used.shards):
                layers, heads = geometry.cell_layers(used, shard), geometry.cell_heads(used, shard)
                first = chunk * chunk_tokens
                where = np.s_[:, layers.start : layers.stop, first : first + chunk_tokens, heads.start : heads.stop]
                position = CellPosition(prefix_hash, first, layers.start, heads.start)
                n_bytes, out[where] = coder.code(bits[where], spec, position)
                stored_bytes += n_bytes
    return decoded, stored_bytes
