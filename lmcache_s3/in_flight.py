"""Which cells are on their way from the bucket, for which load, and which others wait for them: each is fetched once.

    load A ─ fetch_or_wait(cell) ─▶ True:  A fetches it ───────────────▶ landed(cell) ─▶ whoever waits: A hands it over
    load B ─ fetch_or_wait(cell) ─▶ False: B holds nothing and waits        └ gave_up() ─▶ whoever waits begins again

Who waits holds neither memory, nor a thread, nor a slot, so nobody can be kept from fetching by those who wait for it.
A load does not wait for a prefetch, which all loads go before; a prefetch waits for either.
Invariant: a cell is fetched for at most one load and one prefetch at a time; each `waiting` that was not to fetch
comes back once, from `landed` or `gave_up`, if each owner calls the latter in the end. Raises nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

W = TypeVar("W")


class InFlight(Generic[W]):
    """The cells that are in flight for all loads of a transfer. `W`: what is kept for who waits. Thread-safe.

    cell: whatever identifies what is fetched. owner: whatever identifies who fetches.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[tuple[Hashable, bool], tuple[Hashable, list[W]]] = {}
        """By (cell, for a prefetch): owner, who waits."""
        self._cells: dict[Hashable, dict[tuple[Hashable, bool], None]] = {}
        """By owner: what is in flight for it, in order."""

    def __len__(self) -> int:
        with self._lock:
            return len(self._flights)

    def fetch_or_wait(self, owner: Hashable, cell: Hashable, waiting: W, *, prefetch: bool) -> bool:
        """True: the cell is the caller's to fetch, who then owes `landed` or `gave_up`. False: somebody else fetches
        it, and `waiting` was noted there."""
        with self._lock:
            flight = self._flights.get((cell, False))
            if flight is None and prefetch:
                flight = self._flights.get((cell, True))
            if flight is not None:
                flight[1].append(waiting)
                return False
            self._flights[cell, prefetch] = (owner, [])
            self._cells.setdefault(owner, {})[cell, prefetch] = None
            return True

    def for_loads(self, cells: Sequence[Hashable]) -> bool:
        """Whether all of these are being fetched for loads now."""
        with self._lock:
            return all((cell, False) in self._flights for cell in cells)

    def landed(self, owner: Hashable, cell: Hashable, *, prefetch: bool) -> list[W]:
        """The cell is there, or cannot be had: who waited for it. Nobody, if it is not in flight for this owner."""
        with self._lock:
            return self._end(owner, (cell, prefetch))

    def gave_up(self, owner: Hashable) -> list[W]:
        """Nothing is fetched for this owner any more: who waited for what was."""
        with self._lock:
            return [one for key in list(self._cells.get(owner, ())) for one in self._end(owner, key)]

    def _end(self, owner: Hashable, key: tuple[Hashable, bool]) -> list[W]:
        """With the lock."""
        flight = self._flights.get(key)
        if flight is None or flight[0] != owner:
            return []
        del self._flights[key]
        cells = self._cells[owner]
        del cells[key]
        if not cells:
            del self._cells[owner]
        return flight[1]
