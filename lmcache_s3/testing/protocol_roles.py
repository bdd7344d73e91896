"""Who takes part in the protocol's model: writers, leaders, collectors, checkpointers, accessors, readers, rebuild.

Raises `Violation` when somebody believes what the history does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lmcache_s3.testing.protocol_store import Store
from lmcache_s3.testing.protocol_values import (
    AUTHORS,
    COVERED,
    LIVE,
    MILESTONE,
    NOBODY,
    REBUILD,
    Extent,
    Move,
    Proc,
    Request,
    State,
    Truth,
    Version,
    Violation,
    at,
    bits,
    exists,
    newest,
    newest_version,
)


@dataclass(slots=True)
class Roles(Store):
    """Each role yields every step that a process of it can make from here, with the state after it."""

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
            yield from self.commit(s, i, p, Version(lead=NOBODY), "steps down")
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
            covered = k <= v // AUTHORS or self.bug == "no_checkpoint_rule"
            if s.log[k] and covered and self.fence(k) <= n and (k % MILESTONE or self.bug == "milestone_deleted"):
                yield "del-log", k, 0
        for c in bits(s.indexes & ~(1 << v)):
            yield "del-index", c, 0
        for c in bits(s.segments & ~s.indexes):  # the index goes first
            if c // AUTHORS < v // AUTHORS or self.bug == "sweep_newest":
                yield "del-segment", c, 0

    def _object(self, kind: str, key: int) -> str:
        if kind in ("del-obj", "del-inbox"):
            return next(self._named(1 << key))
        return str(key if kind == "del-log" else key // AUTHORS)

    # ---- checkpointers: x = (checkpoint being written, checkpoints left) ---------------------------------------------

    def checkpointer(self, s: State, i: int, p: Proc) -> Iterator[Move]:
        checkpoint, left = p.x
        first, second = ("index", "segment") if self.bug == "index_first" else ("segment", "index")
        if p.pc in ("get", "fence"):
            yield from self.sync(s, i, p)
        elif p.pc == "second":
            for t, _ in self.send(s, (second, checkpoint, 0)):
                yield ("puts", second, checkpoint // AUTHORS), at(t, i, p._replace(pc="decide", x=(0, left)))
        elif left:
            if p.n > newest_version(s):
                checkpoint = p.n * AUTHORS + p.who
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
                yield ("loads it",), at(s, i, p._replace(pc="get", n=c // AUTHORS, x=(0,)))
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
        checkpoint = (m - 1) * AUTHORS + REBUILD
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
