"""The EvictionPolicy port: which chunk a tier gives up next, and whether a new one is worth the room.

A policy is bookkeeping only: no I/O, no lock (its owner holds one), no clock of its own: every call says what time it
is, in seconds, never going back. It knows nothing of budgets: the tier asks for victims until there is room.

Chunks of a prompt form a tree: a chunk's parent is the chunk before it, and without its parent it is of no use. So a
victim is always a leaf: no held chunk has it as its parent. Keys must not form a cycle through their parents.
"""

from __future__ import annotations

from collections.abc import Container, Hashable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

NOTHING: frozenset[Hashable] = frozenset()


@dataclass(frozen=True, slots=True)
class Item:
    """One chunk as a tier keeps it. parent: key of the chunk before it in the prompt, None for the first or where that
    is not known. depth_tokens: tokens of the prompt before this chunk. n_bytes: room it takes."""

    key: Hashable
    parent: Hashable | None
    depth_tokens: int
    n_bytes: int


@runtime_checkable
class EvictionPolicy(Protocol):
    """What every policy must do. All calls take a few microseconds, amortised, however much is held.

    One use of a prompt is one call per chunk, all with the same `now_s`, in any order: `touch` for the chunks that are
    held, `add` for those that were kept.
    """

    def admit(self, item: Item, now_s: float, spare: Container[Hashable] = NOTHING) -> bool:
        """Whether a chunk that is not held deserves the place of the next victim. Asked only when something would have
        to go; a chunk refused here counts as seen. The caller refuses what comes after it in the prompt, too."""
        ...

    def add(self, item: Item, now_s: float) -> None:
        """A chunk is held from now on. Of one that is held already: a use of it."""
        ...

    def touch(self, key: Hashable, now_s: float) -> None:
        """A held chunk was used. Of one that is not held: nothing."""
        ...

    def remove(self, key: Hashable) -> None:
        """A chunk is held no more: evicted, found damaged, or dropped for whatever reason. Its children, if there are
        any, stay until they are removed themselves. Of one that is not held: nothing."""
        ...

    def victim(self, now_s: float, spare: Container[Hashable] = NOTHING) -> Hashable | None:
        """The leaf to go next, never one of `spare` (chunks being read, or the prompt that room is made for); None if
        there is none. Changes nothing that is held: the caller removes it."""
        ...
