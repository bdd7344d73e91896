"""The disk tier: cells in segment files (`segments.py`), and a journal that is their index. Survives a restart.

`put` returns when both have been given to the kernel: a killed process loses nothing that was kept. Nothing is ever
fsynced: this is a cache, and what a power cut leaves half-written is found by the checksum that every read verifies.
At start the bookkeeping is made again from the journal alone, in order of use; what is not in it is freed, and what is
over the budget goes. One process owns a directory at a time, by a lock file.

Why so: a file a cell costs an inode, an open and a stat at start (measured beside it: `bench tiers`); a file an extent
would need holes as well, since cells are evicted one by one; and a log whose live cells are copied forward writes them
more than once, unless their age alone says what goes.
Raises `Invalid` (setting disk_path) at start if the directory cannot be used, then what the port says: `Missing`
when a file was taken away, `Unusable` for wrong bytes, else `Unavailable` (full, or kind `io`: read-only, failing).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lmcache_s3.errors import Invalid, Missing, Unavailable, Unusable
from lmcache_s3.tiers.budgeted import BudgetedTier, Entry
from lmcache_s3.tiers.buffers import BufferPool
from lmcache_s3.tiers.eviction.base import EvictionPolicy, Item
from lmcache_s3.tiers.journal import (
    GRAIN_BYTES,
    RECORD_BYTES,
    Held,
    JournalFile,
    Known,
    can_hold,
    encode_cell,
    encode_gone,
    encode_held,
    encode_used,
)
from lmcache_s3.tiers.segments import SEGMENT_BYTES, Segments, runs_of
from lmcache_s3.tiers.verify import verify, where
from lmcache_s3.types import Buffer, CellRef

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OLD_FILE = re.compile(r"\.writing-.*|[0-9a-f]{32}\.[^/]+-[0-9a-f]{32}\.[0-9]+\.[0-9]+", re.ASCII)

FIXED_BYTES = 128 << 10
"""Of the budget, for directories, the lock and the journal's slack."""
CELL_BYTES = 512
"""Of the budget for each cell besides its bytes: its records in the journal (and in a new one while that is rewritten),
its share of the file system's own."""
_SLACK_BYTES = 64 << 10
_NOTES = 256
_READ_BYTES = 2 << 20
"""Most that is read at once: cells are verified while they are still in the processor's cache, or nearly."""


