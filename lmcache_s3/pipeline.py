"""What the cells of a load go through, and when it has ended.

    from the bucket:  pieces of neighbouring cells ─▶ `reading` (lane threads) ─▶ verify ─▶ decode ─▶ cut ─▶ sink
    from other tiers: pieces ─▶ get (verified) ─▶ decode ─▶ cut ─▶ sink         (workers, as many as there are cores)

So the link is busy while cells that came before are decoded, and each cell is checked, decoded and copied in one go,
while it is in the processor's cache. Pieces start in prompt order. A cell that cannot be had fails its chunk, never the
load; what lies behind the first failed chunk is of no use to a prefix and is not tried any more.
What another load fetches already is not fetched again (`in_flight`): the other's thread hands over the decoded cell.
If the other gives up, who waits begins again, and so where the store fails it; what it fails twice, or is damaged, has
failed for all.
Raises nothing.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lmcache_s3.budget import ByteBudget
from lmcache_s3.codecs.base import CellSpec, KVCodec
from lmcache_s3.coded import Coded, CodedSink
from lmcache_s3.errors import LMCacheS3Error, Missing, Unavailable, Unusable
from lmcache_s3.handle import Work
from lmcache_s3.loading import Codecs, LoadReport, Part, Plan, Run, Sink, cut_cell
from lmcache_s3.pieces import Cells, Piece, cells_bytes, in_pieces, in_tapered_pieces, one_by_one, shares
from lmcache_s3.reading import Filled, Reader, Step, Wanted
from lmcache_s3.sharing import Fetched, Outcome, Sharing, Waiting
from lmcache_s3.tier_stack import TierStack
from lmcache_s3.tiers.buffers import BufferPool, rounded
from lmcache_s3.tracebacks import without_frames
from lmcache_s3.types import Buffer, CellRef, ChunkRef, Geometry

OnFetched: TypeAlias = Callable[[list[tuple[CellRef, Buffer]], int], None]
"""Told of good cells and their bytes, and the level of the tier they came from. The list is the callee's to empty."""

_TASK_BYTES = 1 << 20
"""Cells smaller than this are verified and decoded several in one task."""


def decoding_bytes(codec: KVCodec, spec: CellSpec, cell_bytes: int, stored_bytes: int) -> int:
    """Memory for one decoded cell and for decoding it, where it is stored in so many; 0 for codecs that need none."""
    if type(codec).view is not KVCodec.view:
        return 0
    return rounded(cell_bytes) + codec.decode_memory_bytes(spec, stored_bytes)


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
    sharing: Sharing


