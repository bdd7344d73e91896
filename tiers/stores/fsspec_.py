"""Any fsspec file system as an object store: memory, Google, Azure, and whatever else is installed.

Reads name both ends of a range (s3fs would ask for the size first); listings are never cached. A create is offered only
where the file system has an exclusive `pipe_file(mode="create")` that is known to be atomic: in memory (under a lock of
ours: its own looks, then writes), s3fs (one PutObject, never multipart, sent once), gcsfs, adlfs; elsewhere it raises
`Unsafe(no_put_if_absent)`. File systems that may send a create twice answer UNKNOWN where others say LOST, since the
object found may be our own. Raises what the port says, mapped by type and status.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import fsspec

from lmcache_s3.errors import Invalid, LMCacheS3Error, Missing, Unavailable, Unsafe, Unusable
from lmcache_s3.tiers.stores.keys import check_key, check_prefix, check_range, is_key
from lmcache_s3.tiers.stores.s3_errors import CLIENT_ERRORS, mapped, status_of
from lmcache_s3.types import Buffer, ObjectInfo, Outcome

MAX_OBJECT_BYTES = 5 << 40
"""End of a range that means "to the end": no store holds larger objects."""
MAX_CREATE_BYTES = 64 << 20
"""Larger bodies would go multipart on some file systems, and then not be put-if-absent."""

_MEMORY_LOCK = threading.RLock()
"""All memory file systems of a process share one dictionary, so they share one lock."""
_CREATES_ONCE = frozenset({"memory", "s3", "s3a"})
_CREATES_REPEATED = frozenset({"gs", "gcs", "az", "abfs", "abfss"})
_FOREIGN_ERRORS = (
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("requests.exceptions", "RequestException"),
)


class FsspecStore:
    """An `ObjectStore` over an fsspec file system and a root path in it. Safe for many threads.

    fs: made for this store alone where it matters (`use_listings_cache=False`); `from_url` does that.
    create_fs: the file system that sends creates, if not `fs` itself: one without retries.
    """

    def __init__(self, fs: Any, root: str, *, create_fs: Any = None) -> None:
        self._fs = fs
        self._create_fs = fs if create_fs is None else create_fs
        self._root = str(fs._strip_protocol(root)).rstrip("/")
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._creates = bool(protocols & (_CREATES_ONCE | _CREATES_REPEATED))
        self._sends_once = bool(protocols & {"memory"}) or (
            bool(protocols & _CREATES_ONCE) and getattr(self._create_fs, "retries", None) == 1
        )
        self._s3 = bool(protocols & {"s3", "s3a"})
        self._guard: Any = _MEMORY_LOCK if "memory" in protocols else contextlib.nullcontext()
        self._errors = _client_errors()
        self._closed = False

    @classmethod
    def from_url(cls, url: str, storage_options: Mapping[str, Any] | None = None) -> FsspecStore:
        """Make the file system too, without listing cache; for s3 a second one that sends a create once."""
        options = {**(storage_options or {}), "use_listings_cache": False, "skip_instance_cache": True}
        fs, root = fsspec.core.url_to_fs(url, **options)
        create_fs = None
        if "s3" in fs.protocol and not isinstance(fs.protocol, str):
            config = {**options.get("config_kwargs", {}), "retries": {"mode": "standard", "total_max_attempts": 1}}
            create_fs, _ = fsspec.core.url_to_fs(url, **{**options, "config_kwargs": config})
            create_fs.retries = 1
        return cls(fs, root, create_fs=create_fs)

    @property
    def url(self) -> str:
        return str(self._fs.unstrip_protocol(self._root))

    def check(self) -> None:
        """List the root once: raises `Invalid(bucket | credentials | permission)` or `Unavailable`."""
        self._open()
        bucket = self._root.lstrip("/").partition("/")[0]
        with self._mapping(None):
            try:
                with self._guard:
                    self._fs.ls(self._root, detail=False)
            except FileNotFoundError as e:
                # Below an existing bucket an empty prefix is as good as any. In memory everything exists.
                if self._guard is _MEMORY_LOCK or (self._root != bucket and self._fs.exists(bucket)):
                    return
                if self._fs.exists(self._root):
                    return
                raise Invalid(f"{self.url}: {bucket!r} does not exist; create it", kind="bucket") from e

    def get(self, key: str, start: int = 0, end: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        check_range(key, start, end)
        path = self._path(key)
        if end == start:
            return b""
        if end is not None and limit_bytes is not None and end - start > limit_bytes:
            raise self._oversized(key, limit_bytes)
        stop = end
        if stop is None and limit_bytes is not None:
            stop = start + limit_bytes + 1  # one byte more tells the oversized object without reading all of it
        elif stop is None and self._s3:
            stop = MAX_OBJECT_BYTES  # else a HEAD goes first; elsewhere it could be allocated
        data = self._range(path, key, start, stop, to_end=end is None)
        if end is None:
            if limit_bytes is not None and len(data) > limit_bytes:
                raise self._oversized(key, limit_bytes)
            if start > 0 and not data:
                raise self._truncated(key, start + 1)
        elif len(data) != end - start:
            raise self._truncated(key, end)
        return data

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        view = into.cast("B")
        view[:] = self.get(key, start, start + len(view))

    def put(self, key: str, data: Buffer) -> None:
        path = self._path(key)
        with self._mapping(key), self._guard:
            self._fs.pipe_file(path, bytes(data))
        self._fs.invalidate_cache()

    def create(self, key: str, data: Buffer) -> Outcome:
        """As the port says; `Unsafe(no_put_if_absent)` where the file system has no atomic create."""
        path = self._path(key)
        if not self._creates:
            raise Unsafe(
                f"{self.url}: fsspec offers no safe put-if-absent there, so two writers could overwrite each other; "
                "set single_writer if only one process ever writes, or use s3://, gs://, az:// or file://",
                kind="no_put_if_absent",
                key=key,
            )
        body = bytes(data)
        if len(body) > MAX_CREATE_BYTES:
            raise Invalid(
                f"key {key!r}: {len(body)} bytes; a create takes at most {MAX_CREATE_BYTES}", kind="argument", key=key
            )
        lost = Outcome.LOST if self._sends_once else Outcome.UNKNOWN
        single = {"chunksize": MAX_CREATE_BYTES} if self._s3 else {}
        try:
            with self._guard:
                self._create_fs.pipe_file(path, body, mode="create", **single)
        except FileExistsError:
            return lost
        except self._errors as e:
            if _status(e) == 412:
                return lost
            error = self._mapped(e, key)
            if isinstance(error, Invalid):
                raise error from e
            return Outcome.UNKNOWN
        return Outcome.WON

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._guard, contextlib.suppress(Missing), self._mapping(key):
            self._fs.rm_file(path)
        self._fs.invalidate_cache()

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        """As the port says, but fsspec has no paging: everything below the prefix's directory is listed at once."""
        check_prefix(prefix)
        self._open()
        return self._list(prefix, start_after, limit)

    def close(self) -> None:
        self._closed = True
        for fs in {id(self._fs): self._fs, id(self._create_fs): self._create_fs}.values():
            client, loop = getattr(fs, "_s3", None), getattr(fs, "loop", None)
            if client is not None and loop is not None and loop.is_running():
                # s3fs would leave its connections to the garbage collector.
                asyncio.run_coroutine_threadsafe(client.close(), loop).result(timeout=5.0)

    def _list(self, prefix: str, start_after: str, limit: int | None) -> Iterator[ObjectInfo]:
        directory = prefix.rpartition("/")[0]
        path = f"{self._root}/{directory}" if directory else self._root
        with self._mapping(None):
            self._fs.invalidate_cache()
            try:
                with self._guard:
                    found = self._fs.find(path, detail=True)
            except FileNotFoundError:
                return
        infos = []
        cut = len(self._root) + 1
        for name, info in found.items():
            key = name[cut:]
            if info.get("type") == "file" and key.startswith(prefix) and key > start_after and is_key(key):
                infos.append(ObjectInfo(key, int(info["size"]), _modified_s(info)))
        infos.sort(key=lambda info: info.key)
        yield from infos if limit is None else infos[: max(limit, 0)]

    def _range(self, path: str, key: str, start: int, stop: int | None, *, to_end: bool) -> bytes:
        with self._mapping(key):
            try:
                with self._guard:
                    data: bytes = self._fs.cat_file(path, start=start, end=stop)
            except self._errors as e:
                if _status(e) != 416:
                    raise
                if to_end and start == 0:
                    return b""  # no range of an empty object satisfies a server
                raise self._truncated(key, start + 1 if to_end or stop is None else stop) from e
            return data

    def _open(self) -> None:
        if self._closed:
            raise Unavailable(f"{self.url}: closed", kind="closed")

    def _path(self, key: str) -> str:
        self._open()
        return f"{self._root}/{check_key(key)}"

    def _where(self, key: str | None) -> str:
        return self.url if key is None else f"{self.url}/{key}"

    def _truncated(self, key: str, wanted: int) -> Unusable:
        return Unusable(f"{self._where(key)}: ends before byte {wanted}", kind="truncated", key=key)

    def _oversized(self, key: str, limit_bytes: int) -> Unusable:
        return Unusable(f"{self._where(key)}: more than the {limit_bytes} bytes it may have", kind="oversized", key=key)

    @contextlib.contextmanager
    def _mapping(self, key: str | None) -> Iterator[None]:
        try:
            yield
        except LMCacheS3Error:
            raise
        except self._errors as e:
            raise self._mapped(e, key) from e

    def _mapped(self, error: BaseException, key: str | None) -> LMCacheS3Error:
        where = self._where(key)
        below = _client_error(error)
        if below is not None:
            bucket = self._root.lstrip("/").partition("/")[0]
            return mapped(below, where=where, bucket=bucket, endpoint="the store", key=key)
        match error:
            case FileNotFoundError():
                return Missing(f"{where}: not there", key=key)
            case PermissionError():
                return Invalid(f"{where}: permission denied; check the credentials", kind="permission", key=key)
            case TimeoutError():
                return Unavailable(f"{where}: no answer in time", kind="timeout", key=key)
            case IsADirectoryError() | NotADirectoryError() | FileExistsError():
                return Invalid(f"{where}: an object's name is also a directory's; rename one", kind="argument", key=key)
        match _status(error):
            case 404:
                return Missing(f"{where}: not there", key=key)
            case 401:
                return Invalid(f"{where}: the store refused the credentials", kind="credentials", key=key)
            case 403:
                return Invalid(f"{where}: permission denied; check the credentials", kind="permission", key=key)
            case 429 | 503:
                return Unavailable(f"{where}: the store is throttling", kind="throttled", key=key)
        return Unavailable(
            f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", kind="network", key=key
        )


