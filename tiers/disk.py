"""The disk tier: one file a cell, below `<path>/cells/<2 hex>/<extent name>.<shard>.<position>`. Survives a restart.

A file is written under a name of its own and renamed when whole. Nothing is ever fsynced: this is a cache, and what a
power cut leaves half-written is found by the checksum that every read verifies. At start the bookkeeping is made again
from names, sizes and modification times (each use sets them, so the order of use survives), and what is over the budget
goes. One process owns a directory at a time, by a lock file.
Raises `Invalid` (setting disk_path) at start if the directory cannot be used, then what the port says: `Missing`
when a file was taken away, `Unusable` for wrong bytes, else `Unavailable` (full, or kind `io`: read-only, failing).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lmcache_s3.errors import Invalid, Missing, Unavailable, Unusable
from lmcache_s3.tiers.lru import CellKey, LRUTier, key_of
from lmcache_s3.tiers.verify import verify, where
from lmcache_s3.types import Buffer, CellRef, ExtentName

_FILE = re.compile(r"(.+)\.(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})", re.ASCII)
_TEMPORARY = ".writing-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskTier(LRUTier[Path]):
    """Cells in files, at most `budget_bytes` of them (file contents; directories and block rounding are not counted).

    clock_ns: wall clock in nanoseconds, for modification times only.
    """

    def __init__(self, path: str | os.PathLike[str], budget_bytes: int, *, clock_ns: Callable[[], int] = time.time_ns):
        super().__init__("disk", budget_bytes)
        self._root = Path(path)
        self._cells = self._root / "cells"
        self._clock_ns = clock_ns
        self._last_ns = 0
        self._serial = itertools.count()
        try:
            self._cells.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise Invalid(
                f"disk_path={self._root}: {e.strerror}; give a directory that can be written",
                kind="setting",
                key="disk_path",
            ) from e
        try:
            self._own()
            self._restore(self._scan())
        except BaseException:
            os.close(self._lock_fd)
            raise

    def _own(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise Invalid(
                f"disk_path={self._root} is in use by another process; give each its own directory",
                kind="setting",
                key="disk_path",
            ) from e

    def _scan(self) -> Iterator[tuple[CellKey, Path, int]]:
        """What earlier processes left, least recently used first. Half-written files go; strangers are left alone."""
        found: list[tuple[int, CellKey, Path, int]] = []
        try:
            for folder in sorted(self._cells.iterdir()):
                for entry in os.scandir(folder) if folder.is_dir() else ():
                    if entry.name.startswith(_TEMPORARY):
                        os.unlink(entry.path)
                        continue
                    key = _parse(entry.name)
                    if key is None or entry.name[:2] != folder.name or not entry.is_file(follow_symlinks=False):
                        continue
                    info = entry.stat(follow_symlinks=False)
                    found.append((info.st_mtime_ns, key, Path(entry.path), info.st_size))
        except OSError as e:
            raise Invalid(f"disk_path={self._root}: {e.strerror}", kind="setting", key="disk_path") from e
        found.sort(key=lambda one: one[0])
        self._last_ns = found[-1][0] if found else 0
        for _, key, file, n_bytes in found:
            yield key, file, n_bytes

    def _write(self, cell: CellRef, data: Buffer) -> Path:
        file = self._file(key_of(cell))
        temporary = file.with_name(f"{_TEMPORARY}{os.getpid()}-{next(self._serial)}")
        try:
            file.parent.mkdir(exist_ok=True)
            with open(temporary, "xb", buffering=0) as f:
                view = memoryview(data).cast("B")
                while view.nbytes:
                    view = view[f.write(view) :]
            stamp = self._next_ns()
            os.utime(temporary, ns=(stamp, stamp))
            os.rename(temporary, file)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise self._unavailable(e) from e
        return file

    def _read(self, cell: CellRef, held: Path) -> Buffer:
        try:
            with open(held, "rb", buffering=0) as f:
                n_bytes = os.fstat(f.fileno()).st_size
                if n_bytes != cell.length:  # before memory is allocated
                    kind = "truncated" if n_bytes < cell.length else "oversized"
                    raise Unusable(f"{where(cell)} has {n_bytes} bytes on disk", kind=kind, key=str(cell.extent))
                buffer = np.empty(n_bytes, np.uint8).data
                filled = 0
                while filled < n_bytes:
                    got = f.readinto(buffer[filled:])
                    if not got:
                        raise Unusable(f"{where(cell)} was cut short", kind="truncated", key=str(cell.extent))
                    filled += got
        except FileNotFoundError as e:
            raise Missing(f"{where(cell)} is gone from the disk", key=str(cell.extent)) from e
        except OSError as e:
            raise self._unavailable(e) from e
        data = buffer.toreadonly()
        verify(cell, data)
        return data

    def _drop(self, key: CellKey, held: Path) -> None:
        try:
            os.unlink(held)
        except FileNotFoundError:
            pass
        except OSError as e:
            raise self._unavailable(e) from e

    def _touched(self, held: Path) -> None:
        stamp = self._next_ns()
        with contextlib.suppress(OSError):  # an order of use that is a little wrong harms nobody
            os.utime(held, ns=(stamp, stamp))

    def _next_ns(self) -> int:
        """A modification time above all earlier ones, so that the order of use can be read off the files."""
        self._last_ns = max(self._last_ns + 1, self._clock_ns())
        return self._last_ns

    def _file(self, key: CellKey) -> Path:
        name = str(key[0])
        return self._cells / name[:2] / f"{name}.{key[1]}.{key[2]}"

    def _unavailable(self, e: OSError) -> Unavailable:
        kind = "full" if e.errno in _FULL else "io"
        return Unavailable(f"disk_path={self._root}: {e.strerror}", kind=kind, key="disk_path")

    def close(self) -> None:
        """Files stay; the directory may be used by another process."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._lock_fd)


def _parse(text: str) -> CellKey | None:
    m = _FILE.fullmatch(text)
    if m is None:
        return None
    try:
        return (ExtentName.parse(m[1]), int(m[2]), int(m[3]))
    except Unusable:
        return None
