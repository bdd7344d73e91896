"""Exhaustive explicit-state model of the manifest protocol (FORMAT.md §4, §5). Standard library only.

    python -m lmcache_s3.testing.protocol_model                   every configuration, then every mutant
    python -m lmcache_s3.testing.protocol_model check [NAME]      the configurations only, or one
    python -m lmcache_s3.testing.protocol_model mutants [NAME]    each mutant must be caught (NAME: print its trace)

Explored breadth first: every interleaving of the processes' requests to the store, so a counterexample is a shortest
one. A process may stand still for ever, or for any while, before any request: that is a crash, or a stall. There is no
clock, so nothing that holds here rests on one: time-outs fire at any moment. A create may lose its answer, done or
not; the requests a configuration names take effect late, or once more, at any later time (`late`, a budget). Policy is
left open: GC removes any extent and raises the floor to any version, a leader takes the lead and steps down at whim.

Smaller than life: a milestone each 2 versions (4,096), the fence is the first milestone above, mostly (the second), an
extent is one object and holds chunks named by letters, a checkpoint is a segment and its index. LIST is atomic; GET of
the fence and loading the checkpoint are one step (opening is two). Steps without a request join the one before.

Invariants
  I1 prefix      a replica's confirmed state is a prefix of the history
  I2 ack         what a writer is told (live, covered, void) the history says, or said
  I3 durable     every object named by the state of the whole history exists
  I4 contents    a name never gets other contents: by construction, names carry the writer and a number
  I5 openable    the newest checkpoint is whole, and every version after it can be read
  I6 hand-over   an inbox object is deleted only when the history has judged its extent
  I7 history     a version number is genuinely created once, without gaps
  I8 progress    when nobody can step, every writer has its answer, every reader the whole history, and no hand-over
                 lies in the inbox of a fleet with a collector

Raises `Violation`, naming the invariant.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

MILESTONE = 2
_AUTHORS = 8
"""Authors of checkpoints; the last is rebuild."""
_REBUILD = _AUTHORS - 1
_NOBODY = -1
_UNNAMED = ("gc", "accessor", "reader")

LIVE, VOID, COVERED = "live", "void", "covered"


class Config(NamedTuple):
    """What takes part. Extents are strings of chunks: "ab" covers "a"."""

    versions: int = 4
    """Longest history explored (before a rebuild)."""
    writers: tuple[tuple[str, ...], ...] = ()
    """For each writer, the extents it stores one after another."""
    handover: bool = False
    """Writers put extents into the inbox while their replica names a leader."""
    polls: bool = False
    """Writers may follow the log before they name an extent."""
    leaders: tuple[int, ...] = ()
    """For each leader, how often it may take the lead."""
    gcs: tuple[int, ...] = ()
    """For each collector, how many commits it may make."""
    merges: bool = False
    """Collectors merge the inbox (beyond their commits)."""
    checkpointers: tuple[int, ...] = ()
    """For each checkpointer, how many checkpoints it may write."""
    accessors: int = 0
    """Processes that once record a last access."""
    readers: int = 0
    """Follow the log."""
    cold: int = 0
    """Open from the newest checkpoint, then follow."""
    rebuilds: int = 0
    """Rebuilds, one after another; each may crash at any step."""
    loss: bool = False
    """Others deleted versions above the newest checkpoint before the rebuild; collectors are ended, not stalled."""
    after: int = 1
    """Versions explored beyond those a rebuild makes."""
    deaths: tuple[str, ...] = ()
    """Roles that may die for good: leaders, and writers that handed over (I8 is about those who live)."""
    ahead: int = 1
    """The fence is this many milestones above."""
    lost: bool = True
    """Answers of creates may be lost."""
    late: int = 0
    """Budget of late or repeated effects,"""
    kinds: tuple[str, ...] = ()
    """… of these requests."""


class Extent(NamedTuple):
    writer: int
    number: int
    born: int
    chunks: str


class Version(NamedTuple):
    """Contents of one version. Sets of extents are bit masks over `Model.names`."""

    add: int = 0
    remove: int = 0
    floor: int = 0
    lead: int = 0
    """0: unchanged; a leader's number; `_NOBODY`."""
    access: int = 0
    rebuilt: int = 0
    """1: not a version but the state of a checkpoint made by rebuild; 2: a number that rebuild passed over."""


class Truth(NamedTuple):
    """The state that a prefix of the history adds up to."""

    live: int
    floor: int
    lead: int
    chunks: int
    ever: int
    """Ghost: ever live."""


class Proc(NamedTuple):
    role: str
    who: int
    pc: str
    n: int
    """Its replica is confirmed up to this version."""
    batch: tuple[int, ...]
    """Versions read, not yet confirmed."""
    x: tuple[int, ...]
    """The role's own."""


Request = tuple[str, int, int]
"""(kind, object, contents)."""


class State(NamedTuple):
    """The store, the ghost history, the processes. Versions are interned: a number stands for the contents."""

    log: tuple[int, ...]
    """By version; 0: absent. [0] is unused."""
    hist: tuple[int, ...]
    """Ghost: the genuine contents, first created first."""
    indexes: int
    """Bit mask of checkpoints whose index exists: bit version · _AUTHORS + author, so the highest is the newest."""
    segments: int
    inbox: int
    objs: int
    late: tuple[int, frozenset[Request]]
    """(budget left, requests in the air)."""
    procs: tuple[Proc, ...]


