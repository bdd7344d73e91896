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

from lmcache_s3.index.manifest import EMPTY, State
from lmcache_s3.types import ChunkRef, ExtentName


class Replica:
    """All methods may be called from any thread; `publish` from the applier only."""

    def __init__(self) -> None:
        self._state = EMPTY
        self._hidden: frozenset[ExtentName] = frozenset()
        self._pins: Counter[ExtentName] = Counter()
        self._lock = threading.Lock()

    @property
    def state(self) -> State:
        return self._state

    def publish(self, state: State) -> None:
        self._state = state
        if self._hidden:
            with self._lock:
                self._hidden = frozenset(name for name in self._hidden if name in state.extents)

    def match(self, hashes: Sequence[bytes]) -> list[ChunkRef]:
        """The longest known run from the first hash on (16 bytes each)."""
        chunks, hidden = self._state.chunks, self._hidden
        out: list[ChunkRef] = []
        for prefix_hash in hashes:
            refs = chunks.get(prefix_hash)
            if refs is None:
                break
            ref = refs[0] if not hidden else next((r for r in refs if r.extent.name not in hidden), None)
            if ref is None:
                break
            out.append(ref)
        return out

    def find(self, prefix_hash: bytes) -> ChunkRef | None:
        found = self.match([prefix_hash])
        return found[0] if found else None

    def hide(self, name: ExtentName) -> None:
        """Match this extent no more; forgotten once the manifest no longer names it (names are used once)."""
        with self._lock:
            self._hidden |= {name}

    def show(self, name: ExtentName) -> None:
        """Take back `hide`: the extent proved right after all."""
        with self._lock:
            self._hidden -= {name}

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
