"""How the index of a space is doing: how busy, who leads, what waits in the inbox, and what all that costs a day.

Reads only: the index, the newest versions, the inbox's listing. Rates are of the last hour, or of the newest versions
if these took less. Raises what opening the index raises.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from lmcache_s3.analysis.catalog import tending
from lmcache_s3.errors import Unusable
from lmcache_s3.identity import Space
from lmcache_s3.index.delta import Delta
from lmcache_s3.index.history import entries, list_versions
from lmcache_s3.index.inbox import LEAD_ABOVE_PER_S
from lmcache_s3.index.manifest import checkpoints_prefix, inbox_prefix, parse_checkpoint_key
from lmcache_s3.tiers.stores.base import ObjectStore

NEWEST = 256
"""Versions looked at."""
WINDOW_S = 3600.0
MAX_INBOX = 10_000
_STALE_S = 30.0
"""A hand-over is merged in a second, and committed by its writer after ten."""
DOLLARS_PER_PUT = 5e-6
DOLLARS_PER_LIST = 5e-6
DOLLARS_PER_GET = 0.4e-6
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Pulse:
    """Of one space.

    idle_s: since the newest version; None: there is none. behind: versions that an engine reads which opens now, after
    the newest checkpoint. writers: processes that made versions in the window (a leader makes them for many).
    versions_per_s, extents_per_s: made and added in the window. inbox: hand-overs waiting; inbox_age_s: the oldest's.
    write_dollars_per_day: of all commits together, without those that were lost. read_dollars_per_day: of each engine.
    hints: what to look at.
    """

    space: str
    model: str
    version: int
    floor: int
    lead: str | None
    extents: int
    chunks: int
    idle_s: float | None
    behind: int
    writers: int
    versions_per_s: float
    extents_per_s: float
    inbox: int
    inbox_age_s: float
    write_dollars_per_day: float
    read_dollars_per_day: float
    hints: tuple[str, ...]


def pulse(
    store: ObjectStore,
    space: Space,
    now_s: float,
    *,
    poll_s: float = 2.0,
    merge_s: float = 1.0,
    readers: Executor | None = None,
) -> Pulse:
    """now_s: Unix seconds, near the store's clock. poll_s, merge_s: as the engines have them."""
    log = tending(store, space, readers)
    state = log.state
    after = max(0, state.version - NEWEST)
    versions = list_versions(store, space.id, after=after, upto=state.version)
    times_s = versions.times_s
    window_s = WINDOW_S if after == 0 or not len(times_s) else min(WINDOW_S, max(1.0, now_s - float(times_s[0])))
    recent = versions.numbers[times_s >= now_s - window_s]
    found = [e.delta for e in entries(store, space.id, versions, readers=readers) if e.version in set(recent.tolist())]
    deltas = [delta for delta in found if delta is not None]
    waiting = [info.modified_s for info in store.list(inbox_prefix(space.id), limit=MAX_INBOX)]
    versions_per_s = len(recent) / window_s
    extents_per_s = sum(len(delta.add) for delta in deltas) / window_s
    inbox_age_s = max(0.0, now_s - min(waiting)) if waiting else 0.0
    writers = len({delta.writer for delta in deltas})
    return Pulse(
        space=space.id,
        model=space.model,
        version=state.version,
        floor=state.floor,
        lead=state.lead,
        extents=state.n_extents,
        chunks=state.n_chunks,
        idle_s=max(0.0, now_s - float(times_s[-1])) if len(times_s) else None,
        behind=state.version - _newest_checkpoint(store, space.id),
        writers=writers,
        versions_per_s=versions_per_s,
        extents_per_s=extents_per_s,
        inbox=len(waiting),
        inbox_age_s=inbox_age_s,
        write_dollars_per_day=_write_dollars(state.lead, versions_per_s, deltas, window_s, merge_s),
        read_dollars_per_day=_read_dollars(versions_per_s, poll_s),
        hints=tuple(_hints(state.lead, versions_per_s, writers, len(waiting), inbox_age_s)),
    )


def _newest_checkpoint(store: ObjectStore, space_id: str) -> int:
    for info in store.list(checkpoints_prefix(space_id)):
        try:
            return parse_checkpoint_key(info.key)[0]
        except Unusable:
            continue
    return 0


def _write_dollars(
    lead: str | None, versions_per_s: float, deltas: list[Delta], window_s: float, merge_s: float
) -> float:
    """A create and two GETs a version; under a leader a LIST a round, and a PUT and a GET an extent handed over."""
    per_s = versions_per_s * (DOLLARS_PER_PUT + 2 * DOLLARS_PER_GET)
    if lead is not None:
        handed_per_s = sum(len(delta.add) for delta in deltas if delta.writer == lead) / window_s
        per_s += DOLLARS_PER_LIST / merge_s + handed_per_s * (DOLLARS_PER_PUT + DOLLARS_PER_GET)
    return per_s * _DAY_S


def _read_dollars(versions_per_s: float, poll_s: float) -> float:
    """A GET a poll and a version, and one for the fence at each poll that finds something."""
    polls_per_s = 1 / poll_s
    finding_per_s = polls_per_s * (1 - float(np.exp(-versions_per_s * poll_s)))
    return (polls_per_s + versions_per_s + finding_per_s) * DOLLARS_PER_GET * _DAY_S


def _hints(lead: str | None, versions_per_s: float, writers: int, inbox: int, inbox_age_s: float) -> list[str]:
    hints = []
    if inbox and inbox_age_s > _STALE_S:
        hints.append(
            f"{inbox} hand-overs wait, the oldest for {inbox_age_s:.0f} s: their writers or the leader died; the next "
            "engine that stores, or gc, merges them"
        )
    if lead is None and versions_per_s > LEAD_ABOVE_PER_S:
        hints.append(
            f"{writers} writers contend at {versions_per_s:.1f} versions/s: one of them becomes the leader within "
            "10 s, unless they run an older package"
        )
    return hints
