"""What somebody wants of the manifest, and how several wishes share a version.

Pure values: no I/O, clock or randomness. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lmcache_s3.index.manifest import Delta, State, judged, record_size
from lmcache_s3.types import ExtentName, ExtentRecord

GROUP_BYTES = 4 * 2**20
"""A version takes wishes up to about this size (and always at least one)."""
_NAME_BYTES = 256
"""More than an extent's name takes in a document."""


@dataclass(frozen=True, slots=True)
class Change:
    """add: extents whose objects are durable. remove: extents to take out. access: extents hit lately (a hint)."""

    add: tuple[ExtentRecord, ...] = ()
    remove: tuple[ExtentName, ...] = ()
    access: tuple[ExtentName, ...] = ()

    @classmethod
    def of(cls, delta: Delta) -> Change:
        """What a handed over delta asks for; its floor and lead mean nothing there."""
        return cls(delta.add, delta.remove, delta.access)

    @property
    def is_empty(self) -> bool:
        return not (self.add or self.remove or self.access)

    @property
    def size_bytes(self) -> int:
        """About how many bytes it takes in a version; never too few."""
        return sum(map(record_size, self.add)) + _NAME_BYTES * (len(self.remove) + len(self.access))

    def is_judged(self, state: State) -> bool:
        """Whether the state says all of it: added extents live, void or covered, removed ones not live; what is in both
        is removed. (Access is a hint: nobody waits for it.)"""
        gone = set(self.remove)
        return all(name not in state.extents for name in gone) and all(
            record.name in gone or judged(state, record) is not None for record in self.add
        )

    def parts(self, limit_bytes: int = GROUP_BYTES) -> list[Change]:
        """The same in several, each up to about `limit_bytes` (or one extent)."""
        if self.size_bytes <= limit_bytes:
            return [self]
        singles = [
            *(_Single(Change(add=(record,))) for record in self.add),
            *(_Single(Change(remove=(name,))) for name in self.remove),
            *(_Single(Change(access=(name,))) for name in self.access),
        ]
        return [joined(single.change for single in group) for group in grouped(singles, limit_bytes)]


@dataclass(frozen=True, slots=True)
class _Single:
    change: Change


class Wanted(Protocol):
    """Something that carries a change."""

    @property
    def change(self) -> Change: ...


W = TypeVar("W", bound=Wanted)


def joined(changes: Iterable[Change]) -> Change:
    """All of them as one; names that several give count once."""
    changes = list(changes)
    return Change(
        tuple({record.name: record for change in changes for record in change.add}.values()),
        tuple(dict.fromkeys(name for change in changes for name in change.remove)),
        tuple(dict.fromkeys(name for change in changes for name in change.access)),
    )


def grouped(items: Iterable[W], limit_bytes: int = GROUP_BYTES) -> Iterator[list[W]]:
    """Runs of items whose changes may share a version: up to about `limit_bytes`, at least one.

    A version adds before it removes, so a change that removes what an earlier one of its group adds, or the other way
    round, begins the next group: what was committed first is judged before it is taken back.
    """
    group: list[W] = []
    size_bytes, added, removed = 0, set[ExtentName](), set[ExtentName]()
    for item in items:
        change = item.change
        size_bytes += change.size_bytes
        names = {record.name for record in change.add}
        if group and (size_bytes > limit_bytes or not added.isdisjoint(change.remove) or not removed.isdisjoint(names)):
            yield group
            group, size_bytes, added, removed = [], change.size_bytes, set(), set()
        group.append(item)
        added |= names
        removed |= set(change.remove)
    if group:
        yield group