class Load:
    """The state of one load while its pieces run. Thread-safe.

    sink: None to fetch only. on_fetched: of cells that did not come from the fastest tier, to promote them; before the
    work ends. coded: takes cells before `sink` does, undecoded.
    """

    def __init__(
        self,
        means: Means,
        chunks: Sequence[ChunkRef],
        plan: Plan,
        sink: Sink | None,
        on_fetched: OnFetched,
        coded: CodedSink | None = None,
    ) -> None:
        self._means = means
        self._chunks = chunks
        self._sink, self._coded = sink, coded
        self._on_fetched = on_fetched
        self._lock = threading.Lock()
        self._missing = Counter(plan.shards)
        self._failed = dict(plan.failed)
        self._first_failed = min(plan.failed, default=len(chunks))
        self._tier_bytes: Counter[str] = Counter()
        self._requests = 0
        self._left = 0
        """Pieces, and cells that another load fetches."""
        self._waiting: set[Waiting] = set()
        self._plan: Cells = [(run, run.parts) for run in plan.runs]
        self._is_prefetch = sink is None
        self._name = object()  # as the owner of what is in flight: unlike this load it holds no buffers
        self.work: Work[LoadReport] = Work(cells_bytes(self._plan), self._cut_short)
        give_up = functools.partial(means.sharing.give_up, self._name)
        self.work.handle.add_done_callback(lambda _: give_up())

    def start(self) -> None:
        """Cut what is wanted into pieces and hand them to the threads. Does not block. What is not foreseen (the user's
        interrupt, memory) passes, and ends the work, so that nobody waits for what it was to fetch."""
        with self._lock:
            self._left += 1
        try:
            self._begin(self._plan)
        except BaseException as e:
            self.work.fail(e)
            raise
        self._one_less()

    def _begin(self, cells: Cells, *, again: bool = False) -> None:
        """Take each cell from where it is to be had now. again: after the store failed who fetched them."""
        means, last = self._means, len(self._means.stack.tiers)
        near: list[tuple[Run, list[Part]]] = []
        far: list[tuple[Run, list[Part]]] = []
        for run, parts in cells:
            levels = means.stack.levels([part.cell for part in parts])
            near.append((run, [part for part, level in zip(parts, levels, strict=True) if level < last]))
            far.append((run, [part for part, level in zip(parts, levels, strict=True) if level == last]))
        share = max(_TASK_BYTES, cells_bytes(near) // (4 * means.n_workers))
        local = in_pieces(near, min(share, means.most_piece_bytes), 0)
        with self._lock:
            self._left += len(local)
        for piece in local:
            self._start_local(piece)
        far = self._to_fetch(far, again=again)
        piece_bytes = means.reader.piece_bytes(cells_bytes(far), means.most_piece_bytes)
        self._fetch(in_tapered_pieces(far, piece_bytes, means.reader.gap_bytes))

    def _given_up(self, piece: Piece) -> bool:
        return self._is_needless(piece.first_chunk)

    def _is_needless(self, chunk: int) -> bool:
        return self.work.over or chunk > self._first_failed

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
                self._fail(piece.parts, means.budget.too_small(n_bytes))
        for run, parts in self._to_fetch([(piece, rest)]):
            self._fetch(one_by_one(run, parts))
        self._one_less()

    def _through_tiers(self, piece: Piece, codec: KVCodec) -> list[Part]:
        data, levels = self._means.stack.fetch_local([part.cell for part in piece.parts])
        got: dict[int, list[tuple[CellRef, Buffer]]] = {}
        rest: list[Part] = []
        for part, one, level in zip(piece.parts, data, levels, strict=True):
            if one is None:
                rest.append(part)
            elif isinstance(self._take(part, one, level, piece.spec, codec), Fetched):
                got.setdefault(level, []).append((part.cell, one))
        for level in sorted(set(got) - {0}):
            self._on_fetched(got[level], level)
        return rest

    # --- from the bucket

    def _to_fetch(self, cells: Cells, *, again: bool = False) -> list[tuple[Run, list[Part]]]:
        """Those that are still of use and that no other load fetches; this one waits for the others."""
        means = self._means
        ours: list[tuple[Run, list[Part]]] = []
        with self._lock:
            for run, parts in cells:
                ours.append((run, []))
                for part in parts:
                    if self._is_needless(part.chunk):
                        continue
                    waiting = Waiting(self, run, part, again)
                    if means.sharing.fetch_or_wait(self._name, waiting, prefetch=self._is_prefetch):
                        ours[-1][1].append(part)
                    else:
                        self._waiting.add(waiting)
                        self._left += 1
        if self.work.over:  # perhaps before we came: nobody would give up again
            means.sharing.give_up(self._name)
        return ours

    def _fetch(self, pieces: Sequence[Piece]) -> None:
        """Read these, which nobody else does."""
        with self._lock:
            self._left += len(pieces)
        for piece in pieces:
            self._read(piece)

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
                later=self._is_prefetch,
                superseded=lambda: self._is_prefetch and self._means.sharing.for_loads(piece.parts),
            )
        )

    def _was_read(self, piece: Piece, codec: KVCodec, outcome: Filled | LMCacheS3Error | None) -> None:
        if isinstance(outcome, Filled):
            tasks = shares(piece, self._tasks(piece, codec))
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
            self._fetch(one_by_one(piece, piece.parts))
        elif outcome is not None:
            self._fail(piece.parts, outcome)
            self._land(piece.parts, outcome)
        else:
            self._land(piece.parts, None)
            if not self._given_up(piece):  # loads fetch all that this prefetch would have
                self._begin([(piece, piece.parts)])
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
        if self._sink is None:
            return 0
        return decoding_bytes(codec, piece.spec, piece.cell_bytes, max(part.cell.length for part in piece.parts))

    def _tasks(self, piece: Piece, codec: KVCodec) -> int:
        """How many tasks the cells of a piece make: as many as is worth while, and as there should be memory for."""
        means = self._means
        tasks = max(1, min(len(piece.parts), means.n_workers, piece.n_bytes // _TASK_BYTES))
        each = self._decoded_bytes(piece, codec)
        return tasks if not each else max(1, min(tasks, (means.budget.total_bytes // 4 - piece.n_bytes) // each))

    def _take(self, part: Part, data: Buffer, level: int, spec: CellSpec, codec: KVCodec) -> Fetched | LMCacheS3Error:
        """Decode and deliver one verified cell, or say why not."""
        with self._lock:
            self._tier_bytes[self._means.stack.name(level)] += part.cell.length
        try:
            decoded = self._decoded(codec, data, spec, part)
        except Unavailable as e:  # the store that should have given the cell's calibration
            self._fail([part], e)
            return e
        except Unusable as e:
            self._means.stack.discard([part.cell])
            self._fail([part], e)
            return e
        self._hand_over(part, decoded)
        if isinstance(decoded, Coded) and decoded.unusable is not None:
            return decoded.unusable
        return Fetched(data, decoded)

    def _hand_over(self, part: Part, decoded: np.ndarray | Coded | None) -> bool:
        # No closure: a traceback through one would keep the memory.
        return self.work.deliver(functools.partial(self._deliver, part, decoded), part.cell.length)

    def _decoded(self, codec: KVCodec, data: Buffer, spec: CellSpec, part: Part) -> np.ndarray | Coded | None:
        """The cell; None where nobody wants it decoded."""
        if self._sink is None:
            return None
        if self._coded is not None and (coded := self._coded.read(codec, data, spec, part.position)) is not None:
            return coded
        out = codec.view(data, spec, part.position)  # spares a copy of everything
        if out is None:
            dtype = np.dtype(self._means.geometry.storage_dtype)
            n = int(np.prod(spec.shape)) * dtype.itemsize
            out = np.frombuffer(self._means.buffers.take(n), dtype).reshape(spec.shape)
            codec.decode(data, spec, part.position, out)
            out.flags.writeable = False  # others may get it, too
        return out

    def _deliver(self, part: Part, out: np.ndarray | Coded | None) -> None:
        if isinstance(out, Coded):
            out.unusable = self._deliver_coded(part, out)
            if out.unusable is not None:
                self._means.stack.discard([part.cell])
                self._fail([part], out.unusable)
                return
        elif out is not None:
            self._deliver_decoded(part, out)
        with self._lock:
            self._missing[part.chunk] -= 1

    def _deliver_coded(self, part: Part, cell: Coded) -> Unusable | None:
        """What is wrong with it, if that shows now."""
        if self._coded is not None:
            return self._coded.put(part.chunk, part.layers, part.heads, cell)
        if self._sink is None:
            return None
        try:  # fetched by a load whose sink takes coded cells; ours does not
            decoded = cell.decoded()
        except Unusable as e:
            return e
        self._deliver_decoded(part, decoded)
        return None

    def _deliver_decoded(self, part: Part, out: np.ndarray) -> None:
        if self._sink is not None:
            grid, shard = part.cell.grid, part.cell.shard
            cut = cut_cell(self._means.geometry, grid, shard, part.layers, part.heads, out)
            self._sink(part.chunk, part.layers, part.heads, cut)

    def _fail(self, parts: Sequence[Part], error: LMCacheS3Error) -> None:
        without_frames(error)
        with self._lock:
            for part in parts:
                self._failed.setdefault(part.chunk, (part.cell.extent, error))
                self._first_failed = min(self._first_failed, part.chunk)
            needless = [one for one in self._waiting if self._is_needless(one.part.chunk)]
            self._waiting.difference_update(needless)
            self._left -= len(needless)  # not the last: what failed is counted, too

    # --- cells that one load fetches and others want

    def _land(self, parts: Sequence[Part], outcome: Outcome) -> None:
        """What this load had to fetch, for others."""
        self._means.sharing.land(self._name, parts, outcome, prefetch=self._is_prefetch)

    def told(self, waiting: Sequence[Waiting], outcome: Outcome) -> None:
        """What became of cells that this load waits for. A cell is handed over before this returns."""
        with self._lock:
            waiting = [one for one in waiting if one in self._waiting]
            self._waiting.difference_update(waiting)
        if isinstance(outcome, Fetched):
            for one in waiting:
                self._share(one.part, outcome)
        elif outcome is None:
            self._begin_again(waiting)
        else:
            last = not isinstance(outcome, Unavailable)
            self._fail([one.part for one in waiting if last or one.again], outcome)
            self._begin_again([one for one in waiting if not (last or one.again)], again=True)
        for _ in waiting:
            self._one_less()

    def _begin_again(self, waiting: Sequence[Waiting], *, again: bool = False) -> None:
        by_run: dict[tuple[int, bool], list[Waiting]] = {}
        for one in waiting:
            if not self._is_needless(one.part.chunk):
                by_run.setdefault((id(one.run), again or one.again), []).append(one)
        for (_, failed_once), some in by_run.items():
            parts = sorted((one.part for one in some), key=lambda part: part.cell.position)
            self._begin([(some[0].run, parts)], again=failed_once)

    def _share(self, part: Part, fetched: Fetched) -> None:
        means = self._means
        if not self._hand_over(part, fetched.decoded):
            return
        means.reader.metrics.add("shared_cells")
        means.reader.metrics.add("shared_bytes", part.cell.length)
        with self._lock:
            self._tier_bytes[means.stack.bucket.name] += part.cell.length
            self._left += self._is_prefetch
        if self._is_prefetch:  # a load's cells are promoted by who fetched them
            keep = functools.partial(self._keep_shared, part, fetched.data)
            means.step(lambda: means.workers.submit(keep), self.work)

    def _keep_shared(self, part: Part, data: Buffer) -> None:
        if not self.work.over:
            self._on_fetched([(part.cell, data)], len(self._means.stack.tiers))
        self._one_less()

    # --- counting

    def _asked(self) -> None:
        with self._lock:
            self._requests += 1

    def _one_less(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
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
            load._land([part], e)
            return
        outcome = load._take(part, data, len(stack.tiers), self._piece.spec, self._codec)
        load._land([part], outcome)
        if isinstance(outcome, Fetched):
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
