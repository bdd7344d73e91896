"""Cells that one load fetches and others want: what is handed on, and how those who wait are told.

    who fetches ─ land(cells, outcome) ─▶ `told` of each load that waits: here and now, in memory of who fetched it
    who ends    ─ give_up() ───────────▶ `told` that it is given up: by another thread, for a load may end in anybody's

What goes wrong with telling one load is that one's affair. Raises nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from lmcache_s3.coded import Coded
from lmcache_s3.errors import LMCacheS3Error
from lmcache_s3.handle import Work
from lmcache_s3.in_flight import InFlight
from lmcache_s3.loading import Part, Run
from lmcache_s3.reading import Step
from lmcache_s3.tracebacks import with_note
from lmcache_s3.types import Buffer


class Fetched(NamedTuple):
    """A good cell: its stored bytes, and what they decode to (or are to, by a sink); None where nobody wants that."""

    data: Buffer
    decoded: np.ndarray | Coded | None


Outcome: TypeAlias = Fetched | LMCacheS3Error | None
"""Of fetching a cell; None: given up."""


class WaitingLoad(Protocol):
    """A load as seen by whoever fetches for it."""

    work: Work[Any]

    def told(self, waiting: Sequence[Waiting], outcome: Outcome) -> None:
        """What became of cells that it waits for; a cell is to be looked at only during the call. May raise anything,
        which ends its work."""


@dataclass(slots=True, eq=False)
class Waiting:
    """A part that another load fetches. again: after the store failed one who did."""

    load: WaitingLoad
    run: Run
    part: Part
    again: bool


def cell_of(part: Part) -> Hashable:
    """What must be equal for one load to take what another fetched: where it lies, and what it should be."""
    return part.cell, part.position


class Sharing:
    """What the loads of a transfer fetch for one another. Thread-safe. owner: whatever identifies who fetches.

    step: as the transfer's. workers: threads in which others begin again what was given up.
    """

    def __init__(self, step: Step, workers: ThreadPoolExecutor) -> None:
        self.in_flight: InFlight[Waiting] = InFlight()
        self._step, self._workers = step, workers

    def fetch_or_wait(self, owner: Hashable, waiting: Waiting, *, prefetch: bool) -> bool:
        """True: the cell is the caller's to fetch, who then owes `land` or `give_up`. False: it will be `told`."""
        return self.in_flight.fetch_or_wait(owner, cell_of(waiting.part), waiting, prefetch=prefetch)

    def for_loads(self, parts: Sequence[Part]) -> bool:
        """Whether all of these are being fetched for loads now."""
        return self.in_flight.for_loads([cell_of(part) for part in parts])

    def land(self, owner: Hashable, parts: Sequence[Part], outcome: Outcome, *, prefetch: bool) -> None:
        """What became of cells that this owner had to fetch. Cells are handed on before this returns."""
        landed = self.in_flight.landed
        waiting = [one for part in parts for one in landed(owner, cell_of(part), prefetch=prefetch)]
        if waiting:
            self._tell(waiting, outcome)

    def give_up(self, owner: Hashable) -> None:
        """Nothing is fetched for this owner any more."""
        waiting = self.in_flight.gave_up(owner)
        if waiting:
            self._step(lambda: self._workers.submit(self._tell, waiting, None), None)

    def _tell(self, waiting: Sequence[Waiting], outcome: Outcome) -> None:
        """One load right after the other, so that of those who begin again one fetches and the others wait."""
        by_load: dict[WaitingLoad, list[Waiting]] = {}
        for one in waiting:
            by_load.setdefault(one.load, []).append(one)
        for load, some in by_load.items():
            self._step(functools.partial(_at_once, load.told, some, outcome), load.work)


def _at_once(call: Callable[..., None], *arguments: object) -> Future[None]:
    future: Future[None] = Future()
    try:
        call(*arguments)
    except BaseException as e:  # noqa: BLE001 - another load's affair, and handed to it
        future.set_exception(with_note(e))
    else:
        future.set_result(None)
    return future
