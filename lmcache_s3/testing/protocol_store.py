"""The store of the protocol's model: what versions add up to, what they say of an extent, and what a request does.

Raises `Violation` when a request itself breaks an invariant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from lmcache_s3.testing.protocol_configs import Config
from lmcache_s3.testing.protocol_values import (
    AUTHORS,
    COVERED,
    LIVE,
    MILESTONE,
    REBUILD,
    VOID,
    Extent,
    Request,
    State,
    Truth,
    Version,
    Violation,
    bits,
)


@dataclass(slots=True)
class Store:
    """The store under one configuration, with one rule of the protocol broken (`bug`) or none."""

    config: Config
    bug: str | None = None
    names: list[Extent] = field(default_factory=list)
    versions: list[Version] = field(default_factory=lambda: [Version()])
    _ids: dict[Extent | Version, int] = field(default_factory=dict)
    _chunks: list[int] = field(default_factory=list)
    _truths: dict[tuple[int, ...], Truth] = field(default_factory=dict)
    _judged: dict[tuple[tuple[int, ...], int], frozenset[str]] = field(default_factory=dict)

    # ---- values: what `manifest.py` computes -------------------------------------------------------------------------

    def name(self, extent: Extent) -> int:
        if extent not in self._ids:
            self._ids[extent] = len(self.names)
            self.names.append(extent)
            self._chunks.append(sum(1 << (ord(chunk) - ord("a")) for chunk in extent.chunks))
        return self._ids[extent]

    def version(self, version: Version) -> int:
        if version not in self._ids:
            self._ids[version] = len(self.versions)
            self.versions.append(version)
        return self._ids[version]

    def truth(self, hist: tuple[int, ...]) -> Truth:
        found = self._truths.get(hist)
        if found is None:
            found = self._truths[hist] = (
                self._apply(self.truth(hist[:-1]), self.versions[hist[-1]]) if hist else Truth(0, 0, 0, 0, 0)
            )
        return found

    def _apply(self, st: Truth, v: Version) -> Truth:
        if v.rebuilt == 2:
            return st
        if v.rebuilt:
            return Truth(v.add, v.floor, 0, self._union(v.add), st.ever | v.add)
        fresh = 0
        for e in bits(v.add):
            if self.names[e].born >= st.floor or self.bug in ("no_void_rule", "same_name"):
                fresh |= 1 << e
        if self.bug == "access_revives":
            fresh |= v.access & st.ever
        live = (st.live | fresh) & ~v.remove
        lead = st.lead if v.lead == 0 else max(0, v.lead)
        return Truth(live, max(st.floor, v.floor), lead, self._union(live), st.ever | fresh)

    def _union(self, live: int) -> int:
        chunks = 0
        for e in bits(live):
            chunks |= self._chunks[e]
        return chunks

    def judged(self, st: Truth, e: int) -> str | None:
        """What the state says of an extent; None: nothing yet, it may be added."""
        if st.live >> e & 1:
            return LIVE
        if self.names[e].born < st.floor and self.bug not in ("no_void_rule", "same_name"):
            return VOID
        return None if self._chunks[e] & ~st.chunks else COVERED

    def fence(self, n: int) -> int:
        return (n // MILESTONE + self.config.ahead) * MILESTONE

    def unjudged(self, st: Truth, extents: int) -> int:
        """What of it must be added; of extents that cover each other only the first."""
        fresh, chunks = 0, st.chunks
        for e in bits(extents):
            if self.judged(st, e) is None and self._chunks[e] & ~chunks:
                fresh |= 1 << e
                chunks |= self._chunks[e]
        return fresh

    def verdicts(self, hist: tuple[int, ...], e: int) -> frozenset[str]:
        """Every verdict that some prefix of the history gives."""
        found = self._judged.get((hist, e))
        if found is None:
            verdict = self.judged(self.truth(hist), e)
            found = self.verdicts(hist[:-1], e) if hist else frozenset()
            if verdict is not None:
                found |= {verdict}
            self._judged[hist, e] = found
        return found

    def deletable(self, st: Truth, e: int) -> bool:
        """Once true, true for ever: an add of an extent born below the floor is void."""
        if st.live >> e & 1:
            return False
        if self.bug == "sweep_by_age":  # any age limit: a stalled writer is older
            return True
        if self.bug == "same_name":  # a name without birth: all one can ask is whether it was removed
            return bool(st.ever >> e & 1)
        return self.names[e].born < st.floor

    # ---- the store ---------------------------------------------------------------------------------------------------

    def effect(self, s: State, request: Request) -> tuple[State, bool]:
        """Carry out one request; the flag is put-if-absent's answer."""
        kind, key, contents = request
        if kind == "create":
            if s.log[key] and self.bug != "plain_put":
                return s, False
            log, hist = (*s.log[:key], contents, *s.log[key + 1 :]), s.hist
            if key > len(hist) + 1 and not (self.versions[contents] == Version() and key % MILESTONE == 0):
                raise Violation(f"I7 a gap in the history: {key} created after {len(hist)}")
            if key == len(hist) + 1:
                hist = (*hist, contents)
                while len(hist) + 1 < len(log) and log[len(hist) + 1]:  # milestones of a rebuild that crashed
                    hist = (*hist, log[len(hist) + 1])
            return s._replace(log=log, hist=hist), True
        if kind == "del-log":
            return s._replace(log=(*s.log[:key], 0, *s.log[key + 1 :])), True
        bit = 1 << key
        if kind == "put":
            return s._replace(objs=s.objs | bit), True
        if kind == "del-obj":
            return s._replace(objs=s.objs & ~bit), True
        if kind == "inbox":
            return s._replace(inbox=s.inbox | bit), True
        if kind == "del-inbox":
            if not self.verdicts(s.hist, key):
                raise Violation(f"I6 inbox object of {self.names[key]} deleted, the history never judged it")
            return s._replace(inbox=s.inbox & ~bit), True
        if kind == "segment":
            return s._replace(segments=s.segments | bit), True
        if kind == "del-segment":
            return s._replace(segments=s.segments & ~bit), True
        if kind == "index":
            return self._put_index(s, key, contents), True
        return s._replace(indexes=s.indexes & ~bit), True

    def _put_index(self, s: State, key: int, contents: int) -> State:
        """A rebuild's checkpoint is where the history goes on: the numbers passed over belong to nobody."""
        version = key // AUTHORS
        if key % AUTHORS == REBUILD and s.hist[version - 1 : version] != (contents,):
            if version <= len(s.hist):
                raise Violation(f"I7 rebuild makes version {version}, which was in the history")
            passed = self.version(Version(rebuilt=2))
            hist = (*s.hist, *(passed for _ in range(version - 1 - len(s.hist))), contents)
            lost = self.truth(s.hist).live & ~self.versions[contents].add
            if lost:
                raise Violation(f"I2 rebuild forgets {[self.names[e] for e in bits(lost)]}")
            while len(hist) + 1 < len(s.log) and s.log[len(hist) + 1]:
                hist = (*hist, s.log[len(hist) + 1])
            s = s._replace(hist=hist)
        return s._replace(indexes=s.indexes | 1 << key)

    def send(self, s: State, request: Request) -> Iterator[tuple[State, str]]:
        """Every fate of a request: done and answered; create without answer (done, lost or late); done and repeated."""
        done, won = self.effect(s, request)
        conditional = request[0] == "create"
        yield done, "won" if won else "lost"
        if conditional and self.config.lost:
            yield done, "unknown"
            if done is not s:
                yield s, "unknown"
        budget, air = s.late
        if budget and request[0] in self.config.kinds:
            late = (budget - 1, air | {request})
            if conditional:
                yield s._replace(late=late), "unknown"
            yield done._replace(late=late), "won" if won else "lost"

    def _named(self, mask: int) -> Iterator[str]:
        for e in bits(mask):
            extent = self.names[e]
            yield f"{extent.chunks}#{extent.writer}.{extent.number}@{extent.born}"
