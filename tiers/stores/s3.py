"""S3: ranged reads into a given buffer, and one conditional PutObject per create, never multipart.

Objects go over connections of our own (`s3_calls`), signed as boto3 would (`s3_place`); boto3 itself lists.

Invariants: a create is sent once, so 412 means that somebody else's object is there; 409, 5xx, timeouts and cut
connections are `Outcome.UNKNOWN`. Bytes returned are exactly the range asked for: the length and the answered range are
checked, also of servers that ignore `Range`. Raises what the port says (`s3_errors`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lmcache_s3.errors import Invalid, LMCacheS3Error, Unavailable, Unusable
from lmcache_s3.tiers.stores.http_connection import Trouble
from lmcache_s3.tiers.stores.http_head import Garbled
from lmcache_s3.tiers.stores.http_pool import Answer
from lmcache_s3.tiers.stores.keys import check_key, check_prefix, check_range
from lmcache_s3.tiers.stores.options import StoreOptions
from lmcache_s3.tiers.stores.s3_calls import Call, Caller
from lmcache_s3.tiers.stores.s3_errors import CLIENT_ERRORS, Refused, mapped
from lmcache_s3.tiers.stores.s3_place import Account
from lmcache_s3.types import Buffer, ObjectInfo, Outcome

T = TypeVar("T")

MAX_PUT_BYTES = 5 << 30
"""The most one PutObject takes."""

_PAGE = 1000
_BLOCK_BYTES = 4 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(?:\d{1,18}|\*)", re.ASCII)


class S3Store:
    """An `ObjectStore` over `s3://bucket/prefix`. Safe for many threads; connections are pooled and kept."""

    def __init__(self, bucket: str, prefix: str = "", *, options: StoreOptions = StoreOptions()) -> None:  # noqa: B008
        self._bucket = bucket
        self._prefix = check_key(prefix.strip("/")) + "/" if prefix.strip("/") else ""
        self._closed = False
        self._endpoint = options.endpoint_url or "AWS S3"
        if options.ca_bundle is not None and not os.access(options.ca_bundle, os.R_OK):
            raise Invalid(
                f"{self.url}: ca_bundle {options.ca_bundle!r} cannot be read; name a PEM file",
                kind="setting",
                key="ca_bundle",
            )
        with self._mapping(None):
            try:
                self._account = Account(bucket, options)
            except ValueError as e:
                raise Invalid(
                    f"{self.url}: endpoint_url {options.endpoint_url!r} is not a URL such as https://host:9000",
                    kind="setting",
                    key="endpoint_url",
                ) from e
        self._endpoint = str(self._account.client.meta.endpoint_url)
        self._caller = Caller(self._account, options)

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def check(self) -> None:
        """One LIST; raises `Invalid(bucket | credentials | permission)` or `Unavailable`."""
        self._open()
        with self._mapping(None):
            self._caller.find()  # what is wrong with proxy or ca_bundle is said once, in our words
            self._account.client.list_objects_v2(
                Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1, **self._account.list_arguments
            )

    def get(self, key: str, start: int = 0, end: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        check_range(key, start, end)
        path = self._path(key)
        if end == start:
            return b""

        def receive(answer: Answer) -> bytes:
            n_bytes = self._place(answer, key, start, end)
            if limit_bytes is not None and n_bytes > limit_bytes:
                raise Unusable(
                    f"{self._where(key)}: {n_bytes} bytes, more than the {limit_bytes} it may have",
                    kind="oversized",
                    key=key,
                )
            return _read(answer, n_bytes)

        return self._call(Call("GET", path, _range(start, end)), receive, key)

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        view = into.cast("B")
        end = start + len(view)
        check_range(key, start, end)
        path = self._path(key)
        if not view:
            return

        def receive(answer: Answer) -> None:
            self._place(answer, key, start, end)
            answer.fill(view)

        self._call(Call("GET", path, _range(start, end)), receive, key)

    def put(self, key: str, data: Buffer) -> None:
        self._call(Call("PUT", self._path(key), {}, _body(data, key)), _nothing, key)

    def create(self, key: str, data: Buffer) -> Outcome:
        """As the port says. Raises `Invalid` only where the store refused; `Unavailable(closed)` before sending."""
        call = Call("PUT", self._path(key), {"If-None-Match": "*"}, _body(data, key), once=True)
        try:
            self._caller.call(call, _nothing)
        except CLIENT_ERRORS as e:
            if isinstance(e, Refused) and e.status == 412:
                return Outcome.LOST
            error = self._mapped(e, key)
            if isinstance(error, Invalid):
                raise error from e
            return Outcome.UNKNOWN
        return Outcome.WON

    def delete(self, key: str) -> None:
        call = Call("DELETE", self._path(key), {})
        with self._mapping(key):
            try:
                self._caller.call(call, _nothing)
            except Refused as e:
                if e.code != "NoSuchKey":
                    raise

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        self._open()
        return self._list(prefix, start_after, limit)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._caller.close()
            self._account.client.close()

    def _list(self, prefix: str, start_after: str, limit: int | None) -> Iterator[ObjectInfo]:
        if limit is not None and limit <= 0:
            return
        arguments: dict[str, Any] = {
            "Bucket": self._bucket,
            "Prefix": self._prefix + prefix,
            **self._account.list_arguments,
        }
        if start_after:
            arguments["StartAfter"] = self._prefix + start_after
        left = limit
        while True:
            self._open()
            with self._mapping(None):
                self._caller.find()
                page = self._account.client.list_objects_v2(**arguments, MaxKeys=min(left or _PAGE, _PAGE))
            for entry in page.get("Contents", ()):
                key = entry["Key"][len(self._prefix) :]
                if not key or key.endswith("/"):
                    continue  # a "directory" made by another tool
                yield ObjectInfo(key, entry["Size"], entry["LastModified"].timestamp())
                if left is not None:
                    left -= 1
                    if left == 0:
                        return
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def _call(self, call: Call, receive: Callable[[Answer], T], key: str) -> T:
        with self._mapping(key):
            return self._caller.call(call, receive)

    def _place(self, answer: Answer, key: str, start: int, end: int | None) -> int:
        """Check what was answered and skip to `start`; returns the bytes wanted from there."""
        length = answer.length
        if length is None:
            raise Unavailable(f"{self._where(key)}: {self._endpoint} gave no length", kind="network", key=key)
        if answer.status == 206:
            match = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
            if match is None or int(match[1]) != start or int(match[2]) - start + 1 != length:
                raise Unavailable(
                    f"{self._where(key)}: {self._endpoint} answered another range than asked", kind="network", key=key
                )
        elif start > 0 or end is not None:  # the server ignored Range: the whole object comes
            if start >= length:
                raise self._truncated(key, length, end or start + 1)
            _skip(answer, start)
            length -= start
            length = length if end is None else min(length, end - start)
        if end is not None and length < end - start:
            raise self._truncated(key, start + length, end)
        if end is not None and length > end - start:
            raise Unavailable(f"{self._where(key)}: more bytes than asked for", kind="network", key=key)
        return length

    def _path(self, key: str) -> str:
        """The key below the bucket. Every verb begins with it."""
        check_key(key)
        self._open()
        return self._prefix + key

    def _open(self) -> None:
        if self._closed:
            raise Unavailable(f"{self.url}: closed", kind="closed")

    def _where(self, key: str | None) -> str:
        return self.url if key is None else f"{self.url}/{key}"

    def _truncated(self, key: str, size: int, wanted: int) -> Unusable:
        return Unusable(
            f"{self._where(key)}: {size} bytes, fewer than the {wanted} it should have", kind="truncated", key=key
        )

    def _mapped(self, error: Exception, key: str | None) -> LMCacheS3Error:
        return mapped(error, where=self._where(key), bucket=self._bucket, endpoint=self._endpoint, key=key)

    @contextlib.contextmanager
    def _mapping(self, key: str | None) -> Iterator[None]:
        try:
            yield
        except CLIENT_ERRORS as e:
            raise self._mapped(e, key) from e


def _range(start: int, end: int | None) -> dict[str, str]:
    if start == 0 and end is None:
        return {}
    return {"Range": f"bytes={start}-" if end is None else f"bytes={start}-{end - 1}"}


def _read(answer: Answer, n_bytes: int) -> bytes:
    """By blocks: `n_bytes` is the server's word, and no reason to allocate as much before it comes."""
    blocks = []
    while n_bytes:
        block = bytearray(min(n_bytes, _BLOCK_BYTES))
        answer.fill(memoryview(block))
        blocks.append(block)
        n_bytes -= len(block)
    return b"".join(blocks)


def _skip(answer: Answer, n_bytes: int) -> None:
    block = memoryview(bytearray(min(n_bytes, _BLOCK_BYTES)))
    while n_bytes:
        n = min(n_bytes, len(block))
        answer.fill(block[:n])
        n_bytes -= n


def _body(data: Buffer, key: str) -> memoryview:
    view = memoryview(data).cast("B")
    if len(view) > MAX_PUT_BYTES:
        raise Invalid(
            f"key {key!r}: {len(view)} bytes; one PUT takes at most {MAX_PUT_BYTES}", kind="argument", key=key
        )
    return view


def _nothing(answer: Answer) -> None:
    """Of an answer that says no more than its status. What cannot be read of its body is not missed."""
    with contextlib.suppress(Trouble, Garbled):
        answer.small()
