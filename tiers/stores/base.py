"""The ObjectStore port: the five things we ask of any store.

Methods block (call them from worker threads) and are safe to call from many threads at once. Keys are relative to the
store's root, `/`-separated, never starting with `/`. An implementation maps every client error to the tree in
`lmcache_s3.errors`, by type or status code, never by text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from lmcache_s3.types import Buffer, ObjectInfo, Outcome


@runtime_checkable
class ObjectStore(Protocol):
    """Five verbs over one root. Every method may raise `Unavailable` (timeout, throttled, network, full) and `Invalid`
    (credentials, permission, bucket)."""

    @property
    def url(self) -> str:
        """The root's URL, for people; without secrets."""
        ...

    def get(self, key: str, start: int = 0, end: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        """Bytes [start, end) of an object; `end=None`: to its end. One request.

        Strong read-after-write. Raises `Missing`; `Unusable(truncated)` if the object ends before `end`;
        `Unusable(oversized)` if the answer would exceed `limit_bytes`, before it is read into memory.
        """
        ...

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        """Fill `into` (writeable, contiguous bytes) from offset `start`. One request. Errors as `get`."""
        ...

    def put(self, key: str, data: Buffer) -> None:
        """Write the whole object, replacing what is there; durable when it returns. Never partially visible."""
        ...

    def create(self, key: str, data: Buffer) -> Outcome:
        """Put-if-absent, one single conditional request, no retries by the client library below.

        WON: this call created it. LOST: something is there, surely not of this call. UNKNOWN: anything else.
        """
        ...

    def delete(self, key: str) -> None:
        """Gone when it returns; absent already is fine."""
        ...

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        """Objects whose key begins with `prefix` and sorts after `start_after`; in code point order, lazily paged."""
        ...

    def check(self) -> None:
        """At start-up: does the store answer, is the bucket there, may we list and read? Raises `Invalid` (bucket,
        credentials, permission) or `Unavailable`, each naming the mend."""
        ...

    def close(self) -> None:
        """Release connections; later calls raise `Unavailable(closed)`."""
        ...
