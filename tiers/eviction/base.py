"""The EvictionPolicy port: which chunk a tier gives up next, and whether a new one is worth the room.

A policy is bookkeeping only: no I/O, no lock (its owner holds one), no clock of its own: every call says what time it
is, in seconds, never going back. It knows nothing of budgets: the tier asks for victims until there is room.

Chunks of a prompt form a tree: a chunk's parent is the chunk before it, and without its parent it is of no use. So a
victim is always a leaf: no held chunk has it as its parent. Keys must not form a cycle through their parents.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Sequence
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
    """What every policy must do. Calls take a few microseconds a chunk, amortised, however much is held.

    Order of calls: `use` with a prompt's chunks, then for those that are to be kept, first one first: `admit` where
    there is no room, `victim` and `remove` until there is, `add`.
    """

    def use(self, items: Sequence[Item], now_s: float) -> None:
        """A prompt was used: its consecutive chunks that were asked for or are offered now, first one first, held or
        not. Those that are held are worth more for it; of the others the policy may learn that they came back."""
        ...

    def admit(self, item: Item, now_s: float, spare: Container[Hashable] = NOTHING) -> bool:
        """Whether a chunk of a prompt used lately, not held, deserves the place of the next victim; False also if there
        is no victim. After a refusal the caller keeps nothing of what follows in the prompt."""
        ...

    def add(self, item: Item, now_s: float) -> None:
        """A chunk is held from now on. Of one that is held already: nothing."""
        ...

    def remove(self, key: Hashable) -> None:
        """A chunk is held no more: evicted, found damaged, or dropped for whatever reason. Its children, if there are
        any, stay until they are removed themselves. Of one that is not held: nothing."""
        ...

    def victim(self, now_s: float, spare: Container[Hashable] = NOTHING) -> Hashable | None:
        """The leaf to go next, never one of `spare` (chunks being read, or the prompt that room is made for); None if
        there is none. Changes nothing that is held: the caller removes it."""
        ...
