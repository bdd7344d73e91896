"""One load: which cells are needed, cut into pieces, and what each piece goes through.

    cells ─pieces of ≤ piece_bytes─▶ room in the budget ─▶ fetch (verified) ─▶ decode ─▶ cut ─▶ sink

Pieces run at once on the load threads, so one is fetched while another is decoded; they start in prompt order. Works
with any writer's grid: each extent is read by its own. A cell that cannot be had fails its chunk, never the load; what
lies behind the first failed chunk is of no use to a prefix and is not tried any more.
Raises `Invalid` (arguments) from the planning, nothing from the rest.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from lmcache_s3.budget import ByteBudget
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.errors import Invalid, LMCacheS3Error, Unavailable, Unusable
from lmcache_s3.handle import Work
from lmcache_s3.tier_stack import TierStack
from lmcache_s3.types import Buffer, CellRef, ChunkRef, ExtentName, ExtentRecord, Geometry, Grid, runs_of

Sink: TypeAlias = Callable[[int, range, range, np.ndarray], None]
"""Takes (index into the chunks asked for, model layers, model heads, decoded cell cut to those: axes
`[kv, layer, token, head, channel]`, storage dtype). Called from load threads, several at once, once per chunk and
overlapping shard; the array is the sink's to keep, not to write. Never called, nor still running, once the load's
handle is done."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load achieved.

    loaded_chunks: leading chunks that were delivered whole; what was delivered behind them must not be used.
    failed: (index of the chunk, its extent, why), in order; chunks behind the first one may be untried and not listed.
    tier_bytes: stored bytes by the tier they came from. requests: GETs made.
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
class Piece:
    """Consecutive cells of one shard: fetched together. n_bytes: memory it needs at its peak."""

    parts: tuple[Part, ...]
    spec: CellSpec
    codec: str
    stored_bytes: int
    n_bytes: int


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
    """pieces: in prompt order. failed: chunks that cannot even be tried. shards: cells wanted of each chunk."""

    pieces: list[Piece]
    failed: dict[int, tuple[ExtentName, LMCacheS3Error]]
    shards: Counter[int]


def make_plan(
    geometry: Geometry, codecs: Codecs, chunks: Sequence[ChunkRef], layers: range, heads: range, piece_bytes: int
) -> Plan:
    """Cut a load into pieces. Raises `Invalid` if the layers or heads are not the model's."""
    for what, asked, n in (("layers", layers, geometry.layers), ("heads", heads, geometry.heads)):
        if asked.step != 1 or not 0 <= asked.start < asked.stop <= n:
            raise Invalid(f"{what} {asked} are not within the model's {n}", kind="argument")
    plan = Plan([], {}, Counter())
    first = 0
    for extent, start, stop in runs_of(chunks):
        try:
            spec, codec = _readable(geometry, codecs, extent)
            pieces = _pieces_of_run(
                geometry, extent, range(start, stop), chunks, first, layers, heads, spec, codec, piece_bytes
            )
        except Unusable as e:
            for i in range(first, first + stop - start):
                plan.failed[i] = (extent.name, e)
        else:
            plan.pieces.extend(pieces)
            plan.shards.update(part.chunk for piece in pieces for part in piece.parts)
        first += stop - start
    plan.pieces.sort(key=lambda piece: piece.parts[0].chunk)
    return plan


def _readable(geometry: Geometry, codecs: Codecs, extent: ExtentRecord) -> tuple[CellSpec, KVCodec]:
    if not geometry.divides(extent.grid):
        raise Unusable(
            f"extent {extent.name}: the grid {extent.grid} does not divide this model",
            kind="shape",
            key=str(extent.name),
        )
    return CellSpec.of(geometry, extent.grid), codecs.find(extent.name.codec)


