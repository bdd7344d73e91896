"""Files of cells on disk, written from front to back, from which what is evicted is cut out where it lies.

Cells begin at multiples of 4 KiB and are never moved; a place is used once. Freeing one punches a hole into its
segment: its blocks go back to the file system at once, nothing is copied, and an empty segment is removed. Where the
file system cannot punch holes, every cell gets a segment of its own. Nothing is fsynced.
`allot` and `free` are called with their owner's lock, `read` and `write` without. Raises `OSError`.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from lmcache_s3.tiers.journal import GRAIN_BYTES, Place
from lmcache_s3.types import Buffer

SEGMENT_BYTES = 64 << 20
_FILE = re.compile(r"(0|[1-9][0-9]{0,8})\.cells", re.ASCII)
_MOST = 1 << 30
_OPEN_FILES = 64
_RECENT = 3
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
_IOVECS = 512
_PADDING = bytes(GRAIN_BYTES)


def blocks_of(n_bytes: int) -> int:
    """What a cell takes on disk."""
    return -(-n_bytes // GRAIN_BYTES) * GRAIN_BYTES


class _File:
    """An open segment, closed when nobody uses it any more."""

    def __init__(self, path: Path, flags: int) -> None:
        self.fd = -1
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o644)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Segments:
    """The segments below `folder`, which exists. segment_bytes: a new one is begun when one is as long as that."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._live_bytes: dict[int, int] = {}
        self._current = 0
        self._end = 0
        self._segment_bytes = segment_bytes if _punches(folder) else 1

    def recover(self, wanted: Sequence[Place]) -> list[bool]:
        """Start from what an earlier process left; which of `wanted` may still be there. All else is freed."""
        files: dict[int, os.stat_result] = {}
        for entry in list(os.scandir(self._folder)):
            m = _FILE.fullmatch(entry.name)
            if m is not None and entry.is_file(follow_symlinks=False):
                files[int(m[1])] = entry.stat(follow_symlinks=False)
        sizes = {number: info.st_size for number, info in files.items()}
        live = dict.fromkeys(files, 0)
        there: list[bool] = []
        for segment, start, n_bytes in wanted:  # a hundred thousand, quickly
            here = start + n_bytes <= sizes.get(segment, 0)
            there.append(here)
            if here:
                live[segment] += -(-n_bytes // GRAIN_BYTES) * GRAIN_BYTES
        newest = max(files, default=0)
        untidy: dict[int, list[Place]] = {}
        for number, info in files.items():
            if not live[number]:
                self.path(number).unlink()
                continue
            self._live_bytes[number] = live[number]
            # What a kill cut short lies in the newest. Elsewhere a few blocks more are the file system's own.
            tolerated = 0 if number > newest - _RECENT else 2 * GRAIN_BYTES + live[number] // 128
            if info.st_blocks * 512 > live[number] + tolerated:
                untidy[number] = []
        for place in wanted if untidy else ():
            if place.segment in untidy:
                untidy[place.segment].append(place)
        for number, places in untidy.items():
            self._punch_gaps(number, places, sizes[number])
        self._current = 1 + max([-1, *files, *(one.segment for one in wanted if one.segment < _MOST)])
        return there

    def _punch_gaps(self, number: int, places: Sequence[Place], size: int) -> None:
        """Free what was written, but never entered in the journal."""
        at = 0
        for place in sorted(places):
            if place.start > at:
                self._punch(number, at, place.start - at)
            at = max(at, place.start + blocks_of(place.n_bytes))
        if size > at:
            self._punch(number, at, size - at)

    def allot(self, n_bytes: int) -> Place:
        if self._end and self._end + n_bytes > self._segment_bytes:
            if not self._live_bytes.get(self._current):
                self._remove(self._current)
                self._live_bytes.pop(self._current, None)
            self._current += 1
            self._end = 0
        place = Place(self._current, self._end, n_bytes)
        self._end += blocks_of(n_bytes)
        self._live_bytes[place.segment] = self._live_bytes.get(place.segment, 0) + blocks_of(n_bytes)
        return place

    def free(self, place: Place) -> None:
        left = self._live_bytes[place.segment] - blocks_of(place.n_bytes)
        if left == 0 and (place.segment != self._current or self._segment_bytes == 1):
            self._remove(place.segment)
            self._live_bytes.pop(place.segment, None)
        else:
            self._punch(place.segment, place.start, blocks_of(place.n_bytes))
            self._live_bytes[place.segment] = left

    def write(self, cells: Sequence[tuple[Place, Buffer]]) -> None:
        """Those that lie one after another in one call of the system."""
        for run in runs_of([place for place, _ in cells]):
            vectors: list[Buffer] = []
            for place, data in cells[run.start : run.stop]:
                vectors += [data, _PADDING[: blocks_of(place.n_bytes) - place.n_bytes]]
            first = cells[run.start][0]
            file = self._open(first.segment, create=True)
            at = first.start
            while vectors:
                n = os.pwritev(file.fd, vectors[:_IOVECS], at)
                at += n
                vectors = _after(vectors, n)

    def read(self, places: Sequence[Place], into: Buffer) -> list[int]:
        """Read cells that lie one after another into `into`, one call of the system; how many bytes of each came."""
        first, last = places[0], places[-1]
        view = memoryview(into)[: last.start + last.n_bytes - first.start]
        try:
            file = self._open(first.segment, create=False)
        except FileNotFoundError:
            return [-1] * len(places)
        got = 0
        while got < view.nbytes:
            n = os.preadv(file.fd, [view[got:]], first.start + got)
            if not n:
                break
            got += n
        return [min(max(first.start + got - place.start, 0), place.n_bytes) for place in places]

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def path(self, segment: int) -> Path:
        return self._folder / f"{segment}.cells"

    def _open(self, segment: int, *, create: bool) -> _File:
        with self._lock:
            file = self._files.get(segment)
            if file is not None:
                self._files.move_to_end(segment)
                return file
            file = _File(self.path(segment), os.O_RDWR | (os.O_CREAT if create else 0))
            self._files[segment] = file
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return file

    def _punch(self, segment: int, start: int, n_bytes: int) -> None:
        try:
            file = self._open(segment, create=False)
        except FileNotFoundError:
            return
        _fallocate(file.fd, start, n_bytes)

    def _remove(self, segment: int) -> None:
        with self._lock:
            self._files.pop(segment, None)
        self.path(segment).unlink(missing_ok=True)


def runs_of(places: Sequence[Place]) -> list[range]:
    """Which of these lie one after another in one segment, by index."""
    out: list[range] = []
    for i, place in enumerate(places):
        if out:
            before = places[i - 1]
            if place.segment == before.segment and place.start == before.start + blocks_of(before.n_bytes):
                out[-1] = range(out[-1].start, i + 1)
                continue
        out.append(range(i, i + 1))
    return out


def _after(vectors: Sequence[Buffer], n_bytes: int) -> list[Buffer]:
    """What is left of them after the first `n_bytes`."""
    for i, vector in enumerate(vectors):
        view = memoryview(vector).cast("B")
        if n_bytes < view.nbytes:
            return [view[n_bytes:], *vectors[i + 1 :]]
        n_bytes -= view.nbytes
    return []


_libc = ctypes.CDLL(None, use_errno=True)


def _fallocate(fd: int, start: int, n_bytes: int) -> None:
    done = _libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, ctypes.c_int64(start), ctypes.c_int64(n_bytes))
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _punches(folder: Path) -> bool:
    """Whether the file system gives back the blocks of a hole."""
    probe = folder / "probe"
    try:
        file = _File(probe, os.O_RDWR | os.O_CREAT)
        try:
            os.pwrite(file.fd, b"x" * (2 * GRAIN_BYTES), 0)
            _fallocate(file.fd, 0, GRAIN_BYTES)
            return not any(os.pread(file.fd, GRAIN_BYTES, 0))
        finally:
            probe.unlink()
    except (OSError, AttributeError):  # no such call in this C library
        return False