def _client_errors() -> tuple[type[BaseException], ...]:
    """Exception classes that the file systems loaded in this process may raise."""
    found: list[type[BaseException]] = [OSError, TimeoutError, *CLIENT_ERRORS]
    for module, name in _FOREIGN_ERRORS:
        if module.partition(".")[0] in sys.modules:
            with contextlib.suppress(ImportError):
                found.append(getattr(importlib.import_module(module), name))
    return tuple(found)


def _client_error(error: BaseException) -> Exception | None:
    """The botocore error at or directly below `error` (s3fs hides them in OSErrors)."""
    for e in (error, error.__cause__):
        if isinstance(e, CLIENT_ERRORS):
            return e
    return None


def _status(error: BaseException) -> int | None:
    """HTTP status of a client's error: botocore's answer, gcsfs' `code`, azure's `status_code`, aiohttp's `status`."""
    for e in (error, error.__cause__):
        if e is None:
            continue
        status = status_of(e)
        for name in ("status_code", "status", "code"):
            if status is None:
                status = getattr(e, name, None)
        if isinstance(status, int):
            return status
    return None


def _modified_s(info: Mapping[str, Any]) -> float:
    """The store's own time stamp, under the name this file system gives it; 0 where it tells none."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.fromisoformat(value).timestamp()
    return 0.0
