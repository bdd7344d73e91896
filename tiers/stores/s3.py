"""S3 by boto3: ranged reads into a given buffer, and one conditional PutObject per create, never multipart.

Invariants: a create is sent once (client of its own, one attempt), so 412 means that somebody else's object is there;
409, 5xx, timeouts and cut connections are `Outcome.UNKNOWN`. Bytes returned are exactly the range asked for: the length
and the answered range are checked, also of servers that ignore `Range`. Raises what the port says (`s3_errors`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from typing import Any

import boto3
import botocore.awsrequest
import botocore.config
import botocore.exceptions
import botocore.handlers
import botocore.loaders
import botocore.session
import urllib3.exceptions

from lmcache_s3.errors import Invalid, LMCacheS3Error, Unavailable, Unusable
from lmcache_s3.tiers.stores.keys import check_key, check_prefix, check_range
from lmcache_s3.tiers.stores.options import StoreOptions
from lmcache_s3.tiers.stores.s3_errors import CLIENT_ERRORS, mapped, status_of
from lmcache_s3.types import Buffer, ObjectInfo, Outcome

MAX_PUT_BYTES = 5 << 30
"""The most one PutObject takes."""

_PAGE = 1000
_SKIP_BYTES = 1 << 20
_READ_BYTES = 1 << 20
_TOGETHER_BYTES = 1 << 18
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(?:\d+|\*)", re.ASCII)


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
                self._client, self._create_client = _clients(options)
            except ValueError as e:
                raise Invalid(
                    f"{self.url}: endpoint_url {options.endpoint_url!r} is not a URL such as https://host:9000",
                    kind="setting",
                    key="endpoint_url",
                ) from e
        self._endpoint = str(self._client.meta.endpoint_url)

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def check(self) -> None:
        """One LIST; raises `Invalid(bucket | credentials | permission)` or `Unavailable`."""
        self._open()
        with self._mapping(None):
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)

    def get(self, key: str, start: int = 0, end: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        check_range(key, start, end)
        if end == start:
            self._open()
            return b""
        with self._body(key, start, end) as (body, n_bytes):
            if limit_bytes is not None and n_bytes > limit_bytes:
                raise Unusable(
                    f"{self._where(key)}: {n_bytes} bytes, more than the {limit_bytes} it may have",
                    kind="oversized",
                    key=key,
                )
            data: bytes = body.read(n_bytes)
            if len(data) != n_bytes:
                raise self._cut(key)
            return data

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        view = into.cast("B")
        check_range(key, start, start + len(view))
        if not view:
            return
        with self._body(key, start, start + len(view)) as (body, _):
            done = 0
            while done < len(view):
                # By slices: urllib3 reads each into memory of its own first.
                n = body.readinto(view[done : done + _READ_BYTES])
                if n == 0:
                    raise self._cut(key)
                done += n

    def put(self, key: str, data: Buffer) -> None:
        arguments = self._named(key)
        body = _checked_body(data, key)
        with self._mapping(key):
            self._client.put_object(**arguments, Body=body)

    def create(self, key: str, data: Buffer) -> Outcome:
        """As the port says. Raises `Invalid` only where the store refused; `Unavailable(closed)` before sending."""
        arguments = self._named(key)
        body = _checked_body(data, key)
        try:
            self._create_client.put_object(**arguments, Body=body, IfNoneMatch="*")
        except CLIENT_ERRORS as e:
            if status_of(e) == 412:
                return Outcome.LOST
            error = self._mapped(e, key)
            if isinstance(error, Invalid):
                raise error from e
            return Outcome.UNKNOWN
        return Outcome.WON

    def delete(self, key: str) -> None:
        arguments = self._named(key)
        with self._mapping(key):
            try:
                self._client.delete_object(**arguments)
            except botocore.exceptions.ClientError as e:
                if e.response.get("Error", {}).get("Code") != "NoSuchKey":
                    raise

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        self._open()
        return self._list(prefix, start_after, limit)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._client.close()
            self._create_client.close()

    def _list(self, prefix: str, start_after: str, limit: int | None) -> Iterator[ObjectInfo]:
        if limit is not None and limit <= 0:
            return
        arguments: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        if start_after:
            arguments["StartAfter"] = self._prefix + start_after
        left = limit
        while True:
            self._open()
            with self._mapping(None):
                page = self._client.list_objects_v2(**arguments, MaxKeys=min(left or _PAGE, _PAGE))
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

    @contextlib.contextmanager
    def _body(self, key: str, start: int, end: int | None) -> Iterator[tuple[Any, int]]:
        """The answer's body, placed at byte `start`, and how many bytes are wanted from it."""
        arguments = self._named(key)
        if start > 0 or end is not None:
            arguments["Range"] = f"bytes={start}-" if end is None else f"bytes={start}-{end - 1}"
        with self._mapping(key):
            answer = self._client.get_object(**arguments)
            body = answer["Body"]
            whole = False
            try:
                yield body, self._place(answer, key, start, end)
                whole = True
            except urllib3.exceptions.TimeoutError as e:
                raise Unavailable(
                    f"{self._where(key)}: {self._endpoint} stopped answering", kind="timeout", key=key
                ) from e
            except (urllib3.exceptions.HTTPError, OSError) as e:
                raise self._cut(key) from e
            finally:
                # A body read to its end gives its connection back to the pool; any other must not be reused.
                if not whole or answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                    body.close()

    def _place(self, answer: Any, key: str, start: int, end: int | None) -> int:
        """Check what was answered and skip to `start`; returns the bytes wanted from there."""
        length = int(answer["ContentLength"])
        if answer["ResponseMetadata"]["HTTPStatusCode"] == 206:
            match = _CONTENT_RANGE.fullmatch(answer.get("ContentRange") or "")
            if match is None or int(match[1]) != start or int(match[2]) - start + 1 != length:
                raise Unavailable(
                    f"{self._where(key)}: {self._endpoint} answered another range than asked", kind="network", key=key
                )
        elif start > 0 or end is not None:  # the server ignored Range: the whole object comes
            if start >= length:
                raise self._truncated(key, length, end or start + 1)
            skip = start
            while skip:
                skipped = len(answer["Body"].read(min(skip, _SKIP_BYTES)))
                if skipped == 0:
                    raise self._cut(key)
                skip -= skipped
            length -= start
            length = length if end is None else min(length, end - start)
        if end is not None and length < end - start:
            raise self._truncated(key, start + length, end)
        if end is not None and length > end - start:
            raise Unavailable(f"{self._where(key)}: more bytes than asked for", kind="network", key=key)
        return length

    def _named(self, key: str) -> dict[str, Any]:
        check_key(key)
        self._open()
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _open(self) -> None:
        if self._closed:
            raise Unavailable(f"{self.url}: closed", kind="closed")

    def _where(self, key: str | None) -> str:
        return self.url if key is None else f"{self.url}/{key}"

    def _cut(self, key: str) -> Unavailable:
        return Unavailable(
            f"{self._where(key)}: {self._endpoint} cut the answer short; try again", kind="network", key=key
        )

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


