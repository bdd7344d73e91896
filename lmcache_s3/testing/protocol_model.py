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

The parts: `protocol_values`; `protocol_store`, what requests do; `protocol_roles`, who makes them; `protocol_configs`,
what is explored. Here is the search. Raises `Violation`, naming the invariant.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lmcache_s3.testing.protocol_configs import CONFIGS, MUTANTS, Config
from lmcache_s3.testing.protocol_roles import Roles
from lmcache_s3.testing.protocol_values import (
    AUTHORS,
    MILESTONE,
    NOBODY,
    UNNAMED,
    Move,
    Proc,
    State,
    Version,
    Violation,
    canonical,
    newest,
)


class Result(NamedTuple):
    states: int
    seconds: float
    violation: str | None
    trace: tuple[str, ...]


@dataclass(slots=True)
class Model(Roles):
    """The protocol under one configuration, with one rule broken (`bug`) or none: all that can happen, checked."""

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
        v //= AUTHORS
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
        twins = sum(p.role in UNNAMED for p in first.procs) > 1
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

    def _text(self, v: Version) -> str:
        lead = {0: "", NOBODY: " lead nobody"}.get(v.lead, f" lead {v.lead}")
        parts = (("add", v.add), ("remove", v.remove), ("access", v.access))
        sets = "".join(f" {word} {','.join(self._named(mask))}" for word, mask in parts if mask)
        return f"{{{(sets + lead + (f' floor {v.floor}' if v.floor else '')).strip()}}}"


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