class DiskTier(BudgetedTier[Held]):
    """Cells on disk, which with all that belongs to them take at most `budget_bytes` of its blocks.

    clock: wall clock in seconds, for the order of use only; what was noted as used later than now counts as used now.
    keep_buffers_bytes: memory kept for the next reads, besides what those under way need.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        budget_bytes: int,
        *,
        eviction: EvictionPolicy | None = None,
        chunk_tokens: int = 256,
        clock: Callable[[], float] = lambda: time.time_ns() / 1e9,
        segment_bytes: int = SEGMENT_BYTES,
        keep_buffers_bytes: int = 64 << 20,
    ) -> None:
        super().__init__("disk", budget_bytes, eviction=eviction, chunk_tokens=chunk_tokens, clock=clock)
        if budget_bytes <= FIXED_BYTES:
            raise Invalid(
                f"disk_bytes={budget_bytes}: a disk tier needs more than {FIXED_BYTES >> 10}KiB",
                kind="setting",
                key="disk_bytes",
            )
        self._most_bytes = budget_bytes - FIXED_BYTES
        self._root = Path(path)
        self._buffers = BufferPool(keep_buffers_bytes)
        self._journal_lock = threading.Lock()  # taken after the tier's own, where both are
        self._journal = JournalFile(self._root / "journal")
        self._gone: list[int] = []
        self._used_s: dict[int, float] = {}
        self._uses = 0
        self._next_id = 0
        try:
            (self._root / "segments").mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise self._invalid(f"{e.strerror}; give a directory that can be written") from e
        try:
            self._own()
            self._segments = Segments(self._root / "segments", segment_bytes)
            with _without_collector():
                self._load()
        except OSError as e:
            os.close(self._lock_fd)
            raise self._invalid(f"{e.strerror}; give a directory that can be written") from e
        except BaseException:
            os.close(self._lock_fd)
            raise

    def _invalid(self, why: str) -> Invalid:
        return Invalid(f"disk_path={self._root}: {why}", kind="setting", key="disk_path")

    def _own(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise Invalid(
                f"disk_path={self._root} is in use by another process; give each its own directory",
                kind="setting",
                key="disk_path",
            ) from e

    # --- at start

    def _load(self) -> None:
        """Raises `OSError`."""
        _remove_old_layout(self._root / "cells")
        contents = self._journal.read()
        self._next_id = contents.next_id
        latest: dict[bytes, tuple[Held, Known]] = {}  # of each place
        for held, known in contents.held.values():
            latest[known.place] = held, known
        found = sorted(latest.values(), key=lambda one: one[0].used_s)
        now_s = self._clock()
        for held, _ in found:  # the clock was wrong once: else ours would stand still until it is that late
            if not held.used_s <= now_s:
                held.used_s = now_s
        there = self._segments.recover([held.place for held, _ in found])
        n_tokens = self._chunk_tokens
        self._restore(
            (
                Item(
                    known.place,
                    known.parent,
                    known.first_token + known.position * n_tokens,
                    _room(held.place.n_bytes),
                ),
                known.extent,
                held,
                held.used_s,
            )
            for (held, known), here in zip(found, there, strict=True)
            if here
        )
        self._journal.open(contents.n_bytes)  # also behind torn frames: what follows them is found again
        if contents.torn or len(self._entries) < len(contents.held) or self._too_long(contents.n_bytes):
            with contextlib.suppress(OSError):  # a full disk: then later
                self._rewrite()

    # --- hooks

    def _room_of(self, length: int) -> int:
        return _room(length)

    def _can_hold(self, cell: CellRef) -> bool:
        return can_hold(cell)

    def _allot(self, cell: CellRef, n_bytes: int) -> Held | None:
        try:
            place = self._segments.allot(cell.length)
        except OSError as e:
            raise self._unavailable(e) from e
        self._next_id += 1
        return Held(self._next_id - 1, self._last_s, cell.extent.codec, encode_cell(cell, place), place)

    def _write(self, cells: Sequence[tuple[CellRef, Held, Buffer]]) -> None:
        try:
            self._segments.write([(kept.place, data) for _, kept, data in cells])
            frames = encode_held([kept for _, kept, _ in cells])
            with self._journal_lock:
                self._journal.append(frames)
                for _, kept, _ in cells:
                    kept.recorded = True
                too_long = self._too_long(self._journal.n_bytes)
        except OSError as e:
            raise self._unavailable(e) from e
        if too_long:
            with self._lock:
                self._shorten()

    def _read(self, cells: Sequence[tuple[CellRef, Held]]) -> list[Buffer | Unusable]:
        out: list[Buffer | Unusable] = []
        for run in _bounded(runs_of([kept.place for _, kept in cells]), [cell.length for cell, _ in cells]):
            some = cells[run.start : run.stop]
            places = [kept.place for _, kept in some]
            buffer = self._buffers.take(places[-1].start + places[-1].n_bytes - places[0].start)
            try:
                came = self._segments.read(places, buffer)
            except OSError as e:
                raise self._unavailable(e) from e
            for (cell, _), place, n_bytes in zip(some, places, came, strict=True):
                start = place.start - places[0].start
                out.append(_judge(cell, buffer[start : start + max(n_bytes, 0)].toreadonly(), gone=n_bytes < 0))
        return out

    def _drop(self, held: Held, n_bytes: int) -> int:
        try:
            self._segments.free(held.place)
        except OSError as e:
            raise self._unavailable(e) from e
        if held.recorded:
            held.recorded = False  # no new journal has it
            self._gone.append(held.id)
            self._used_s.pop(held.id, None)
            if len(self._gone) >= _NOTES:
                self._note()
        return n_bytes

    def _used(self, entries: Sequence[Entry[Held]], now_s: float) -> None:
        for entry in entries:
            entry.held.used_s = now_s
            self._used_s[entry.held.id] = now_s
        self._uses += len(entries)
        if self._uses >= _NOTES:
            self._note()

    # --- the journal, with the tier's lock

    def _note(self) -> None:
        """Write down what went and what was used. If that fails, a restart finds out by itself, or does not know."""
        frames = encode_gone(self._gone) if self._gone else b""
        by_time: dict[float, list[int]] = {}
        for one, used_s in self._used_s.items():
            by_time.setdefault(used_s, []).append(one)
        frames += b"".join(encode_used(ids, used_s) for used_s, ids in by_time.items())
        self._gone.clear()
        self._used_s.clear()
        self._uses = 0
        with self._journal_lock, contextlib.suppress(OSError):
            self._journal.append(frames)
        if self._too_long(self._journal.n_bytes):  # who only reads writes notes, too
            self._shorten()

    def _shorten(self) -> None:
        with contextlib.suppress(OSError):  # then it is tried again after the next
            self._rewrite()

    def _too_long(self, n_bytes: int) -> bool:
        return n_bytes > 2 * len(self._entries) * RECORD_BYTES + _SLACK_BYTES

    def _rewrite(self) -> None:
        """A new journal of what is held now. Raises `OSError`; the old one goes on then."""
        with self._journal_lock:
            held = [entry.held for entry in self._entries.values() if entry.held.recorded]
            self._journal.rewrite(encode_held(held))
            self._gone.clear()
            self._used_s.clear()

    def _unavailable(self, e: OSError) -> Unavailable:
        kind = "full" if e.errno in _FULL else "io"
        return Unavailable(f"disk_path={self._root}: {e.strerror}", kind=kind, key="disk_path")

    def blocks_bytes(self) -> int:
        """What all its files take on the disk, as the file system counts, at one moment: nothing is freed or allotted
        while they are looked at, so it is at most the budget."""
        total = 0
        with self._lock, self._journal_lock:
            for folder, _, files in os.walk(self._root):
                for name in files:
                    with contextlib.suppress(FileNotFoundError):
                        total += os.stat(os.path.join(folder, name)).st_blocks * 512
        return total

    def close(self) -> None:
        """Files stay; the directory may be used by another process."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._note()
                with self._journal_lock:
                    self._journal.close()
                self._segments.close()
                self._buffers.close()
                os.close(self._lock_fd)


