"""Cells of a load that are moved together: how what is wanted is cut into pieces.

Few and large, for requests and threads cost something; smaller at the end of a load, so that little is left to decode
after the last. Pure. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lmcache_s3.loading import Part, Run
from lmcache_s3.range_planning import spans

Cells: TypeAlias = Sequence[tuple[Run, Sequence[Part]]]
"""Of each run, those of its parts that are meant, in order."""


@dataclass(frozen=True, slots=True)
class Piece(Run):
    """Cells of one shard that are fetched together. start, n_bytes: where they lie in the object, gaps included."""

    start: int
    n_bytes: int

    @property
    def first_chunk(self) -> int:
        return self.parts[0].chunk


def cells_bytes(cells: Cells) -> int:
    """Stored bytes."""
    return sum(part.cell.length for _, parts in cells for part in parts)


def in_pieces(cells: Cells, piece_bytes: int, gap_bytes: int) -> list[Piece]:
    """In prompt order; each of `piece_bytes` at most, or of one cell. Gaps up to `gap_bytes` are read through."""
    pieces = [piece for run, parts in cells for piece in _cut(run, parts, piece_bytes, gap_bytes)]
    return sorted(pieces, key=lambda piece: piece.first_chunk)


def in_tapered_pieces(cells: Cells, piece_bytes: int, gap_bytes: int) -> list[Piece]:
    """The same, but of half the size in the last quarter. Few pieces stay few: they end together anyway."""
    if cells_bytes(cells) <= 4 * piece_bytes:
        return in_pieces(cells, piece_bytes, gap_bytes)
    tail = _last_quarter([part for _, parts in cells for part in parts])
    head_cells = [(run, [part for part in parts if part.chunk < tail]) for run, parts in cells]
    tail_cells = [(run, [part for part in parts if part.chunk >= tail]) for run, parts in cells]
    return in_pieces(head_cells, piece_bytes, gap_bytes) + in_pieces(tail_cells, max(1, piece_bytes // 2), gap_bytes)


def one_by_one(run: Run, parts: Sequence[Part]) -> list[Piece]:
    """Each cell for itself."""
    return [piece for part in parts for piece in _cut(run, [part], 1, 0)]


def shares(piece: Piece, tasks: int) -> list[Sequence[Part]]:
    """The cells of a piece in so many about equal tasks."""
    n = len(piece.parts)
    return [piece.parts[n * i // tasks : n * (i + 1) // tasks] for i in range(tasks)]


def _last_quarter(parts: Sequence[Part]) -> int:
    """The chunk with which the last quarter of the parts' bytes begins."""
    left = sum(part.cell.length for part in parts) // 4
    for part in sorted(parts, key=lambda part: -part.chunk):
        left -= part.cell.length
        if left < 0:
            return part.chunk + 1
    return 0


def _cut(run: Run, parts: Sequence[Part], piece_bytes: int, gap_bytes: int) -> Iterator[Piece]:
    places = [(part.cell.offset, part.cell.length) for part in parts]
    for span in spans(places, most_bytes=piece_bytes, gap_bytes=gap_bytes) if places else ():
        chosen = tuple(parts[span.first : span.stop])
        yield Piece(chosen, run.spec, run.codec, run.cell_bytes, span.start, span.n_bytes)