def _pieces_of_run(
    geometry: Geometry,
    extent: ExtentRecord,
    run: range,
    chunks: Sequence[ChunkRef],
    first: int,
    layers: range,
    heads: range,
    spec: CellSpec,
    codec: KVCodec,
    piece_bytes: int,
) -> list[Piece]:
    """The pieces of consecutive positions `run` of one extent; chunks[first] is the one at run.start."""
    cell_bytes = geometry.cell_bytes(extent.grid)
    most_bytes = codec.max_encoded_bytes(spec)
    pieces: list[Piece] = []
    for shard in range(extent.grid.shards):
        has_layers, has_heads = geometry.cell_layers(extent.grid, shard), geometry.cell_heads(extent.grid, shard)
        want_layers, want_heads = overlap(has_layers, layers), overlap(has_heads, heads)
        if not want_layers or not want_heads:
            continue
        parts: list[Part] = []
        stored = 0
        for i, cell in enumerate(extent.cells(shard, run.start, run.stop)):
            if not 0 < cell.length <= most_bytes:
                raise Unusable(
                    f"extent {extent.name}: a cell of {cell.length} bytes, at most {most_bytes} can be right",
                    kind="oversized" if cell.length else "truncated",
                    key=str(extent.name),
                )
            # Decoded bytes bound a piece too: cells that code small still take long to decode.
            if parts and (stored + cell.length > piece_bytes or len(parts) * cell_bytes >= 2 * piece_bytes):
                pieces.append(Piece(tuple(parts), spec, codec.id, stored, stored + cell_bytes))
                parts, stored = [], 0
            position = CellPosition(
                chunks[first + i].prefix_hash,
                extent.first_token + cell.position * geometry.chunk_tokens,
                has_layers.start,
                has_heads.start,
            )
            parts.append(Part(first + i, cell, position, want_layers, want_heads))
            stored += cell.length
        pieces.append(Piece(tuple(parts), spec, codec.id, stored, stored + cell_bytes))
    return pieces