Move = tuple[tuple[object, ...], State]
"""(label, state after)."""


class Violation(AssertionError):
    """An invariant is broken."""


class Result(NamedTuple):
    states: int
    seconds: float
    violation: str | None
    trace: tuple[str, ...]


def bits(mask: int) -> Iterator[int]:
    """Numbers of the bits set, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def exists(s: State, version: int) -> bool:
    return version < len(s.log) and s.log[version] != 0


def newest(s: State) -> int:
    """Bit of the newest checkpoint, 0 if there is none."""
    return max(0, s.indexes.bit_length() - 1)


def newest_version(s: State) -> int:
    return newest(s) // _AUTHORS


def at(s: State, i: int, p: Proc) -> State:
    return State._make((*s[:-1], (*s.procs[:i], p, *s.procs[i + 1 :])))


@dataclass(slots=True)
class Model:
    """The protocol under one configuration, with one rule broken (`bug`) or none."""

    config: Config
    bug: str | None = None
    names: list[Extent] = field(default_factory=list)
    versions: list[Version] = field(default_factory=lambda: [Version()])
    _ids: dict[Extent | Version, int] = field(default_factory=dict)
    _chunks: list[int] = field(default_factory=list)
    _truths: dict[tuple[int, ...], Truth] = field(default_factory=dict)
    _judged: dict[tuple[tuple[int, ...], int], frozenset[str]] = field(default_factory=dict)

    _roles: dict[str, Callable[[State, int, Proc], Iterator[Move]]] = field(init=False)

    def __post_init__(self) -> None:
        self._roles = {
            "writer": self.writer,
            "leader": self.leader,
            "gc": self.collector,
            "checkpointer": self.checkpointer,
            "accessor": self.accessor,
            "reader": self.reader,
            "rebuild": self.rebuild,
        }

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
        version = key // _AUTHORS
        if key % _AUTHORS == _REBUILD and s.hist[version - 1 : version] != (contents,):
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

    # ---- steps that roles share --------------------------------------------------------------------------------------

    def sync(self, s: State, i: int, p: Proc) -> Iterator[Move]:
        """GET n+1, n+2, … until absent; then the fence of the batch's first; only then the batch is the replica's."""
        if p.pc == "get":
            version = p.n + len(p.batch) + 1
            if exists(s, version):
                yield ("reads version", version), at(s, i, p._replace(batch=(*p.batch, s.log[version])))
            elif p.batch or self.bug == "fence_first":
                yield ("finds no version", version), at(s, i, p._replace(pc="fence"))
            else:
                yield ("finds no version", version), self.settled(s, i, p)
            return
        fenced = exists(s, self.fence(p.n + (len(p.batch) if self.bug == "fence_of_last" else 1)))
        if self.bug == "no_fence_reader" and p.role != "writer":
            fenced = False
        if fenced and newest_version(s) > p.n:
            if not s.segments >> newest(s) & 1:
                raise Violation("I5 newest checkpoint lacks its segments")
            v = newest_version(s)
            yield ("is fenced, restarts from checkpoint", v), at(s, i, p._replace(n=v, batch=(), pc="get"))
            return
        yield ("confirms up to", p.n + len(p.batch)), self.confirm(s, i, p)

    def confirm(self, s: State, i: int, p: Proc) -> State:
        n = p.n + len(p.batch)
        if s.hist[p.n : n] != p.batch:
            raise Violation(f"I1 {p.role} {p.who} applied version {p.n + 1}.. outside the history")
        return self.settled(s, i, p._replace(n=n, batch=()))

    def commit(self, s: State, i: int, p: Proc, version: Version, label: str) -> Iterator[Move]:
        """Create n+1. Won: as if just read, so on to the fence. Anything else: catch up and decide afresh."""
        k = p.n + 1
        if k > self._cap(s):
            return
        contents = self.version(version)
        for t, answer in self.send(s, ("create", k, contents)):
            believed = answer
            if (self.bug, answer) in (("conflict_is_success", "lost"), ("unknown_is_success", "unknown")):
                believed = "won"
            note = (label, version, "as", k, answer)
            if believed != "won":
                yield note, at(t, i, p._replace(pc="get", batch=()))
            elif self.bug in ("no_fence_writer", "fence_first"):
                yield note, self.confirm(t, i, p._replace(batch=(contents,)))
            else:
                yield note, at(t, i, p._replace(pc="fence", batch=(contents,)))

    def _cap(self, s: State) -> int:
        """Highest version explored."""
        return len(s.log) - 1 if self._rebuilt(s) else self.config.versions

    def _rebuilt(self, s: State) -> bool:
        return self.config.rebuilds > 0 and any(self.versions[v].rebuilt for v in s.hist[self.config.versions - 1 :])

    def settled(self, s: State, i: int, p: Proc) -> State:
        """Sync is done: the role decides, without a request, what to do next."""
        st = self.truth(s.hist[: p.n])
        if p.role == "writer":
            return self._writer_settled(s, i, p, st)
        if p.role == "leader":
            if st.lead != p.who:  # another leads, or nobody
                return at(s, i, p._replace(pc="rest", x=(0, p.x[1])))
            return at(s, i, p._replace(pc="delete" if self._merged(st, p.x[0]) else "list"))
        return at(s, i, p._replace(pc="decide"))

    def _merged(self, st: Truth, seen: int) -> int:
        """Inbox objects that the confirmed state judges: they may go."""
        merged = 0
        for e in bits(seen):
            if self.judged(st, e) is not None:
                merged |= 1 << e
        return merged

    # ---- writers: x = (extent or -1, extents named so far, has handed over) ------------------------------------------

    def next_extent(self, p: Proc) -> Proc:
        """Names the next extent, born at the replica's version, before uploading it."""
        number = p.x[1]
        wanted = self.config.writers[p.who]
        if number == len(wanted):
            return p._replace(pc="done", x=(-1, number, 0))
        extent = Extent(p.who, number, p.n, wanted[number])
        if self.bug == "same_name":
            extent = Extent(0, 0, 0, wanted[number])
        pc = "get" if self.bug == "commit_first" else "upload"
        return p._replace(pc=pc, x=(self.name(extent), number + 1, 0))

    def _writer_settled(self, s: State, i: int, p: Proc, st: Truth) -> State:
        e, handed_over = p.x[0], p.x[2]
        if e < 0:
            return at(s, i, p._replace(pc="idle"))
        verdict = self.judged(st, e)
        if verdict is None:
            if handed_over:
                return at(s, i, p._replace(pc="wait"))
            return at(s, i, p._replace(pc="handover" if self.config.handover and st.lead else "create"))
        if verdict not in self.verdicts(s.hist, e):
            raise Violation(f"I2 {self.names[e]} acknowledged as {verdict}, which the history never said")
        if self.bug == "commit_first" and verdict == LIVE and not s.objs >> e & 1:
            return at(s, i, p._replace(pc="upload"))
        if self.bug == "covered_swept" and verdict == COVERED:
            return at(s, i, p._replace(pc="sweep"))
        return at(s, i, self._answered(p))

    def _answered(self, p: Proc) -> Proc:
        return p._replace(pc="idle", x=(-1, p.x[1], 0)) if self.config.polls else self.next_extent(p)

    def writer(self, s: State, i: int, p: Proc) -> Iterator[Move]:
        e = p.x[0]
        if p.pc in ("get", "fence"):
            yield from self.sync(s, i, p)
        elif p.pc == "idle":
            yield ("names an extent born", p.n), at(s, i, self.next_extent(p))
            if exists(s, p.n + 1) and p.x[1] < len(self.config.writers[p.who]):
                yield ("polls",), at(s, i, p._replace(pc="get"))
        elif p.pc == "upload":
            shared = self.bug == "same_name" and s.objs >> e & 1  # "somebody stored it already: just name it"
            for t, _ in [(s, "")] if shared else self.send(s, ("put", e, 0)):
                done = self._answered(p) if self.bug == "commit_first" else p._replace(pc="get")
                yield ("uploads", self.names[e]), at(t, i, done)
        elif p.pc == "handover":
            for t, _ in self.send(s, ("inbox", e, 0)):
                yield ("hands over", self.names[e]), at(t, i, p._replace(pc="wait", x=(e, p.x[1], 1)))
        elif p.pc == "wait":
            if exists(s, p.n + 1):
                yield ("polls",), at(s, i, p._replace(pc="get"))
            named = self.truth(s.hist[: p.n]).lead != 0
            if self.bug != ("no_timeout" if named else "handover_forgotten"):
                why = "waited long enough, creates" if named else "sees no leader, creates"
                yield from self.commit(s, i, p, Version(add=1 << e), why)
            if "writer" in self.config.deaths:
                yield ("dies",), at(s, i, p._replace(pc="dead"))
        elif p.pc == "create":
            yield from self.commit(s, i, p, Version(add=1 << e), "creates")
        elif p.pc == "sweep":
            for t, _ in self.send(s, ("del-obj", e, 0)):
                yield ("deletes its covered", self.names[e]), at(t, i, self._answered(p))

    # ---- leaders: x = (inbox objects seen, terms left) ---------------------------------------------------------------

    def leader(self, s: State, i: int, p: Proc) -> Iterator[Move]:
        seen, terms = p.x
        if p.pc in ("get", "fence"):
            yield from self.sync(s, i, p)
            return
        if p.pc in ("rest", "list") and exists(s, p.n + 1):
            yield ("polls",), at(s, i, p._replace(pc="get"))
        st = self.truth(s.hist[: p.n])
        if p.pc == "rest" and terms:
            yield from self.commit(s, i, p._replace(x=(0, terms - 1)), Version(lead=p.who), "takes the lead")
        elif p.pc == "list":
            if s.inbox:
                pc = "merge" if self.unjudged(st, s.inbox) else "delete"
                yield ("lists the inbox", *self._named(s.inbox)), at(s, i, p._replace(pc=pc, x=(s.inbox, terms)))
            yield from self.commit(s, i, p, Version(lead=_NOBODY), "steps down")
            if "leader" in self.config.deaths:
                yield ("dies",), at(s, i, p._replace(pc="dead"))
        elif p.pc == "merge":
            new = self.unjudged(st, seen)
            for label, t in self.commit(s, i, p, Version(add=new), "merges"):
                early = {"inbox_early": new, "covered_early": seen & ~new}.get(self.bug or "", 0)
                for e in bits(early):
                    t = self.effect(t, ("del-inbox", e, 0))[0]
                yield label, t
        elif p.pc == "delete":
            merged = self._merged(st, seen)
            e = next(bits(merged))
            for t, _ in self.send(s, ("del-inbox", e, 0)):
                q = p._replace(x=(seen & ~(1 << e), terms), pc="delete" if merged & ~(1 << e) else "list")
                yield ("deletes inbox", self.names[e]), at(t, i, q)

    # ---- collectors: x = (inbox objects seen, commits left); pc "send-<kind>": x[2] is what it will delete -----------

    def collector(self, s: State, i: int, p: Proc) -> Iterator[Move]:
        seen, left = p.x[:2]
        if p.pc in ("get", "fence"):
            yield from self.sync(s, i, p)
            return
        if p.pc != "decide":
            for t, _ in self.send(s, (p.pc, p.x[2], 0)):
                yield ("sends", p.pc, self._object(p.pc, p.x[2])), at(t, i, p._replace(pc="decide", x=(seen, left)))
            return
        if exists(s, p.n + 1):
            yield ("polls",), at(s, i, p._replace(pc="get"))
        st = self.truth(s.hist[: p.n])
        merging = self.config.merges and self.bug != "gc_no_merge"
        if merging and s.inbox and s.inbox != seen:
            yield ("lists the inbox", *self._named(s.inbox)), at(s, i, p._replace(x=(s.inbox, left)))
        new = self.unjudged(st, seen)
        yield from self._collect(s, i, p, st, new)
        # One candidate at a time stands for a whole sweep: deletable stays deletable, whatever is listed meanwhile.
        for request in self.candidates(s, p, st):
            x = (seen & ~(1 << request[1]) if request[0] == "del-inbox" else seen, left, request[1])
            yield ("means to", request[0], self._object(*request[:2])), at(s, i, p._replace(pc=request[0], x=x))

    def _collect(self, s: State, i: int, p: Proc, st: Truth, new: int) -> Iterator[Move]:
        """Victims and floor: whatever the policy wants. Lost: chosen anew."""
        seen, left = p.x[:2]
        if new and not left:
            yield from self.commit(s, i, p, Version(add=new), "merges")
        for victim in [0, *(1 << e for e in bits(st.live))] if left else []:
            for floor in [0, *range(st.floor + 1, p.n + 1)]:
                version = Version(add=new, remove=victim, floor=floor)
                if not victim and not floor:
                    continue
                for label, t in self.commit(s, i, p._replace(x=(seen, left - 1)), version, "collects"):
                    if self.bug == "delete_before_confirm" and victim:
                        x = (seen, left - 1, victim.bit_length() - 1)
                        t = at(t, i, p._replace(pc="del-obj", x=x))
                    yield label, t

    def candidates(self, s: State, p: Proc, st: Truth) -> Iterator[Request]:
        """What LIST shows and the confirmed state lets go."""
        v, n = newest(s), p.n
        for e in bits(s.objs):
            if self.deletable(st, e):
                yield "del-obj", e, 0
        gone = self._merged(st, p.x[0]) if self.bug != "gc_sweeps_inbox" else p.x[0]
        for e in bits(gone & s.inbox):
            yield "del-inbox", e, 0
        for k in range(1, len(s.log)):
            covered = k <= v // _AUTHORS or self.bug == "no_checkpoint_rule"
            if s.log[k] and covered and self.fence(k) <= n and (k % MILESTONE or self.bug == "milestone_deleted"):
                yield "del-log", k, 0
        for c in bits(s.indexes & ~(1 << v)):
            yield "del-index", c, 0
        for c in bits(s.segments & ~s.indexes):  # the index goes first
            if c // _AUTHORS < v // _AUTHORS or self.bug == "sweep_newest":
                yield "del-segment", c, 0

    # ---- checkpointers: x = (checkpoint being written, checkpoints left) ---------------------------------------------

    def checkpointer(self, s: State, i: int, p: Proc) -> Iterator[Move]:
        checkpoint, left = p.x
        first, second = ("index", "segment") if self.bug == "index_first" else ("segment", "index")
        if p.pc in ("get", "fence"):
            yield from self.sync(s, i, p)
        elif p.pc == "second":
            for t, _ in self.send(s, (second, checkpoint, 0)):
                yield ("puts", second, checkpoint // _AUTHORS), at(t, i, p._replace(pc="decide", x=(0, left)))
        elif left:
            if p.n > newest_version(s):
                checkpoint = p.n * _AUTHORS + p.who
                for t, _ in self.send(s, (first, checkpoint, 0)):
                    yield ("puts", first, p.n), at(t, i, p._replace(pc="second", x=(checkpoint, left - 1)))
            if exists(s, p.n + 1):
                yield ("polls",), at(s, i, p._replace(pc="get"))

    # ---- accessors: x = (extent hit, or -1 when it was recorded) -----------------------------------------------------

    def accessor(self, s: State, i: int, p: Proc) -> Iterator[Move]:
        """Remembers a hit and records it later, whatever became of the extent."""
        hit = p.x[0]
        if p.pc in ("get", "fence"):
            yield from self.sync(s, i, p)
            return
        if exists(s, p.n + 1):
            yield ("polls",), at(s, i, p._replace(pc="get"))
        if hit < 0:
            for e in bits(self.truth(s.hist[: p.n]).live) if p.x[1] else ():
                yield ("hits", self.names[e]), at(s, i, p._replace(x=(e, 0)))
            return
        for label, t in self.commit(s, i, p._replace(x=(-1, 0)), Version(access=1 << hit), "records"):
            yield label, t if t.procs[i].pc == "fence" else at(t, i, t.procs[i]._replace(x=(hit, 0)))

    # ---- readers: x = (checkpoint being loaded,) ---------------------------------------------------------------------

    def reader(self, s: State, i: int, p: Proc) -> Iterator[Move]:
        if p.pc in ("get", "fence"):
            yield from self.sync(s, i, p)
        elif p.pc == "list":
            yield ("lists checkpoint", newest_version(s)), at(s, i, p._replace(pc="load", x=(newest(s),)))
        elif p.pc == "load":
            c = p.x[0]
            if c and not s.segments >> c & 1:
                if c == newest(s):
                    raise Violation("I5 newest checkpoint lacks its segments")
                yield ("finds its checkpoint gone, lists again",), at(s, i, p._replace(pc="list", x=(0,)))
            else:
                yield ("loads it",), at(s, i, p._replace(pc="get", n=c // _AUTHORS, x=(0,)))
        elif exists(s, p.n + 1):
            yield ("polls",), at(s, i, p._replace(pc="get"))
        elif exists(s, self.fence(p.n + 1)) and newest_version(s) > p.n and self.bug != "no_idle_fence":
            yield ("finds nothing, asks for the fence",), at(s, i, p._replace(pc="fence"))

    # ---- rebuild: x = (rebuilds left, M, contents of its checkpoint) -------------------------------------------------

    def rebuild(self, s: State, i: int, p: Proc) -> Iterator[Move]:
        """Milestones first, then segments, then the index: a crash in between changes nothing."""
        left, m, contents = p.x
        if p.pc == "ready":
            if left:
                for t, what in self._losses(s) if self.config.loss else [(s, ())]:
                    yield ("begins to rebuild", *what), at(t, i, self._survey(t, p))
            return
        if not self.config.loss:  # nobody may run before what was lost is mended
            yield ("crashes",), at(s, i, p._replace(pc="ready", x=(left, 0, 0)))
        checkpoint = (m - 1) * _AUTHORS + _REBUILD
        if p.pc == "milestones":
            last = m - MILESTONE if self.bug == "rebuild_last_late" and not s.indexes >> checkpoint & 1 else m
            missing = [k for k in range(MILESTONE, last + 1, MILESTONE) if not s.log[k]]
            if not missing or self.bug == "rebuild_no_milestones":
                done = p._replace(pc="segment")
                if s.indexes >> checkpoint & 1:
                    done = p._replace(pc="ready", x=(left, 0, 0))
                yield ("has every milestone",), at(s, i, done)
                return
            for t, _ in self.send(s, ("create", missing[0], self.version(Version()))):
                yield ("creates milestone", missing[0]), at(t, i, p)
        elif p.pc == "segment":
            for t, _ in self.send(s, ("segment", checkpoint, 0)):
                yield ("puts segment", m - 1), at(t, i, p._replace(pc="index"))
        else:
            for t, _ in self.send(s, ("index", checkpoint, contents)):
                q = p._replace(pc="ready", x=(left, 0, 0))
                if self.bug in ("rebuild_checkpoint_first", "rebuild_last_late"):
                    q = p._replace(pc="milestones")
                yield ("puts index", m - 1, self.versions[contents]), at(t, i, q)

    def _losses(self, s: State) -> Iterator[tuple[State, tuple[object, ...]]]:
        """Others deleted versions above the newest checkpoint: one, or all from one on. Collectors were ended."""
        late, procs = s.late, s.procs
        if self.bug != "rebuild_not_offline":
            late = (late[0], frozenset(r for r in late[1] if r[0] != "del-obj"))
            procs = tuple(q._replace(pc="dead") if q.role == "gc" else q for q in procs)
        for k in range(newest_version(s) + 1, len(s.hist) + 1):
            for last in {k, len(s.hist)}:
                log = tuple(0 if k <= v <= last else contents for v, contents in enumerate(s.log))
                yield s._replace(log=log, late=late, procs=procs), ("after versions were lost:", k, "to", last)

    def _survey(self, s: State, p: Proc) -> Proc:
        """What there is: the highest number anything bears witness to, and the objects of extents. What the part of the
        history that can still be read lets a collector delete is left out: a DELETE of it may be under way."""
        tip = max(k for k in range(len(s.log)) if k == 0 or s.log[k])
        tip = max([tip, newest_version(s), *(self.names[e].born for e in bits(s.objs))])
        if self.bug == "rebuild_low_tip":
            tip = newest_version(s)
        known = newest_version(s)
        while exists(s, known + 1) and known < len(s.hist):
            known += 1
        st, live = self.truth(s.hist[:known]), 0
        for e in bits(s.objs):
            if not self.deletable(st, e) or self.bug == "rebuild_revives":
                live |= 1 << e
        m = self.fence(tip) if self.bug == "rebuild_at_fence" else self.fence(tip) + MILESTONE
        floor = 0 if self.bug == "rebuild_low_floor" else m - 1
        contents = self.version(Version(add=live, floor=floor, rebuilt=1))
        pc = "segment" if self.bug == "rebuild_checkpoint_first" else "milestones"
        return p._replace(pc=pc, x=(p.x[0] - 1, m, contents))

    # ---- the search --------------------------------------------------------------------------------------------------

    def initial(self) -> State:
        c, procs = self.config, []
        for who in range(len(c.writers)):
            p = Proc("writer", who, "idle", 0, (), (-1, 0, 0))
            procs.append(p if c.polls else self.next_extent(p))
        procs += [Proc("leader", who + 1, "rest", 0, (), (0, terms)) for who, terms in enumerate(c.leaders)]
        procs += [Proc("gc", 0, "decide", 0, (), (0, commits)) for commits in c.gcs]
        procs += [Proc("checkpointer", who, "decide", 0, (), (0, n)) for who, n in enumerate(c.checkpointers)]
        procs += [Proc("accessor", 0, "decide", 0, (), (-1, 1))] * c.accessors
        procs += [Proc("reader", 0, "decide", 0, (), (0,))] * c.readers
        procs += [Proc("reader", 0, "list", 0, (), (0,))] * c.cold
        if c.rebuilds:
            procs.append(Proc("rebuild", 0, "ready", 0, (), (c.rebuilds, 0, 0)))
        highest = c.versions
        for _ in range(c.rebuilds):
            highest = self.fence(highest) + MILESTONE + c.after
        return State((0,) * (highest + 1), (), 0, 0, 0, 0, (c.late, frozenset()), tuple(procs))

    def moves(self, s: State) -> Iterator[Move]:
        roles = self._roles
        offline = any(p.role == "rebuild" and p.pc != "ready" for p in s.procs)
        for i, p in enumerate(s.procs):
            if p.pc not in ("dead", "done") and (not offline or p.role == "rebuild"):
                for label, t in roles[p.role](s, i, p):
                    yield (p.role, p.who, *label), t
        budget, air = s.late
        for request in air:
            t = self.effect(s, request)[0]
            yield ("late:", *request), t._replace(late=(budget, air - {request}))

    def check(self, s: State) -> None:
        missing = self.truth(s.hist).live & ~s.objs
        if missing:
            raise Violation(f"I3 the history names {[*self._named(missing)]}, whose object does not exist")
        v = newest(s)
        if v and not s.segments >> v & 1:
            raise Violation("I5 newest checkpoint lacks its segments")
        v //= _AUTHORS
        if s.log[v + 1 : len(s.hist) + 1] != s.hist[v:] and not self._repairing(s):
            raise Violation("I5 a version after the newest checkpoint is gone or changed")

    def _repairing(self, s: State) -> bool:
        """Versions were deleted by others, and rebuild has not put that right yet."""
        return self.config.loss and not self._rebuilt(s)

    def check_end(self, s: State) -> None:
        """Nobody can step."""
        open_ended = len(s.hist) < self._cap(s) and not self._repairing(s)
        for p in s.procs:
            if p.role == "writer" and p.pc not in ("done", "dead") and open_ended:
                raise Violation(f"I8 writer {p.who} waits for ever")
            if p.role == "reader" and p.n < len(s.hist) and not self._repairing(s):
                raise Violation("I8 a reader stays behind")
        if s.inbox and self.config.merges and open_ended:
            raise Violation("I8 a hand-over lies in the inbox for ever")

    def explore(self, limit: int = 10**8) -> Result:
        """Breadth first, at most `limit` states."""
        start, first = time.monotonic(), canonical(self.initial())
        twins = sum(p.role in _UNNAMED for p in first.procs) > 1
        parent: dict[State, tuple[State, tuple[object, ...]] | None] = {first: None}
        frontier, label = [first], tuple[object, ...]()
        while frontier and len(parent) < limit:
            following = []
            for s in frontier:
                try:
                    acted = False
                    for label, t in self.moves(s):
                        acted = True
                        if twins:
                            t = canonical(t)
                        if t not in parent:
                            parent[t] = (s, label)
                            self.check(t)
                            following.append(t)
                    if not acted:
                        label = ("nothing",)
                        self.check_end(s)
                except Violation as v:
                    return Result(len(parent), time.monotonic() - start, str(v), self._trace(parent, s, label))
            frontier = following
        return Result(len(parent), time.monotonic() - start, None, ())

    def _trace(
        self, parent: dict[State, tuple[State, tuple[object, ...]] | None], s: State, last: tuple[object, ...]
    ) -> tuple[str, ...]:
        steps = [f"then, in or after: {self._words(last)}"]
        step = parent[s]
        while step is not None:
            s, label = step
            steps.append(self._words(label))
            step = parent[s]
        return tuple(steps[::-1])

    # ---- words for traces --------------------------------------------------------------------------------------------

    def _words(self, label: tuple[object, ...]) -> str:
        return " ".join(self._text(part) if isinstance(part, Version) else str(part) for part in label)

    def _named(self, mask: int) -> Iterator[str]:
        for e in bits(mask):
            extent = self.names[e]
            yield f"{extent.chunks}#{extent.writer}.{extent.number}@{extent.born}"

    def _object(self, kind: str, key: int) -> str:
        if kind in ("del-obj", "del-inbox"):
            return next(self._named(1 << key))
        return str(key if kind == "del-log" else key // _AUTHORS)

    def _text(self, v: Version) -> str:
        lead = {0: "", _NOBODY: " lead nobody"}.get(v.lead, f" lead {v.lead}")
        parts = (("add", v.add), ("remove", v.remove), ("access", v.access))
        sets = "".join(f" {word} {','.join(self._named(mask))}" for word, mask in parts if mask)
        return f"{{{(sets + lead + (f' floor {v.floor}' if v.floor else '')).strip()}}}"


def canonical(s: State) -> State:
    """Symmetry: collectors, accessors and readers have no names, so their order says nothing."""
    rest = [p for p in s.procs if p.role in _UNNAMED]
    named = [p for p in s.procs if p.role not in _UNNAMED]
    return s._replace(procs=(*named, *sorted(rest)))


# ---- what is explored ------------------------------------------------------------------------------------------------

A, B = ("a",), ("b",)
CONFIGS = {
    "fence": Config(4, (A, ("b", "c")), checkpointers=(1,), gcs=(0,), late=1, kinds=("create",)),
    "fence-reader": Config(4, (A, ("b", "c")), checkpointers=(1,), gcs=(0,), readers=1, lost=False),
    "sweep": Config(4, (A, B), gcs=(2,), late=1, kinds=("put", "del-obj")),
    "sweep-born": Config(4, (A, B), gcs=(2,), late=1, kinds=("put",), polls=True, lost=False),
    "two-gcs": Config(4, (A, B), gcs=(1, 1), lost=False),
    "late-deletes": Config(
        4, (A, ("b", "c")), checkpointers=(1,), gcs=(0,), lost=False, late=1, kinds=("del-log", "index")
    ),
    "checkpoints": Config(4, (("a", "b"),), checkpointers=(1, 1), gcs=(0,), cold=1, lost=False),
    "open": Config(4, (("a", "b", "c"),), checkpointers=(2,), gcs=(0,), cold=1, lost=False),
    "two-collectors": Config(3, (("a", "b"),), checkpointers=(1, 1), gcs=(0, 0), lost=False),
    "leaders": Config(3, (A, B), handover=True, leaders=(1, 1), lost=False),
    "leaders-late": Config(4, (A,), handover=True, leaders=(1, 1), late=1, kinds=("inbox", "del-inbox"), lost=False),
    "leaders-lost": Config(4, (A,), handover=True, leaders=(1, 1), deaths=("leader",)),
    "leader-gc": Config(4, (A,), handover=True, leaders=(1,), gcs=(1,), late=1, kinds=("inbox", "put")),
    "gc-merge": Config(4, (A,), handover=True, leaders=(1,), gcs=(1,), merges=True, deaths=("leader", "writer")),
    "covered": Config(4, (("ab",), A), gcs=(2,), late=1, kinds=("put",)),
    "covered-inbox": Config(4, (("ab",), A), handover=True, leaders=(1,), gcs=(1,), lost=False),
    "access": Config(4, (A,), gcs=(1,), accessors=1, late=1, kinds=("create",)),
    "rebuild": Config(2, (A, B), gcs=(1,), rebuilds=1, ahead=2, lost=False),
    "rebuild-checkpoint": Config(2, (A,), checkpointers=(1,), gcs=(1,), rebuilds=1, ahead=2),
    "rebuild-late": Config(2, (A,), gcs=(1,), rebuilds=1, ahead=2, late=1, kinds=("create", "del-obj", "put")),
    "rebuild-twice": Config(2, (A,), readers=1, rebuilds=2, ahead=2, lost=False),
    "rebuild-inbox": Config(
        2, (A,), handover=True, leaders=(1,), gcs=(1,), merges=True, rebuilds=1, ahead=2, lost=False
    ),
    "rebuild-loss": Config(3, (A, B), checkpointers=(1,), readers=1, rebuilds=1, ahead=2, loss=True, lost=False),
}

_FENCE = Config(4, (A, ("b", "c")), checkpointers=(1,), gcs=(0,))
_BEHIND = Config(4, (("a", "b", "c"),), checkpointers=(1,), gcs=(0,), readers=1, lost=False)
_SWEEP = Config(4, (A, B), gcs=(2,))
_CHECKPOINT = Config(4, (("a", "b", "c"),), checkpointers=(1, 1), gcs=(0,), cold=1, lost=False)
_LEAD = Config(4, (A,), handover=True, leaders=(1,), deaths=("leader",), lost=False)
_LEFT = _LEAD._replace(gcs=(1,), merges=True, deaths=("leader", "writer"))
_REBUILDS = Config(2, (A, B), gcs=(1,), rebuilds=1, ahead=2, lost=False)
MUTANTS = {
    "no_fence_writer": (_FENCE, "a won create is believed without the fence"),
    "fence_first": (_FENCE, "the fence is asked before the create, not after"),
    "no_fence_reader": (_FENCE._replace(readers=1, lost=False), "versions are applied without the fence"),
    "fence_of_last": (_FENCE, "the fence of the batch's last version is asked, not of its first"),
    "no_idle_fence": (_BEHIND, "an empty poll never asks for the fence"),
    "milestone_deleted": (
        _FENCE._replace(writers=(A, ("b", "c", "d", "e")), lost=False),
        "milestones are deleted as well",
    ),
    "no_checkpoint_rule": (_BEHIND, "versions are deleted though no checkpoint covers them"),
    "plain_put": (_FENCE, "versions are plain PUTs"),
    "conflict_is_success": (_FENCE, "a lost create counts as won"),
    "unknown_is_success": (_FENCE, "a create without answer counts as won"),
    "commit_first": (_SWEEP, "the commit precedes the upload"),
    "same_name": (_SWEEP._replace(writers=(A, A)), "two uploads of one prefix share a name"),
    "sweep_by_age": (_SWEEP, "orphans are deleted by age, without raising the floor"),
    "no_void_rule": (_SWEEP, "adds born below the floor are accepted"),
    "delete_before_confirm": (_SWEEP, "victims are deleted before their removal is confirmed"),
    "inbox_early": (_LEAD._replace(writers=(A, B)), "inbox objects go before their version is confirmed"),
    "index_first": (_CHECKPOINT, "a checkpoint's index is put before its segments"),
    "sweep_newest": (_CHECKPOINT, "segments not older than the newest checkpoint are swept"),
    "covered_early": (
        Config(4, (("ab",), A), handover=True, leaders=(1, 1), lost=False),
        "inbox objects covered by others of the same round go before those are confirmed",
    ),
    "covered_swept": (
        Config(4, (("ab",), A), handover=True, leaders=(1,), gcs=(1,), lost=False),
        "a writer whose extent is covered deletes its objects at once",
    ),
    "handover_forgotten": (_LEAD, "a hand-over is forgotten when the leader steps down"),
    "no_timeout": (_LEAD, "a hand-over waits for as long as a leader is named"),
    "gc_no_merge": (_LEFT, "collectors leave the inbox alone"),
    "gc_sweeps_inbox": (_LEFT, "inbox objects are deleted by age"),
    "access_revives": (Config(4, (A,), gcs=(1,), accessors=1), "an access makes a removed extent live again"),
    "rebuild_no_milestones": (_REBUILDS, "rebuild creates no milestones"),
    "rebuild_checkpoint_first": (_REBUILDS, "rebuild puts its checkpoint before the milestones"),
    "rebuild_last_late": (_REBUILDS, "rebuild puts its checkpoint before the last of the milestones"),
    "rebuild_at_fence": (_REBUILDS, "rebuild goes on at the fence of the tip, not beyond it"),
    "rebuild_low_floor": (_REBUILDS, "rebuild starts with floor 0"),
    "rebuild_low_tip": (
        Config(4, (("a", "b", "c"), B), rebuilds=1, loss=True, lost=False),
        "rebuild takes the newest checkpoint for the tip",
    ),
    "rebuild_not_offline": (
        Config(3, (A,), gcs=(1,), rebuilds=1, ahead=2, loss=True, lost=False),
        "versions were lost, and a collector that was at work goes on after the rebuild",
    ),
    "rebuild_revives": (_REBUILDS, "rebuild takes objects that a collector may be deleting"),
}
"""Each breaks one rule; the model, under the configuration beside it, must find a violation."""


def main(argv: list[str]) -> int:
    what, name = (argv[0] if argv else "all"), (argv[1] if len(argv) > 1 else "")
    known = CONFIGS.keys() if what == "check" else MUTANTS.keys()
    if what not in ("all", "check", "mutants") or (name and name not in known):
        print(__doc__, file=sys.stderr)
        return 2
    jobs: list[tuple[str, Config, str | None]] = [
        (key, config, None) for key, config in CONFIGS.items() if what in ("all", "check")
    ]
    jobs += [(key, config, key) for key, (config, _) in MUTANTS.items() if what in ("all", "mutants")]
    bad = 0
    for key, config, bug in jobs:
        if name not in ("", key):
            continue
        found = Model(config, bug).explore()
        why = f" ({MUTANTS[key][1]})" if bug else ""
        verdict = f"{found.violation} ({len(found.trace)} steps)" if found.violation else "no violation"
        print(f"{found.states:9,} states {found.seconds:6.1f} s  {key}{why}: {verdict}", flush=True)
        bad |= (found.violation is None) != (bug is None)
        if found.violation and (name or not bug):
            print("    " + "\n    ".join(found.trace))
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
