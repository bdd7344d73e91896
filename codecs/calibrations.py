"""The calibrations of this process, by digest: registered, or fetched once when a cell first asks for one.

A codec knows a calibration's digest only; here is where it becomes a `Calibration`: from memory, from the local cache
directory, then from the attached sources (buckets), each answer proved by its digest. What was fetched is kept in the
directory, `$XDG_CACHE_HOME/lmcache-s3/calibrations` (default `~/.cache`), if that can be written; beyond 8 GiB those
files go that were read least lately. Thread-safe; `find` may block on a source, one caller at a time. Raises `Unusable`
(calibration) for what nobody has, `Unavailable` for a source that does not answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from lmcache_s3.codecs.calibration import MAX_FILE_BYTES, Calibration
from lmcache_s3.errors import LMCacheS3Error, Unusable

MOST_BYTES = 4 << 30
"""Of arrays kept; beyond it goes what was used least lately."""
MOST_FILE_BYTES = 8 << 30
"""Of files kept in the directory, by all processes."""
_PART_S = 3600.0
"""A file that is being written is older only if its process died."""
_MOST_SOURCES = 64
_MOST_ABSENT = 1024

Fetch = Callable[[str], bytes]
"""Digest → the file's bytes; `Missing` where there is none."""


def key_of(digest: str) -> str:
    """Where a bucket keeps the file, below the cache's root."""
    return f"calibrations/{digest}.safetensors"


class Registry:
    """As the module says. directory: None: no local copies. most_bytes: of arrays kept, most_file_bytes: of files."""

    def __init__(
        self, directory: Path | None, most_bytes: int = MOST_BYTES, most_file_bytes: int = MOST_FILE_BYTES
    ) -> None:
        self._directory, self._most_bytes, self._most_file_bytes = directory, most_bytes, most_file_bytes
        self._lock = threading.Lock()
        self._fetching = threading.Lock()
        self._known: OrderedDict[str, Calibration] = OrderedDict()
        self._sources: OrderedDict[object, Fetch] = OrderedDict()
        self._absent: set[str] = set()

    def register(self, calibration: Calibration) -> str:
        """Make it known; returns its digest."""
        digest = calibration.digest
        with self._lock:
            self._known[digest] = calibration
            self._known.move_to_end(digest)
            self._absent.discard(digest)
            while len(self._known) > 1 and sum(one.nbytes for one in self._known.values()) > self._most_bytes:
                self._known.popitem(last=False)
        return digest

    def attach(self, key: object, fetch: Fetch) -> None:
        """Ask this source, too, for what is not known; one of an equal key is replaced, of 64 the oldest goes."""
        with self._lock:
            self._sources[key] = fetch
            self._sources.move_to_end(key)
            self._absent.clear()
            while len(self._sources) > _MOST_SOURCES:
                self._sources.popitem(last=False)

    def detach(self, key: object) -> None:
        """Ask this source no more."""
        with self._lock:
            self._sources.pop(key, None)

    def known(self, digest: str) -> Calibration | None:
        """The calibration if it is in memory. No I/O."""
        with self._lock:
            found = self._known.get(digest)
            if found is not None:
                self._known.move_to_end(digest)
            return found

    def find(self, digest: str) -> Calibration:
        """The calibration of this digest; the first caller may wait for a source. Raises `Unusable`, `Unavailable`."""
        found = self.known(digest)
        if found is not None:
            return found
        with self._fetching:
            found = self.known(digest)
            if found is None:
                found = self._from_directory(digest) or self._from_sources(digest)
                self.register(found)
        return found

    def _from_sources(self, digest: str) -> Calibration:
        with self._lock:
            sources = list(self._sources.values()) if digest not in self._absent else []
        for fetch in reversed(sources):
            try:
                data = fetch(digest)
            except Unusable:
                continue
            if hashlib.sha256(data).hexdigest() == digest:
                found = Calibration.from_bytes(data)
                self._keep(digest, data)
                return found
        with self._lock:
            if len(self._absent) < _MOST_ABSENT:
                self._absent.add(digest)
        raise Unusable(
            f"calibration {digest} is not at hand: call lmcache_s3.load_calibration(url), url being that of the cache "
            f"that has it or of {key_of(digest)} itself",
            kind="calibration",
            key=key_of(digest),
        )

    def _path(self, digest: str) -> Path | None:
        return None if self._directory is None else self._directory / f"{digest}.safetensors"

    def _from_directory(self, digest: str) -> Calibration | None:
        path = self._path(digest)
        if path is None:
            return None
        with contextlib.suppress(OSError, LMCacheS3Error):
            if path.stat().st_size <= MAX_FILE_BYTES:
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() == digest:
                    found = Calibration.from_bytes(data)
                    with contextlib.suppress(OSError):  # a directory that may only be read
                        os.utime(path)
                    return found
        return None

    def _keep(self, digest: str, data: bytes) -> None:
        """A copy for the next process; whole or absent. A directory that cannot be written costs a fetch, no more."""
        path = self._path(digest)
        if path is None:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                os.replace(name, path)
            except OSError:
                os.unlink(name)
                raise
            self._trim(path)

    def _trim(self, newest: Path) -> None:
        """Files beyond the bound, but not the newest, and what processes that died left half-written."""
        now, left_bytes = time.time(), self._most_file_bytes - newest.stat().st_size
        found = [(path, path.stat()) for path in newest.parent.iterdir() if path != newest]
        for path, stat in sorted(found, key=lambda one: -one[1].st_mtime):
            if path.suffix == ".part":
                drop = stat.st_mtime < now - _PART_S
            else:
                left_bytes -= stat.st_size if path.suffix == ".safetensors" else 0
                drop = path.suffix == ".safetensors" and left_bytes < 0
            if drop:
                path.unlink(missing_ok=True)


def _home() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # no home directory
        return (Path(base) if base else Path.home() / ".cache") / "lmcache-s3" / "calibrations"
    return None


_registry = Registry(_home())
register = _registry.register
attach = _registry.attach
detach = _registry.detach
known = _registry.known
find = _registry.find
