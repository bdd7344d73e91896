"""Which bytes of an object to ask for at once, given where the wanted cells lie in it.

Neighbours are read together up to a size; a gap is read through where that is cheaper than another request; what is
larger than a request should be is read by several at once. Pure. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Cells `first` … `stop` − 1 of those asked about, and the object's bytes that hold them: n_bytes from start on."""

    first: int
    stop: int
    start: int
    n_bytes: int


def spans(places: Sequence[tuple[int, int]], *, most_bytes: int, gap_bytes: int) -> Iterator[Span]:
    """Cut the cells at `places` (offset, length; rising, apart) of one object into reads of at most `most_bytes`.

    A single cell may be more. Gaps up to `gap_bytes` are read through.
    """
    first = 0
    for i in range(1, len(places) + 1):
        if i < len(places):
            end = sum(places[i - 1])
            offset, length = places[i]
            if offset - end <= gap_bytes and offset + length - places[first][0] <= most_bytes:
                continue
        start = places[first][0]
        yield Span(first, i, start, sum(places[i - 1]) - start)
        first = i


def parts(n_bytes: int, most_bytes: int) -> list[range]:
    """As few, equal ranges as cover 0 … n_bytes with about `most_bytes` each (an eighth more at most): requests made
    side by side."""
    n = max(1, -(-n_bytes // (most_bytes + most_bytes // 8)))
    return [range(n_bytes * i // n, n_bytes * (i + 1) // n) for i in range(n)]