@functools.cache
def _api_loader() -> Any:
    """Reads S3's API description once a process rather than once a store (0.1 s of CPU each)."""
    return botocore.loaders.create_loader()


def _clients(options: StoreOptions) -> tuple[Any, Any]:
    """A client that retries, and one that sends once (for creates)."""
    core = botocore.session.Session(profile=options.profile)
    core.register_component("data_loader", _api_loader())
    session = boto3.Session(botocore_session=core)
    region = options.region or session.region_name or os.environ.get("AWS_REGION")
    both: dict[str, Any] = {
        "connect_timeout": options.connect_timeout_s,
        "read_timeout": options.request_timeout_s,
        "max_pool_connections": options.max_connections,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "tcp_keepalive": True,
        "s3": {"addressing_style": options.addressing_style},
    }
    once, standard = ({"mode": "standard", "total_max_attempts": n} for n in (1, 3))
    made = [
        _sending_bodies_at_once(
            session.client(
                "s3",
                endpoint_url=options.endpoint_url,
                region_name=region,
                verify=options.ca_bundle,
                config=botocore.config.Config(**both, retries=retries),
            )
        )
        for retries in (standard, once)
    ]
    return made[0], made[1]


class _Together:
    """Mixed into a connection: a small request's header and body leave in one segment.

    urllib3 sends them one after the other. A process killed between the two leaves a header whose connection ends
    cleanly, and SeaweedFS stores an empty object for it.
    """

    _held: bytearray | None = None

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, *args: Any, **more: Any) -> None:
        if isinstance(body, bytes | bytearray) and len(body) <= _TOGETHER_BYTES:
            self._held = bytearray()
        try:
            super().request(method, url, body, headers, *args, **more)  # type: ignore[misc]
            held = self._held
        finally:
            self._held = None
        if held:
            super().send(held)  # type: ignore[misc]

    def send(self, data: Any) -> None:
        if self._held is None:
            super().send(data)  # type: ignore[misc]
        else:
            self._held += data


class _Http(_Together, botocore.awsrequest.AWSHTTPConnection):
    pass


class _Https(_Together, botocore.awsrequest.AWSHTTPSConnection):
    pass


class _HttpPool(botocore.awsrequest.AWSHTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(botocore.awsrequest.AWSHTTPSConnectionPool):
    ConnectionCls = _Https


def _sending_bodies_at_once(client: Any) -> Any:
    """Without `Expect: 100-continue`: it costs a round trip a PUT, and tears header and body apart."""
    client.meta.events.unregister("before-call.s3", botocore.handlers.add_expect_header)
    client.meta.events.unregister(
        "before-parameter-build.s3.PutObject", botocore.handlers.convert_body_to_file_like_object
    )
    # The dictionary is the one that the pool managers made later take their classes from.
    client._endpoint.http_session._pool_classes_by_scheme.update(http=_HttpPool, https=_HttpsPool)
    return client


def _checked_body(data: Buffer, key: str) -> bytes | bytearray:
    """What boto3 takes as a body. A memoryview is copied (boto3 accepts none)."""
    size = data.nbytes if isinstance(data, memoryview) else len(data)
    if size > MAX_PUT_BYTES:
        raise Invalid(f"key {key!r}: {size} bytes; one PUT takes at most {MAX_PUT_BYTES}", kind="argument", key=key)
    return bytes(data) if isinstance(data, memoryview) else data
