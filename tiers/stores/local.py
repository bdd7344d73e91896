"""Objects as files below one directory: the store of tests, of one machine, and of a shared POSIX file system.

Invariants: a key's file is only ever replaced whole (temporary file in the same directory, fsync, then rename or link),
so a reader sees the old bytes or the new ones; when `put` or a won `create` returns, file and directory entries are on
disk. Put-if-absent is `link(2)`, atomic where the file system has hard links. A key cannot be both an object and the
directory of another (`a` and `a/b`): the second is refused as `Invalid(argument)`. Symbolic links and foreign names
are not objects. Raises what the port says, mapped by errno.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from lmcache_s3.errors import Invalid, LMCacheS3Error, Missing, Unavailable, Unsafe, Unusable
from lmcache_s3.tiers.stores.keys import RESERVED_SEGMENT, check_key, check_prefix, check_range, is_key
from lmcache_s3.types import Buffer, ObjectInfo, Outcome

_LINK_UNSUPPORTED = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_PRUNE_RACES = 100
"""How often a directory may vanish under a writer (a concurrent delete prunes empty ones) before we take it for one
that cannot be made (below /proc, say)."""


class LocalStore:
    """An `ObjectStore` over a directory, made on first write. Safe for many threads and processes at once."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        path = Path(root)
        if not path.is_absolute():
            raise Invalid(f"local store {str(root)!r}: the path must be absolute", kind="url", key="url")
        self._root = os.path.normpath(path)
        self._closed = False

    @property
    def url(self) -> str:
        return f"file://{self._root}"

    def check(self) -> None:
        """Raise `Invalid(permission)` or `Invalid(bucket)` unless the directory is, or can be made, readable and
        writable."""
        self._open()
        path = self._root
        while not os.path.lexists(path):
            path = os.path.dirname(path)
        if not os.path.isdir(path):
            raise Invalid(f"{self.url}: {path} is not a directory; name another one", kind="bucket", key="url")
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise Invalid(f"{self.url}: no permission to read and write {path}; chown or chmod it", kind="permission")

    def get(self, key: str, start: int = 0, end: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        check_range(key, start, end)
        with self._reading(key) as (fd, size):
            stop = size if end is None else end
            if stop > size or (start > 0 and start >= size):
                raise _truncated(self.url, key, size, stop)
            if limit_bytes is not None and stop - start > limit_bytes:
                raise Unusable(
                    f"{self.url}/{key}: {stop - start} bytes, more than the {limit_bytes} it may have",
                    kind="oversized",
                    key=key,
                )
            out = bytearray(stop - start)
            _read_exactly(fd, start, memoryview(out), self.url, key, size)
            return bytes(out)

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        view = into.cast("B")
        check_range(key, start, start + len(view))
        with self._reading(key) as (fd, size):
            if start + len(view) > size:
                raise _truncated(self.url, key, size, start + len(view))
            _read_exactly(fd, start, view, self.url, key, size)

    def put(self, key: str, data: Buffer) -> None:
        path = self._path(key)
        with self._mapping(key), self._written(path, data) as temporary:
            os.rename(temporary, path)
            _sync_directory(os.path.dirname(path))

    def create(self, key: str, data: Buffer) -> Outcome:
        """As the port says. Failures before the link (a full disk, no permission) are raised: nothing took effect."""
        path = self._path(key)
        with self._mapping(key), self._written(path, data) as temporary:
            try:
                os.link(temporary, path, follow_symlinks=False)
            except FileExistsError:
                # NFS may answer "exists" to the repetition of a link that took effect: then it is our own file.
                if not _same_file(temporary, path):
                    return Outcome.LOST
            except OSError as e:
                if e.errno in _LINK_UNSUPPORTED:
                    raise Unsafe(
                        f"{self.url}: this file system has no hard links, so two writers could overwrite each other; "
                        "use another one, or single_writer",
                        kind="no_put_if_absent",
                        key=key,
                    ) from e
                if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                    raise
                return Outcome.UNKNOWN
            try:
                _sync_directory(os.path.dirname(path))
            except OSError:
                return Outcome.UNKNOWN  # it is there, but may not survive a power cut
            return Outcome.WON

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._mapping(key):
            try:
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return
            parent = os.path.dirname(path)
            _sync_directory(parent)
            self._prune(parent)

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        self._open()
        return self._list(prefix, start_after, limit)

    def close(self) -> None:
        self._closed = True

    def _list(self, prefix: str, start_after: str, limit: int | None) -> Iterator[ObjectInfo]:
        if limit is not None and limit <= 0:
            return
        for count, info in enumerate(self._walk(prefix.rpartition("/")[0], prefix, start_after), start=1):
            yield info
            if count == limit:
                return
            self._open()

    def _walk(self, directory: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        """Keys below `directory` in code point order: a directory sorts as its name with '/', like the keys in it."""
        path = os.path.join(self._root, directory) if directory else self._root
        with self._mapping(directory):
            try:
                with os.scandir(path) as scan:
                    entries = sorted((e.name + "/" * e.is_dir(follow_symlinks=False), e) for e in scan)
            except (FileNotFoundError, NotADirectoryError):
                return
        base = directory + "/" if directory else ""
        for name, entry in entries:
            key = base + name
            if name.endswith("/"):
                mine = key.startswith(prefix) or prefix.startswith(key)
                if mine and (start_after < key or start_after.startswith(key)):
                    yield from self._walk(key[:-1], prefix, start_after)
            elif key.startswith(prefix) and key > start_after and is_key(key):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # deleted meanwhile
                if stat.S_ISREG(status.st_mode):
                    yield ObjectInfo(key, status.st_size, status.st_mtime)

    def _open(self) -> None:
        if self._closed:
            raise Unavailable(f"{self.url}: closed", kind="closed")

    def _path(self, key: str) -> str:
        self._open()
        return os.path.join(self._root, *check_key(key).split("/"))

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[tuple[int, int]]:
        """An open file and its size in bytes."""
        path = self._path(key)
        with self._mapping(key):
            # NONBLOCK: a FIFO planted in an object's place must not hang us.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise Missing(f"{self.url}/{key}: not there", key=key)
                yield fd, status.st_size
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _written(self, path: str, data: Buffer) -> Iterator[str]:
        """A synced temporary file with these bytes beside `path`; its name is gone afterwards."""
        fd, temporary = self._temporary(os.path.dirname(path))
        try:
            try:
                view = memoryview(data).cast("B")
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def _temporary(self, directory: str) -> tuple[int, str]:
        temporary = os.path.join(directory, RESERVED_SEGMENT + secrets.token_hex(8))
        for _ in range(_PRUNE_RACES):
            try:
                _make_directories(directory)
                return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), temporary
            except FileNotFoundError:
                continue  # a delete pruned the directory between our two steps
        there = directory
        while not os.path.isdir(there):
            there = os.path.dirname(there)
        raise Invalid(f"{self.url}: no directory can be made in {there}; name another path", kind="permission")

    def _prune(self, directory: str) -> None:
        """Remove directories left empty, upwards, sparing the root. Best effort."""
        while len(directory) > len(self._root):
            try:
                os.rmdir(directory)
            except OSError:
                return
            directory = os.path.dirname(directory)

    @contextlib.contextmanager
    def _mapping(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise self._mapped(e, key) from e

    def _mapped(self, e: OSError, key: str) -> LMCacheS3Error:
        where = f"{self.url}/{key}"
        match e.errno:
            case errno.ENOENT | errno.ELOOP:
                return Missing(f"{where}: not there", key=key)
            case errno.ENOTDIR | errno.EISDIR | errno.EEXIST | errno.ENOTEMPTY:
                if e.filename2 is None and e.errno == errno.ENOTDIR:
                    return Missing(f"{where}: not there", key=key)
                return _in_the_way(where, key)
            case errno.ENOSPC | errno.EDQUOT:
                return Unavailable(f"{where}: no space left; free some or lower the budget", kind="full", key=key)
            case errno.EACCES | errno.EPERM | errno.EROFS:
                return Invalid(f"{where}: {e.strerror}; make {e.filename} accessible", kind="permission", key=key)
            case errno.ENAMETOOLONG:
                return Invalid(f"{where}: the path is too long for this file system", kind="argument", key=key)
            case errno.ETIMEDOUT:
                return Unavailable(f"{where}: the file system did not answer in time", kind="timeout", key=key)
            case _:
                return Unavailable(f"{where}: {e.strerror or e}", kind="network", key=key)


def _in_the_way(where: str, key: str) -> Invalid:
    return Invalid(
        f"{where}: a local store cannot hold an object and others below its name; rename one", kind="argument", key=key
    )


def _truncated(url: str, key: str, size: int, wanted: int) -> Unusable:
    return Unusable(f"{url}/{key}: {size} bytes, fewer than the {wanted} it should have", kind="truncated", key=key)


def _read_exactly(fd: int, start: int, into: memoryview, url: str, key: str, size: int) -> None:
    done = 0
    while done < len(into):
        n = os.preadv(fd, [into[done:]], start + done)
        if n == 0:
            raise _truncated(url, key, size, start + len(into))
        done += n


def _same_file(a: str, b: str) -> bool:
    try:
        return os.path.samestat(os.lstat(a), os.lstat(b))
    except FileNotFoundError:
        return False


def _make_directories(directory: str) -> None:
    """Make the directory and its parents; each new entry is synced."""
    if os.path.isdir(directory):
        return
    parent = os.path.dirname(directory)
    if parent != directory:
        _make_directories(parent)
    try:
        os.mkdir(directory)
    except FileExistsError:
        # One look, not two: between "no directory" and "something is there" another writer may make it.
        with contextlib.suppress(FileNotFoundError):  # pruned again: the caller tries again
            if not stat.S_ISDIR(os.stat(directory).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", directory, None, directory) from None
        if os.path.islink(directory) and not os.path.exists(directory):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", directory, None, directory) from None
    else:
        _sync_directory(parent)


def _sync_directory(directory: str) -> None:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # pruned meanwhile: nothing to keep
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