def _room(length: int) -> int:
    return -(-(length + CELL_BYTES) // GRAIN_BYTES) * GRAIN_BYTES


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Looking for cycles over and over while objects are made by the hundred thousand takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _judge(cell: CellRef, data: Buffer, *, gone: bool) -> Buffer | Unusable:
    if gone:
        return Missing(f"{where(cell)} is gone from the disk", key=str(cell.extent))
    try:
        verify(cell, data)
    except Unusable as e:
        return e
    return data


def _bounded(runs: Sequence[range], lengths: Sequence[int]) -> Iterator[range]:
    """The same runs, cut where one would be read in too large a piece."""
    for run in runs:
        first, n_bytes = run.start, 0
        for i in run:
            if i > first and n_bytes + lengths[i] > _READ_BYTES:
                yield range(first, i)
                first, n_bytes = i, 0
            n_bytes += lengths[i]
        yield range(first, run.stop)


def _remove_old_layout(folder: Path) -> None:
    """There used to be a file a cell below `cells/`: nothing reads those any more. Strangers' files stay."""
    if not folder.is_dir():
        return
    for part in list(folder.iterdir()):
        if part.is_dir() and not part.is_symlink():
            for file in list(part.iterdir()):
                if _OLD_FILE.fullmatch(file.name):
                    file.unlink()
            with contextlib.suppress(OSError):  # not empty
                part.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
