"""Uses of prompts as a policy sees them: what kind each is, and whether and when what was used came back.

A *visit* is one use of a stretch of a prompt. The chunks that a next turn finds again belong together and come back
together, so outcomes are learned by visit. A visit outlives its chunks: a few of its keys, the *witnesses*, are
remembered when the chunks are gone, so that a chat that comes back after its KV was evicted (or refused) is recognised,
and what would have been a reuse is learned from. Memory: at most eight witnesses a visit, and a bounded number in all;
a visit of which all came back, and that holds no chunk, is dropped when it comes to its next age.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Sequence

from lmcache_s3.tiers.eviction.base import Item
from lmcache_s3.tiers.eviction.reuse import AGES_S, BINS, ReuseTable

_LENGTHS_TOKENS = (2048, 4096, 10_240)
_TURNS = (3, 4, 6)
_SHARERS = (2, 8)
FIRST_MATCHED = len(_LENGTHS_TOKENS) + 1
"""A first turn that has more in common with an earlier prompt than a short beginning."""
GROWN = FIRST_MATCHED + 1
"""A later turn that adds much."""
TURN = GROWN + 1
SHARED = TURN + len(_TURNS) + 1
"""The beginning that several prompts have in common, by how many."""
PASSED = SHARED + len(_SHARERS) + 1
"""What a next turn left behind."""
KINDS = PASSED + 1

_SHORT_TOKENS = 1024
_MUCH_TOKENS = 2048
_WITNESSES = 8
_MIN_WITNESSES = 65_536
_SAME_USE_S = 1.0
"""A tier reads a prompt and is offered it again right away: one use."""


class Visit:
    """One use of a stretch of a prompt.

    turn: how many-th of its conversation. grown_tokens: what this turn added. end_tokens: depth of its last chunk.
    sharers: prompts, other than later turns, that came by here. bin: of its age. keys, held, placed: the policy's:
    chunks whose last visit this was (some are gone), how many of them are held, and whether it lies in a bucket.
    """

    __slots__ = (
        *("kind", "bin", "born_s", "turn", "grown_tokens", "end_tokens", "sharers"),
        *("keys", "held", "placed", "_witnesses", "_each", "_left", "_counted_s"),
    )

    def __init__(self, kind: int, born_s: float, items: Sequence[Item], turn: int, grown: int, sharers: int) -> None:
        self.kind, self.born_s, self.turn, self.grown_tokens, self.sharers = kind, born_s, turn, grown, sharers
        self.bin = 0
        self.end_tokens = items[-1].depth_tokens
        self.keys: list[Hashable] = []
        self.held = 0
        self.placed = False
        n = len(items)
        few = range(n) if n <= _WITNESSES else [i * (n - 2) // (_WITNESSES - 2) for i in range(_WITNESSES - 2)]
        self._witnesses = [items[i].key for i in few] + ([] if n <= _WITNESSES else [items[-2].key, items[-1].key])
        self._each = n / len(self._witnesses)
        self._left = float(n)
        self._counted_s = 0.0


class Visits:
    """All visits within memory. moved: called before and after a visit's kind or bin changes, (visit, False|True)."""

    def __init__(self, moved: Callable[[Visit, bool], None]) -> None:
        self.table = ReuseTable(KINDS, SHARED)
        self._moved = moved
        self._witnesses: dict[Hashable, Visit] = {}
        self._by_bin: list[deque[Visit]] = [deque() for _ in range(BINS)]
        self._step_tokens = 256

    def use(
        self, items: Sequence[Item], now_s: float, visit_of: Callable[[Hashable], Visit | None], held: int
    ) -> list[tuple[Visit, Sequence[Item]]]:
        """A prompt's chunks were used; its stretches, each with its new visit; none if it is the last use again.

        visit_of: of a chunk that is held. held: how many are.
        """
        if len(items) > 1:
            self._step_tokens = items[1].depth_tokens - items[0].depth_tokens
        known = [visit_of(item.key) or self._witnesses.get(item.key) for item in items]
        matched = next((i + 1 for i in range(len(known) - 1, -1, -1) if known[i] is not None), 0)
        before = known[matched - 1] if matched else None
        if before is not None and matched == len(items) and now_s - before.born_s < _SAME_USE_S:
            return []
        joined = None
        if before is None and items[0].parent is not None:
            joined = visit_of(items[0].parent) or self._witnesses.get(items[0].parent)
        for item in items:
            self._came_back(item.key, now_s)
        parts = self._stretches(items, known, matched, joined, now_s)
        for visit, _ in parts:
            for key in visit._witnesses:
                self._witnesses[key] = visit
            self._by_bin[0].append(visit)
        self._bound(_MIN_WITNESSES + held)
        return parts

    def age(self, now_s: float) -> None:
        """Move visits on to the bins of their ages."""
        for bin_, visits in enumerate(self._by_bin):
            end_s = AGES_S[bin_ + 1]
            while visits and now_s - visits[0].born_s >= end_s:
                visit = visits.popleft()
                self._count(visit, end_s)
                if bin_ + 1 == BINS:
                    self._forget(visit)
                    continue
                self._moved(visit, False)
                if not visit.held and visit._left < visit._each / 2:  # all of it was used since
                    visit.bin = BINS - 1
                    self._moved(visit, True)
                    continue
                visit.bin = bin_ + 1
                self._moved(visit, True)
                self._by_bin[bin_ + 1].append(visit)

    def learned(self, now_s: float) -> ReuseTable:
        """The table with all that is known by now: also of visits that wait still. A pass over all of them."""
        for visits in self._by_bin:
            for visit in visits:
                self._count(visit, now_s - visit.born_s)
        self.table.forget()
        return self.table

    def follow(self, visit: Visit) -> None:
        """It grows older like those that `use` made. born_s: now."""
        self._by_bin[0].append(visit)

    def __len__(self) -> int:
        return sum(map(len, self._by_bin))

    def _stretches(
        self, items: Sequence[Item], known: list[Visit | None], matched: int, joined: Visit | None, now_s: float
    ) -> list[tuple[Visit, Sequence[Item]]]:
        before = known[matched - 1] if matched else None
        turn, grown, continues = 1, 0, False
        matched_tokens = matched * self._step_tokens
        if joined is not None:  # what was read is now stored on: one turn, in two calls
            turn, matched_tokens = joined.turn, items[0].depth_tokens
            grown = joined.grown_tokens + len(items) * self._step_tokens if turn > 1 else 0
        elif before is not None:
            left_tokens = before.end_tokens - items[matched - 1].depth_tokens
            continues = left_tokens <= 2 * self._step_tokens and matched > 1
            if continues:
                turn = before.turn + 1
                grown = items[-1].depth_tokens - before.end_tokens
                self._rekind(before, PASSED, now_s)  # what the next turn did not take along
        own_kind = _kind(turn, grown, items[-1].depth_tokens, matched_tokens)
        if joined is not None:
            self._rekind(joined, own_kind, now_s)
        sharers = self._sharers(known, matched, other=not continues)
        parts: list[tuple[Visit, Sequence[Item]]] = []
        start = 0
        while start < len(items):
            level = _level(sharers[start])
            stop = start + 1
            while stop < len(items) and _level(sharers[stop]) == level:
                stop += 1
            kind = SHARED + level - 1 if level else own_kind
            part = items[start:stop]
            parts.append((Visit(kind, now_s, part, turn, grown, sharers[stop - 1]), part))
            start = stop
        return parts

    @staticmethod
    def _sharers(known: list[Visit | None], matched: int, *, other: bool) -> list[int]:
        """Of each chunk; never more than of the one before."""
        out = [0] * len(known)
        most = 0
        for i in range(matched - 1, -1, -1):
            visit = known[i]
            if visit is not None:
                most = max(most, visit.sharers)
            out[i] = most + other
        return out

    def _came_back(self, key: Hashable, now_s: float) -> None:
        visit = self._witnesses.pop(key, None)
        if visit is None:
            return
        age_s = now_s - visit.born_s
        self._count(visit, age_s)
        visit._left -= visit._each
        self.table.reuses[visit.kind, bisect_right(AGES_S, age_s) - 1] += visit._each

    def _count(self, visit: Visit, age_s: float) -> None:
        self.table.exposure_s[visit.kind, visit.bin] += visit._left * (age_s - visit._counted_s)
        visit._counted_s = age_s

    def _rekind(self, visit: Visit, kind: int, now_s: float) -> None:
        if visit.kind >= SHARED:
            return
        self._count(visit, now_s - visit.born_s)
        self._moved(visit, False)
        visit.kind = kind
        self._moved(visit, True)

    def _bound(self, most: int) -> None:
        """Forget the oldest visits' witnesses."""
        for visits in reversed(self._by_bin):
            while visits and len(self._witnesses) > most:
                visit = visits.popleft()
                self._forget(visit)
                self._moved(visit, False)
                visit.bin = BINS - 1  # it ages no more; as old as can be
                self._moved(visit, True)

    def _forget(self, visit: Visit) -> None:
        visit._left = 0.0  # nothing is learned of it any more
        for key in visit._witnesses:
            if self._witnesses.get(key) is visit:
                del self._witnesses[key]


def _level(sharers: int) -> int:
    return 0 if sharers == 0 else 1 + bisect_right(_SHARERS, sharers)


def _kind(turn: int, grown_tokens: int, length_tokens: int, matched_tokens: int) -> int:
    if turn > 1:
        return GROWN if grown_tokens >= _MUCH_TOKENS else TURN + bisect_right(_TURNS, turn)
    if matched_tokens >= _SHORT_TOKENS:
        return FIRST_MATCHED
    return bisect_right(_LENGTHS_TOKENS, length_tokens)
