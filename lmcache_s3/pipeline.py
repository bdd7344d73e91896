"""What the cells of a load go through, and when it has ended.

    from the bucket:  pieces of neighbouring cells ─▶ `reading` (lane threads) ─▶ verify ─▶ decode ─▶ cut ─▶ sink
    from other tiers: pieces ─▶ get (verified) ─▶ decode ─▶ cut ─▶ sink         (workers, as many as there are cores)

So the link is busy while cells that came before are decoded, and each cell is checked, decoded and copied in one go,
while it is in the processor's cache. Pieces start in prompt order. A cell that cannot be had fails its chunk, never the
load; what lies behind the first failed chunk is of no use to a prefix and is not tried any more.
Raises nothing.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lmcache_s3.budget import ByteBudget
from lmcache_s3.codecs.base import CellSpec, KVCodec
from lmcache_s3.errors import LMCacheS3Error, Missing, Unavailable, Unusable
from lmcache_s3.handle import Work
from lmcache_s3.loading import Codecs, LoadReport, Part, Plan, Run, Sink, cut_cell
from lmcache_s3.range_planning import spans
from lmcache_s3.reading import Filled, Reader, Step, Wanted
from lmcache_s3.tier_stack import TierStack
from lmcache_s3.tiers.buffers import BufferPool, rounded
from lmcache_s3.tracebacks import without_frames
from lmcache_s3.types import Buffer, CellRef, ChunkRef, Geometry

OnFetched: TypeAlias = Callable[[list[tuple[CellRef, Buffer]], int], None]
"""Told of good cells and their bytes, and the level of the tier they came from. The list is the callee's to empty."""

_TASK_BYTES = 1 << 20
"""Cells smaller than this are verified and decoded several in one task."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Cells of one shard that are fetched together. start, n_bytes: where they lie in the object, gaps included."""

    parts: tuple[Part, ...]
    spec: CellSpec
    codec: str
    cell_bytes: int
    start: int
    n_bytes: int

    @property
    def first_chunk(self) -> int:
        return self.parts[0].chunk


@dataclass(frozen=True, slots=True)
class Means:
    """What all loads of a transfer share. local: threads for tiers before the bucket; workers: for what was read."""

    geometry: Geometry
    stack: TierStack
    codecs: Codecs
    budget: ByteBudget
    buffers: BufferPool
    reader: Reader
    local: ThreadPoolExecutor
    workers: ThreadPoolExecutor
    n_workers: int
    step: Step
    most_piece_bytes: int


