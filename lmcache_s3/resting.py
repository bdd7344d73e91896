"""Chunks that are encoded and wait to be uploaded together with what follows them (write-behind).

Under way a chunk belongs to a *provisional extent*: a name nobody else knows, whose cells lie in `RestingTier` and are
found by `RestingIndex`. When it is time its cells are joined, as they are, to one object under a name of its own. A
process that dies loses what rests; none of it was acknowledged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lmcache_s3.errors import Bug, Missing, Unavailable
from lmcache_s3.tiers.base import TierStats
from lmcache_s3.types import Buffer, CellRef, ChunkRef, ExtentName, ExtentRecord

_Key = tuple[int, int]
"""(shard, position) within an extent."""


class RestingTier:
    """The cells of provisional extents, in memory: a `Tier` that keeps only what `rest` brings and evicts nothing.

    budget_bytes: of encoded cells. Thread-safe. Raises `Unavailable(full)` from `rest`, `Missing` from `get`.
    """

    name = "resting"

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes: int | None = budget_bytes
        self._budget = budget_bytes
        self._lock = threading.Lock()
        self._extents: dict[ExtentName, dict[_Key, Buffer]] = {}
        self._cells = self._used_bytes = self._hits = self._read_bytes = self._written_bytes = 0

    def rest(self, cells: Sequence[tuple[CellRef, Buffer]]) -> None:
        """Keep all of these cells, or none. Their bytes are not copied, and the caller's no more."""
        n_bytes = sum(cell.length for cell, _ in cells)
        with self._lock:
            if self._used_bytes + n_bytes > self._budget:
                raise Unavailable(
                    f"{n_bytes} bytes more do not fit into write_behind_bytes={self._budget} ({self._used_bytes} rest)",
                    kind="full",
                    key="write_behind_bytes",
                )
            for cell, data in cells:
                self._extents.setdefault(cell.extent, {})[cell.shard, cell.position] = data
            self._cells += len(cells)
            self._used_bytes += n_bytes
            self._written_bytes += n_bytes

    def forget(self, names: Iterable[ExtentName]) -> None:
        """Let go of provisional extents: they are uploaded, or given up."""
        with self._lock:
            for name in names:
                cells = self._extents.pop(name, {})
                self._cells -= len(cells)
                self._used_bytes -= sum(memoryview(data).nbytes for data in cells.values())

    def match_prefix(self, cells: Sequence[CellRef]) -> int:
        with self._lock:
            for i, cell in enumerate(cells):
                if (cell.shard, cell.position) not in self._extents.get(cell.extent, ()):
                    return i
        return len(cells)

    def use(self, cells: Sequence[CellRef]) -> None:
        """Evicts nothing, so it need not know."""

    def get(self, cells: Sequence[CellRef]) -> list[Buffer]:
        with self._lock:
            try:
                out = [self._extents[cell.extent][cell.shard, cell.position] for cell in cells]
            except KeyError as e:
                name = str(next((cell.extent for cell in cells if cell.extent not in self._extents), e))
                raise Missing(f"extent {name} rests no longer", key=name) from e
            self._hits += len(cells)
            self._read_bytes += sum(cell.length for cell in cells)
            return out

    def put(self, cells: Sequence[tuple[CellRef, Buffer]]) -> int:
        """Keeps nothing: what is stored already does not rest."""
        return 0

    def evict(self, n_bytes: int) -> int:
        """Frees nothing: what rests is nowhere else."""
        return 0

    def discard(self, cells: Sequence[CellRef]) -> None:
        self.forget({cell.extent for cell in cells})

    def stats(self) -> TierStats:
        with self._lock:
            read, written = self._read_bytes, self._written_bytes
            return TierStats(self._cells, self._used_bytes, self._budget, self._hits, 0, 0, 0, read, written)

    def close(self) -> None:
        with self._lock:
            self._extents.clear()
            self._cells = self._used_bytes = 0


@dataclass(slots=True)
class _Provisional:
    record: ExtentRecord
    left: int
    """Chunks that still rest here under this name."""
    readers: int = 0


class RestingIndex:
    """Which chunks rest, by prefix hash. Thread-safe; no I/O."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: dict[bytes, ChunkRef] = {}
        self._extents: dict[ExtentName, _Provisional] = {}

    def __len__(self) -> int:
        """Chunks that rest."""
        return len(self._chunks)

    def add(self, record: ExtentRecord) -> None:
        """The cells of a provisional extent rest now, on all ranks. A chunk that rests already stays where it is."""
        with self._lock:
            left = 0
            for position, prefix_hash in enumerate(record.chunk_hashes()):
                if prefix_hash not in self._chunks:
                    self._chunks[prefix_hash] = ChunkRef(prefix_hash, record, position)
                    left += 1
            self._extents[record.name] = _Provisional(record, left)

    def find(self, prefix_hash: bytes) -> ChunkRef | None:
        return self._chunks.get(prefix_hash)

    def match(
        self,
        hashes: Sequence[bytes],
        stored: Callable[[Sequence[bytes]], Sequence[ChunkRef]],
        find_stored: Callable[[bytes], ChunkRef | None],
    ) -> Sequence[ChunkRef]:
        """The longest prefix of what is stored and what rests. stored: the index's `match`, find_stored: its `find`."""
        known = stored(hashes)
        if not self._chunks or len(known) == len(hashes):
            return known
        out = list(known)
        for prefix_hash in hashes[len(known) :]:
            ref = self.find(prefix_hash) or find_stored(prefix_hash)
            if ref is None:
                break
            out.append(ref)
        return out

    def refs(self, hashes: Iterable[bytes]) -> list[ChunkRef]:
        """Where these chunks rest, in order. Raises `Bug` if one does not."""
        refs: list[ChunkRef] = []
        for prefix_hash in hashes:
            ref = self._chunks.get(prefix_hash)
            if ref is None:
                raise Bug(f"chunk {prefix_hash.hex()} does not rest")
            refs.append(ref)
        return refs

    @contextmanager
    def reading(self, refs: Iterable[ChunkRef]) -> Iterator[None]:
        """While the context lasts, no provisional extent among these is offered by `take_idle`."""
        with self._lock:
            held = [one for name in {ref.extent.name for ref in refs} if (one := self._extents.get(name)) is not None]
            for one in held:
                one.readers += 1
        try:
            yield
        finally:
            with self._lock:
                for one in held:
                    one.readers -= 1

    def uploaded(self, hashes: Iterable[bytes]) -> None:
        """These chunks rest no more: they are committed elsewhere, or given up."""
        with self._lock:
            for prefix_hash in hashes:
                ref = self._chunks.pop(prefix_hash, None)
                if ref is not None:
                    self._extents[ref.extent.name].left -= 1

    def take_idle(self) -> list[ExtentName]:
        """Provisional extents that nobody needs any more; each is returned once, to be forgotten by `RestingTier`."""
        with self._lock:
            idle = [name for name, one in self._extents.items() if not one.left and not one.readers]
            for name in idle:
                del self._extents[name]
            return idle
