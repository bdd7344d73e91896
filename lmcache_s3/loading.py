"""What a load asks for and what it reports: which cells of which shards are needed, and what of each.

Works with any writer's grid: each extent is read by its own, and of it only the shards that overlap what is wanted.
`pipeline` says how it goes on. Pure. Raises `Invalid` (arguments), `Unusable` (codec) from `Codecs`, nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.errors import Invalid, LMCacheS3Error, Unusable
from lmcache_s3.types import CellRef, ChunkRef, ExtentName, ExtentRecord, Geometry, Grid, runs_of

Sink: TypeAlias = Callable[[int, range, range, np.ndarray], None]
"""Takes (index into the chunks asked for, model layers, model heads, decoded cell cut to those: axes
`[kv, layer, token, head, channel]`, storage dtype). Called from several threads at once, once per chunk and overlapping
shard. The array is not to be written, and to be copied from before the call returns: kept, it stays whole, in memory
that is meant for other loads. Never called, nor still running, once the load's handle is done."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load achieved.

    loaded_chunks: leading chunks that were delivered whole; what was delivered behind them must not be used.
    failed: (index of the chunk, its extent, why), in order; chunks behind the first one may be untried and not listed.
    tier_bytes: stored bytes by the tier they came from, also where another load fetched them. requests: GETs made for
    this load.
    """

    loaded_chunks: int
    failed: tuple[tuple[int, ExtentName, LMCacheS3Error], ...] = ()
    tier_bytes: Mapping[str, int] = field(default_factory=dict)
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One cell to load. chunk: index into the chunks asked for. layers, heads: what is wanted of it, in the model."""

    chunk: int
    cell: CellRef
    position: CellPosition
    layers: range
    heads: range


@dataclass(frozen=True, slots=True)
class Run:
    """Parts of one shard at rising positions. codec: its id. cell_bytes: of a decoded cell."""

    parts: tuple[Part, ...]
    spec: CellSpec
    codec: str
    cell_bytes: int


def overlap(a: range, b: range) -> range:
    """The common part of two ranges of step 1."""
    return range(max(a.start, b.start), max(max(a.start, b.start), min(a.stop, b.stop)))


class Codecs:
    """Codecs by id; the space's own one is configured, others decode with what their cells carry."""

    def __init__(self, own: KVCodec | None = None) -> None:
        self._known: dict[str, KVCodec] = {} if own is None else {own.id: own}

    def find(self, codec_id: str) -> KVCodec:
        """Raises `Unusable(codec)`."""
        codec = self._known.get(codec_id)
        if codec is None:
            from lmcache_s3.codecs.registry import make_codec

            try:
                codec = make_codec(codec_id)
            except Invalid as e:
                raise Unusable(str(e), kind="codec") from e
            self._known[codec_id] = codec
        return codec


@dataclass(slots=True)
class Plan:
    """runs: in prompt order. failed: chunks that cannot even be tried. shards: cells wanted of each chunk."""

    runs: list[Run]
    failed: dict[int, tuple[ExtentName, LMCacheS3Error]]
    shards: Counter[int]

    def prompts(self) -> list[list[CellRef]]:
        """The cells of each shard, in prompt order: as many prompts to a tier."""
        shards: dict[tuple[Grid, int], list[CellRef]] = {}
        for run in self.runs:
            cell = run.parts[0].cell
            shards.setdefault((cell.grid, cell.shard), []).extend(part.cell for part in run.parts)
        return list(shards.values())


def make_plan(geometry: Geometry, codecs: Codecs, chunks: Sequence[ChunkRef], layers: range, heads: range) -> Plan:
    """What a load has to read. Raises `Invalid` if the layers or heads are not the model's."""
    for what, asked, n in (("layers", layers, geometry.layers), ("heads", heads, geometry.heads)):
        if asked.step != 1 or not 0 <= asked.start < asked.stop <= n:
            raise Invalid(f"{what} {asked} are not within the model's {n}", kind="argument")
    plan = Plan([], {}, Counter())
    first = 0
    for extent, start, stop in runs_of(chunks):
        try:
            spec, codec = _readable(geometry, codecs, extent)
            runs = _runs_of_extent(geometry, extent, range(start, stop), chunks, first, layers, heads, spec, codec)
        except Unusable as e:
            for i in range(first, first + stop - start):
                plan.failed[i] = (extent.name, e)
        else:
            plan.runs.extend(runs)
            plan.shards.update(part.chunk for run in runs for part in run.parts)
        first += stop - start
    return plan


def _readable(geometry: Geometry, codecs: Codecs, extent: ExtentRecord) -> tuple[CellSpec, KVCodec]:
    if not geometry.divides(extent.grid):
        raise Unusable(
            f"extent {extent.name}: the grid {extent.grid} does not divide this model",
            kind="shape",
            key=str(extent.name),
        )
    return CellSpec.of(geometry, extent.grid), codecs.find(extent.name.codec)


def _runs_of_extent(
    geometry: Geometry,
    extent: ExtentRecord,
    positions: range,
    chunks: Sequence[ChunkRef],
    first: int,
    layers: range,
    heads: range,
    spec: CellSpec,
    codec: KVCodec,
) -> list[Run]:
    """What is wanted of consecutive positions of one extent; chunks[first] is the one at positions.start."""
    most_bytes = codec.max_encoded_bytes(spec)
    runs: list[Run] = []
    for shard in range(extent.grid.shards):
        has_layers, has_heads = geometry.cell_layers(extent.grid, shard), geometry.cell_heads(extent.grid, shard)
        want_layers, want_heads = overlap(has_layers, layers), overlap(has_heads, heads)
        if not want_layers or not want_heads:
            continue
        parts: list[Part] = []
        for i, cell in enumerate(extent.cells(shard, positions.start, positions.stop)):
            if not 0 < cell.length <= most_bytes:
                raise Unusable(
                    f"extent {extent.name}: a cell of {cell.length} bytes, at most {most_bytes} can be right",
                    kind="oversized" if cell.length else "truncated",
                    key=str(extent.name),
                )
            position = CellPosition(
                chunks[first + i].prefix_hash,
                extent.first_token + cell.position * geometry.chunk_tokens,
                has_layers.start,
                has_heads.start,
            )
            parts.append(Part(first + i, cell, position, want_layers, want_heads))
        runs.append(Run(tuple(parts), spec, codec.id, geometry.cell_bytes(extent.grid)))
    return runs


def cut_cell(geometry: Geometry, grid: Grid, shard: int, layers: range, heads: range, cell: np.ndarray) -> np.ndarray:
    """The wanted model layers and heads of a decoded cell, as a view."""
    layer0, head0 = geometry.cell_layers(grid, shard).start, geometry.cell_heads(grid, shard).start
    return cell[:, layers.start - layer0 : layers.stop - layer0, :, heads.start - head0 : heads.stop - head0, :]