class Load:
    """The state of one load while its pieces run. Thread-safe.

    sink: None to fetch only. on_fetched: told of the good cells of a piece (cells, their bytes, level of the tier they
    came from) unless that is the fastest, to promote them; on the load thread, before the work ends.
    """

    def __init__(
        self,
        geometry: Geometry,
        chunks: Sequence[ChunkRef],
        plan: Plan,
        sink: Sink | None,
        *,
        stack: TierStack,
        codecs: Codecs,
        budget: ByteBudget,
        on_fetched: Callable[[Sequence[CellRef], Sequence[Buffer], int], None],
    ) -> None:
        self._geometry = geometry
        self._chunks = chunks
        self._sink = sink
        self._stack = stack
        self._codecs = codecs
        self._budget = budget
        self._on_fetched = on_fetched
        self._lock = threading.Lock()
        self._missing = Counter(plan.shards)
        self._failed = dict(plan.failed)
        self._first_failed = min(plan.failed, default=len(chunks))
        self._pieces_left = len(plan.pieces)
        self._tier_bytes: Counter[str] = Counter()
        self._requests = 0
        self.work: Work[LoadReport] = Work(sum(piece.stored_bytes for piece in plan.pieces), self._cut_short)
        if not plan.pieces:
            self.work.finish(self._report())

    def run(self, piece: Piece) -> None:
        """Take one piece all the way; blocks on I/O, on a load thread. Its failures end up in the report."""
        if not self._given_up(piece):
            if self._budget.wait(piece.n_bytes, lambda: self._given_up(piece)):
                try:
                    self._fetch_and_deliver(piece)
                finally:
                    self._budget.give_back(piece.n_bytes)
            elif not self._given_up(piece):
                error = Unavailable(
                    f"a piece of {piece.n_bytes} bytes does not fit into staging_bytes={self._budget.total_bytes}",
                    kind="full",
                    key="staging_bytes",
                )
                for part in piece.parts:
                    self._fail(part, error)
        with self._lock:
            self._pieces_left -= 1
            last = self._pieces_left == 0
        if last:
            self.work.finish(self._report())

    def _given_up(self, piece: Piece) -> bool:
        return self.work.over or piece.parts[0].chunk > self._first_failed

    def _fetch_and_deliver(self, piece: Piece) -> None:
        cells = [part.cell for part in piece.parts]
        fetched = self._stack.fetch(cells)
        with self._lock:
            self._requests += fetched.requests
        codec = self._codecs.find(piece.codec)
        for part, data, level in zip(piece.parts, fetched.data, fetched.levels, strict=True):
            if self.work.over:
                return
            if isinstance(data, LMCacheS3Error):
                self._fail(part, data)
                continue
            with self._lock:
                self._tier_bytes[self._stack.name(level)] += part.cell.length
            try:
                out = self._decoded(codec, data, piece.spec, part.position)
            except Unavailable as e:  # the store that should have given the cell's calibration
                self._fail(part, e)
                continue
            except Unusable as e:
                self._stack.discard([part.cell])
                self._fail(part, e)
                continue
            if not self._deliver(part, out):
                return
        self._promote(cells, fetched.data, fetched.levels)

    def _decoded(self, codec: KVCodec, data: Buffer, spec: CellSpec, position: CellPosition) -> np.ndarray | None:
        """The cell; None where nobody wants it decoded."""
        if self._sink is None:
            return None
        out = codec.view(data, spec, position)  # spares a copy of everything
        if out is None:
            out = np.empty(spec.shape, self._geometry.storage_dtype)
            codec.decode(data, spec, position, out)
        return out

    def _deliver(self, part: Part, out: np.ndarray | None) -> bool:
        grid, shard = part.cell.grid, part.cell.shard

        def deliver() -> None:
            if self._sink is not None and out is not None:
                cut = cut_cell(self._geometry, grid, shard, part.layers, part.heads, out)
                self._sink(part.chunk, part.layers, part.heads, cut)
            with self._lock:
                self._missing[part.chunk] -= 1

        return self.work.deliver(deliver, part.cell.length)

    def _promote(
        self, cells: Sequence[CellRef], data: Sequence[Buffer | LMCacheS3Error], levels: Sequence[int]
    ) -> None:
        for level in sorted(set(levels) - {0}):
            got = [
                (cell, one)
                for cell, one, at in zip(cells, data, levels, strict=True)
                if at == level and not isinstance(one, LMCacheS3Error)
            ]
            if got:
                self._on_fetched([cell for cell, _ in got], [one for _, one in got], level)

    def _fail(self, part: Part, error: LMCacheS3Error) -> None:
        with self._lock:
            self._failed.setdefault(part.chunk, (part.cell.extent, error))
            self._first_failed = min(self._first_failed, part.chunk)

    def _cut_short(self, error: LMCacheS3Error) -> LoadReport:
        """The report at a deadline: what is not whole by now has failed with `error`."""
        with self._lock:
            for i, chunk in enumerate(self._chunks):
                if self._missing[i] and i not in self._failed:
                    self._failed[i] = (chunk.extent.name, error)
        return self._report()

    def _report(self) -> LoadReport:
        with self._lock:
            loaded = 0
            while loaded < len(self._chunks) and not self._missing[loaded] and loaded not in self._failed:
                loaded += 1
            failed = tuple((i, name, error) for i, (name, error) in sorted(self._failed.items()))
            return LoadReport(loaded, failed, dict(self._tier_bytes), self._requests)


def cut_cell(geometry: Geometry, grid: Grid, shard: int, layers: range, heads: range, cell: np.ndarray) -> np.ndarray:
    """The wanted model layers and heads of a decoded cell, as a view."""
    layer0, head0 = geometry.cell_layers(grid, shard).start, geometry.cell_heads(grid, shard).start
    return cell[:, layers.start - layer0 : layers.stop - layer0, :, heads.start - head0 : heads.stop - head0, :]
