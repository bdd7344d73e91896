"""Prompts that grow, in a trace: what a chat's turns and its answers add, and the PUTs that storing them takes.

A request continues the one before it if it begins with all of that but its last two chunks. Its answer is taken to be
kept as it is decoded. Lengths decide how many chunks there are: hashes of a trace's answers are not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmcache_s3.replay.trace import Trace
from lmcache_s3.write_behind import WriteBehind

_DECODE_S = 0.02
"""A token's, as servers do under load."""
_TICK_S = 1.0
"""Commits of a second share a version."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Chunks that are new at one moment. parent: the chunk before the first."""

    time_s: float
    parent: bytes
    hashes: list[bytes]


@dataclass(frozen=True, slots=True)
class Puts:
    """Of an extent two: its shard and its zarr.json. peak_chunks: that rest at once."""

    extents: int
    versions: int
    peak_chunks: int

    @property
    def total(self) -> int:
        return 2 * self.extents + self.versions


@dataclass(frozen=True, slots=True)
class _Turns:
    """previous: of each request the one it continues, or -1. matched: its leading chunks known before."""

    previous: list[int]
    matched: list[int]

    def of_several(self) -> list[bool]:
        out = [before >= 0 for before in self.previous]
        for before in self.previous:
            if before >= 0:
                out[before] = True
        return out


def turns(trace: Trace) -> _Turns:
    last: dict[int, int] = {}
    previous, matched = [], []
    for number, use in enumerate(trace.uses):
        n = next((i for i, chunk in enumerate(use.chunks) if chunk not in last), len(use.chunks))
        before = last[use.chunks[n - 1]] if n > 1 else -1
        continues = before >= 0 and n >= len(trace.uses[before].chunks) - 2
        previous.append(before if continues else -1)
        matched.append(n)
        last.update(dict.fromkeys(use.chunks, number))
    return _Turns(previous, matched)


def growth(trace: Trace, chunk_tokens: int = 256) -> tuple[list[Growth], int]:
    """What prompts of several turns add, by time; and the tokens of all those prompts."""
    found = turns(trace)
    several = found.of_several()
    ends: dict[int, list[bytes]] = {}
    out: list[Growth] = []
    tokens = 0
    for number, use in enumerate(trace.uses):
        if not several[number]:
            continue
        tokens += use.input_tokens
        before = found.previous[number]
        if before >= 0:
            stored = ends[before]
        else:
            shared = found.matched[number] * trace.chunk_tokens // chunk_tokens
            stored = [b"%d/%d" % (use.chunks[i * chunk_tokens // trace.chunk_tokens], i) for i in range(shared)]
        n_prompt = use.input_tokens // chunk_tokens
        n_all = (use.input_tokens + use.output_tokens) // chunk_tokens
        stored = stored[:n_prompt]
        for n, time_s in ((n_prompt, use.time_s), (n_all, use.time_s + _DECODE_S * use.output_tokens)):
            new = [b"r%d/%d" % (number, i) for i in range(len(stored), n)]
            if new:
                out.append(Growth(time_s, stored[-1] if stored else b"root", new))
                stored = stored + new
        ends[number] = stored
    return sorted(out, key=lambda one: one.time_s), tokens


def puts_at_once(grown: Sequence[Growth], extent_chunks: int) -> Puts:
    """Each addition goes up as it comes."""
    extents = sum(-(-len(one.hashes) // extent_chunks) for one in grown)
    return Puts(extents, len({int(one.time_s / _TICK_S) for one in grown}), 0)


def puts_behind(grown: Sequence[Growth], extent_chunks: int, age_s: float) -> Puts:
    """They rest first, as `WriteBehind` says."""
    plan = WriteBehind(extent_bytes=extent_chunks, age_s=age_s, max_bytes=1 << 62)  # a chunk is a byte
    extents = versions = peak = tick = 0
    for one in grown:
        while (tick + 1) * _TICK_S <= one.time_s:
            tick += 1
            due = plan.due(tick * _TICK_S)
            extents, versions = extents + len(due), versions + bool(due)
        plan.add(one.parent, one.hashes, len(one.hashes), one.time_s)
        peak = max(peak, plan.n_bytes)
    due = plan.flush()
    return Puts(extents + len(due), versions + bool(due), peak)
