"""The published state of one process, and look-ups in it.

Immutable tables behind one reference: the applier publishes by one assignment, a look-up takes the reference once and
sees one consistent version for as long as it looks. Look-ups do no I/O, take no lock and run in microseconds. Hidden
extents (found damaged here) are left out at once; pins (extents in use here) are counted beside the state.
Raises nothing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import overload

import numpy as np

from lmcache_s3.index.manifest import EMPTY, State
from lmcache_s3.index.table import Array, keys_of
from lmcache_s3.types import HASH_BYTES, ChunkRef, ExtentName

_NOBODY_HIDDEN = np.empty(0, np.int64)
_chunk_ref = partial(tuple.__new__, ChunkRef)
"""A `ChunkRef` of its three parts in a tuple: twice as fast as its constructor; a long prompt needs hundreds."""


class Matched(Sequence[ChunkRef]):
    """A run of chunks found in one state. Its length is known at once; chunks and records are made when asked for."""

    __slots__ = ("_chunks", "_hashes", "_rows", "_state")

    def __init__(self, state: State, rows: Array, hashes: Sequence[bytes]) -> None:
        self._state, self._rows, self._hashes = state, rows, hashes
        self._chunks: list[ChunkRef] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> ChunkRef: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[ChunkRef]: ...
    def __getitem__(self, i: int | slice) -> ChunkRef | Sequence[ChunkRef]:
        if self._chunks is None and isinstance(i, slice):
            return Matched(self._state, self._rows[i], self._hashes[i])
        return self._all()[i]

    def __iter__(self) -> Iterator[ChunkRef]:
        return iter(self._all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Matched({len(self)} chunks at version {self._state.version})"

    def _all(self) -> list[ChunkRef]:
        """Chunks of one extent share its record."""
        if self._chunks is None:
            a = self._state.arrays
            owners = a.rows.owner[self._rows]
            positions = (self._rows - a.owners.starts[owners]).tolist()
            listed = owners.tolist()
            records = {owner: self._state.record(owner) for owner in dict.fromkeys(listed)}
            parts = zip(self._hashes, map(records.__getitem__, listed), positions, strict=True)
            self._chunks = list(map(_chunk_ref, parts))
        return self._chunks


class Replica:
    """All methods may be called from any thread; `publish` from the applier only."""

    def __init__(self) -> None:
        self._view = (EMPTY, _NOBODY_HIDDEN)
        """The state, and its extents that are hidden: one reference, so that they fit each other."""
        self._hidden: frozenset[ExtentName] = frozenset()
        self._pins: Counter[ExtentName] = Counter()
        self._lock = threading.Lock()
        self.match([bytes(HASH_BYTES)])  # compiles what look-ups need, now rather than in the first

    @property
    def state(self) -> State:
        return self._view[0]

    def publish(self, state: State) -> None:
        with self._lock:
            if self._hidden:
                self._hidden = frozenset(name for name in self._hidden if name in state.extents)
            self._view = (state, _owners(state, self._hidden))

    def match(self, hashes: Sequence[bytes]) -> Sequence[ChunkRef]:
        """The longest known run from the first hash on (16 bytes each)."""
        state, hidden = self._view
        rows = np.empty(len(hashes), np.int64)
        n = state.match(keys_of(hashes), hidden, rows)
        return Matched(state, rows[:n], hashes[:n])

    def find(self, prefix_hash: bytes) -> ChunkRef | None:
        found = self.match([prefix_hash])
        return found[0] if found else None

    def hide(self, name: ExtentName) -> None:
        """Match this extent no more; forgotten once the manifest no longer names it (names are used once)."""
        with self._lock:
            self._set_hidden(self._hidden | {name})

    def show(self, name: ExtentName) -> None:
        """Take back `hide`: the extent proved right after all."""
        with self._lock:
            self._set_hidden(self._hidden - {name})

    def _set_hidden(self, names: frozenset[ExtentName]) -> None:
        self._hidden = names
        self._view = (self.state, _owners(self.state, names))

    @property
    def hidden(self) -> frozenset[ExtentName]:
        return self._hidden

    @contextmanager
    def pin(self, names: Iterable[ExtentName]) -> Iterator[None]:
        """Count these extents as in use while the context lasts."""
        names = tuple(names)
        with self._lock:
            self._pins.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._pins.subtract(names)
                for name in names:
                    if not self._pins[name]:
                        del self._pins[name]

    def pinned(self) -> frozenset[ExtentName]:
        with self._lock:
            return frozenset(self._pins)


def _owners(state: State, names: Iterable[ExtentName]) -> Array:
    found = [owner for name in names if (owner := state.owner_of(name)) is not None]
    return np.array(found, np.int64) if found else _NOBODY_HIDDEN