class Load:
    """The state of one load while its pieces run. Thread-safe.

    sink: None to fetch only. on_fetched: of cells that did not come from the fastest tier, to promote them; before the
    work ends.
    """

    def __init__(
        self, means: Means, chunks: Sequence[ChunkRef], plan: Plan, sink: Sink | None, on_fetched: OnFetched
    ) -> None:
        self._means = means
        self._chunks = chunks
        self._sink = sink
        self._on_fetched = on_fetched
        self._lock = threading.Lock()
        self._missing = Counter(plan.shards)
        self._failed = dict(plan.failed)
        self._first_failed = min(plan.failed, default=len(chunks))
        self._tier_bytes: Counter[str] = Counter()
        self._requests = 0
        self._pieces_left = 0
        self._runs = plan.runs
        self.work: Work[LoadReport] = Work(
            sum(part.cell.length for run in plan.runs for part in run.parts), self._cut_short
        )

    def start(self) -> None:
        """Cut what is wanted into pieces and hand them to the threads. Does not block."""
        local, remote = self._pieces()
        self._pieces_left = len(local) + len(remote)
        if not self._pieces_left:
            self.work.finish(self._report())
        for piece in local:
            self._start_local(piece)
        for piece in remote:
            self._read(piece)

    # --- cutting

    def _pieces(self) -> tuple[list[Piece], list[Piece]]:
        """(from tiers before the bucket, from the bucket), each in prompt order."""
        means, last = self._means, len(self._means.stack.tiers)
        near: list[tuple[Run, list[Part]]] = []
        far: list[tuple[Run, list[Part]]] = []
        for run in self._runs:
            levels = means.stack.levels([part.cell for part in run.parts])
            near.append((run, [part for part, level in zip(run.parts, levels, strict=True) if level < last]))
            far.append((run, [part for part, level in zip(run.parts, levels, strict=True) if level == last]))
        load_bytes = sum(part.cell.length for _, parts in far for part in parts)
        piece_bytes = means.reader.piece_bytes(load_bytes, means.most_piece_bytes)
        # Few pieces stay few: they end together anyway.
        tail = len(self._chunks)
        if load_bytes > 4 * piece_bytes:
            tail = _last_quarter([part for _, parts in far for part in parts])
        remote = [
            piece
            for run, parts in far
            for some, size in _tapered(parts, tail, piece_bytes)
            for piece in _cut(run, some, size, means.reader.gap_bytes)
        ]
        near_bytes = sum(part.cell.length for _, parts in near for part in parts)
        share = max(_TASK_BYTES, near_bytes // (4 * means.n_workers))
        local = [p for run, parts in near for p in _cut(run, parts, min(share, means.most_piece_bytes), 0)]
        return sorted(local, key=lambda p: p.first_chunk), sorted(remote, key=lambda p: p.first_chunk)

    def _given_up(self, piece: Piece) -> bool:
        return self.work.over or piece.first_chunk > self._first_failed

    # --- from the tiers before the bucket

    def _start_local(self, piece: Piece) -> None:
        self._means.step(lambda: self._means.local.submit(self._run_local, piece), self.work)

    def _run_local(self, piece: Piece) -> None:
        """Take a piece all the way; what is in no tier any more is read from the bucket."""
        means = self._means
        codec = means.codecs.find(piece.codec)
        n_bytes = piece.n_bytes + self._decoded_bytes(piece, codec)
        rest: list[Part] = []
        if not self._given_up(piece):
            if means.budget.wait(n_bytes, lambda: self._given_up(piece)):
                try:
                    rest = self._through_tiers(piece, codec)
                finally:
                    means.budget.give_back(n_bytes)
            elif not self._given_up(piece):
                self._fail(piece.parts, self._too_large(n_bytes))
        self._more([one for part in rest for one in _cut_piece(piece, [part])])
        self._one_less()

    def _through_tiers(self, piece: Piece, codec: KVCodec) -> list[Part]:
        data, levels = self._means.stack.fetch_local([part.cell for part in piece.parts])
        got: dict[int, list[tuple[CellRef, Buffer]]] = {}
        rest: list[Part] = []
        for part, one, level in zip(piece.parts, data, levels, strict=True):
            if one is None:
                rest.append(part)
            elif self._take(part, one, level, piece.spec, codec):
                got.setdefault(level, []).append((part.cell, one))
        for level in sorted(set(got) - {0}):
            self._on_fetched(got[level], level)
        return rest

    # --- from the bucket

    def _read(self, piece: Piece) -> None:
        codec = self._means.codecs.find(piece.codec)

        def done(outcome: Filled | LMCacheS3Error | None) -> None:
            self._was_read(piece, codec, outcome)

        self._means.reader.read(
            Wanted(
                piece.parts[0].cell,
                piece.start,
                piece.n_bytes,
                self._decoded_bytes(piece, codec) * self._tasks(piece, codec),
                self.work,
                lambda: self._given_up(piece),
                self._asked,
                done,
                later=self._sink is None,
            )
        )

    def _was_read(self, piece: Piece, codec: KVCodec, outcome: Filled | LMCacheS3Error | None) -> None:
        if isinstance(outcome, Filled):
            tasks = _shares(piece, self._tasks(piece, codec))
            process = _Processing(self, piece, codec, outcome, len(tasks))
            for task in tasks:
                if not self._means.step(
                    lambda task=task: self._means.workers.submit(process.run, task),  # type: ignore[misc]
                    self.work,
                ):
                    process.end()
            return
        if isinstance(outcome, Unusable) and not isinstance(outcome, Missing) and len(piece.parts) > 1:
            # Too short an object for all of them, perhaps not for the first.
            self._more([one for part in piece.parts for one in _cut_piece(piece, [part])])
        elif outcome is not None:
            self._fail(piece.parts, outcome)
        self._one_less()

    def _processed(self, good: list[tuple[CellRef, Buffer]]) -> None:
        """All cells of a piece are through; `good` are those that may be promoted."""
        level = len(self._means.stack.tiers)
        if level and good and not self.work.over:
            self._on_fetched(good, level)
        self._one_less()

    # --- a cell

    def _decoded_bytes(self, piece: Piece, codec: KVCodec) -> int:
        """Memory for one decoded cell and for decoding it; 0 where nothing is decoded, or into no memory of its own."""
        if self._sink is None or type(codec).view is not KVCodec.view:
            return 0
        return rounded(piece.cell_bytes) + int(codec.decode_memory * piece.cell_bytes)

    def _tasks(self, piece: Piece, codec: KVCodec) -> int:
        """How many tasks the cells of a piece make: as many as is worth while, and as there should be memory for."""
        means = self._means
        tasks = max(1, min(len(piece.parts), means.n_workers, piece.n_bytes // _TASK_BYTES))
        each = self._decoded_bytes(piece, codec)
        return tasks if not each else max(1, min(tasks, (means.budget.total_bytes // 4 - piece.n_bytes) // each))

    def _take(self, part: Part, data: Buffer, level: int, spec: CellSpec, codec: KVCodec) -> bool:
        """Decode and deliver one verified cell; whether its bytes are good."""
        with self._lock:
            self._tier_bytes[self._means.stack.name(level)] += part.cell.length
        try:
            out = self._decoded(codec, data, spec, part)
        except Unavailable as e:  # the store that should have given the cell's calibration
            self._fail([part], e)
            return False
        except Unusable as e:
            self._means.stack.discard([part.cell])
            self._fail([part], e)
            return False
        # No closure: a traceback through one would keep the memory.
        self.work.deliver(functools.partial(self._deliver, part, out), part.cell.length)
        return True

    def _decoded(self, codec: KVCodec, data: Buffer, spec: CellSpec, part: Part) -> np.ndarray | None:
        """The cell; None where nobody wants it decoded."""
        if self._sink is None:
            return None
        out = codec.view(data, spec, part.position)  # spares a copy of everything
        if out is None:
            dtype = np.dtype(self._means.geometry.storage_dtype)
            n = int(np.prod(spec.shape)) * dtype.itemsize
            out = np.frombuffer(self._means.buffers.take(n), dtype).reshape(spec.shape)
            codec.decode(data, spec, part.position, out)
        return out

    def _deliver(self, part: Part, out: np.ndarray | None) -> None:
        if self._sink is not None and out is not None:
            cell = part.cell
            cut = cut_cell(self._means.geometry, cell.grid, cell.shard, part.layers, part.heads, out)
            self._sink(part.chunk, part.layers, part.heads, cut)
        with self._lock:
            self._missing[part.chunk] -= 1

    def _fail(self, parts: Sequence[Part], error: LMCacheS3Error) -> None:
        without_frames(error)
        with self._lock:
            for part in parts:
                self._failed.setdefault(part.chunk, (part.cell.extent, error))
                self._first_failed = min(self._first_failed, part.chunk)

    def _too_large(self, n_bytes: int) -> LMCacheS3Error:
        return Unavailable(
            f"a piece of {n_bytes} bytes does not fit into staging_bytes={self._means.budget.total_bytes}",
            kind="full",
            key="staging_bytes",
        )

    # --- counting

    def _asked(self) -> None:
        with self._lock:
            self._requests += 1

    def _more(self, pieces: Sequence[Piece]) -> None:
        """Read these too, from the bucket."""
        with self._lock:
            self._pieces_left += len(pieces)
        for piece in pieces:
            self._read(piece)

    def _one_less(self) -> None:
        with self._lock:
            self._pieces_left -= 1
            last = self._pieces_left == 0
        if last:
            self.work.finish(self._report())

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


class _Processing:
    """What was read of a piece, while workers verify, decode and deliver its cells."""

    def __init__(self, load: Load, piece: Piece, codec: KVCodec, filled: Filled, tasks: int) -> None:
        self._load, self._piece, self._codec = load, piece, codec
        self._buffer: memoryview | None = filled.buffer
        self._extra_bytes = filled.extra_bytes
        self._left = tasks
        self._broken = False
        self._good: list[tuple[CellRef, Buffer]] = []
        self._lock = threading.Lock()

    def run(self, task: Sequence[Part]) -> None:
        """Some of the cells, on a worker thread. What the sink raises passes, and ends the work."""
        try:
            for part in task:
                if not self._load.work.over:
                    self._cell(part)
        except BaseException:
            self._broken = True
            raise
        finally:
            self.end()

    def _cell(self, part: Part) -> None:
        load, buffer = self._load, self._buffer
        assert buffer is not None
        start = part.cell.offset - self._piece.start
        data = buffer[start : start + part.cell.length].toreadonly()
        stack = load._means.stack
        try:
            stack.bucket.checked(part.cell, data)
        except Unusable as e:
            load._fail([part], e)
            return
        if load._take(part, data, len(stack.tiers), self._piece.spec, self._codec):
            with self._lock:
                self._good.append((part.cell, data))

    def end(self) -> None:
        """A task is over; the last one lets the memory go."""
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            good, self._good, self._buffer = self._good, [], None
            good.sort(key=lambda one: one[0].position)
            self._load._means.budget.give_back(self._extra_bytes)
            if not self._broken:
                self._load._processed(good)


def _last_quarter(parts: Sequence[Part]) -> int:
    """The chunk with which the last quarter of a load's bytes begins."""
    left = sum(part.cell.length for part in parts) // 4
    for part in sorted(parts, key=lambda part: -part.chunk):
        left -= part.cell.length
        if left < 0:
            return part.chunk + 1
    return 0


def _tapered(parts: Sequence[Part], tail_chunk: int, piece_bytes: int) -> Iterator[tuple[Sequence[Part], int]]:
    """Cells, and how large their pieces may be: smaller at the end, so that little is left to decode after the last."""
    head = [part for part in parts if part.chunk < tail_chunk]
    tail = [part for part in parts if part.chunk >= tail_chunk]
    yield head, piece_bytes
    yield tail, max(1, piece_bytes // 2)


def _cut(run: Run, parts: Sequence[Part], piece_bytes: int, gap_bytes: int) -> Iterator[Piece]:
    places = [(part.cell.offset, part.cell.length) for part in parts]
    for span in spans(places, most_bytes=piece_bytes, gap_bytes=gap_bytes) if places else ():
        chosen = tuple(parts[span.first : span.stop])
        yield Piece(chosen, run.spec, run.codec, run.cell_bytes, span.start, span.n_bytes)


def _cut_piece(piece: Piece, parts: Sequence[Part]) -> Iterator[Piece]:
    return _cut(Run(piece.parts, piece.spec, piece.codec, piece.cell_bytes), parts, 1, 0)


def _shares(piece: Piece, tasks: int) -> list[Sequence[Part]]:
    """The cells of a piece in so many about equal tasks."""
    n = len(piece.parts)
    return [piece.parts[n * i // tasks : n * (i + 1) // tasks] for i in range(tasks)]
