"""Values of the protocol's model: extents, versions, processes, a state of the whole world; how they are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

MILESTONE = 2
AUTHORS = 8
"""Authors of checkpoints; the last is rebuild."""
REBUILD = AUTHORS - 1
NOBODY = -1
UNNAMED = ("gc", "accessor", "reader")

LIVE, VOID, COVERED = "live", "void", "covered"


class Extent(NamedTuple):
    writer: int
    number: int
    born: int
    chunks: str


class Version(NamedTuple):
    """Contents of one version. Sets of extents are bit masks over `Store.names`."""

    add: int = 0
    remove: int = 0
    floor: int = 0
    lead: int = 0
    """0: unchanged; a leader's number; `NOBODY`."""
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
    """Bit mask of checkpoints whose index exists: bit version · AUTHORS + author, so the highest is the newest."""
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
    return newest(s) // AUTHORS


def at(s: State, i: int, p: Proc) -> State:
    return State._make((*s[:-1], (*s.procs[:i], p, *s.procs[i + 1 :])))


def canonical(s: State) -> State:
    """Symmetry: collectors, accessors and readers have no names, so their order says nothing."""
    rest = [p for p in s.procs if p.role in UNNAMED]
    named = [p for p in s.procs if p.role not in UNNAMED]
    return s._replace(procs=(*named, *sorted(rest)))
