"""Requests and answers over kept connections, and the way there: TLS, proxies. Knows nothing of S3.

A connection that rested may have been ended by the server without our knowing; `Pool.exchange` then sends again on a
fresh one, at once, where that can do no harm. Safe for many threads. Raises `Trouble`'s kinds and `Garbled`.
"""

from __future__ import annotations

import base64
import os
import ssl
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable
from types import TracebackType
from urllib.parse import unquote, urlsplit

from lmcache_s3.errors import Invalid
from lmcache_s3.tiers.stores.http_connection import Connection, Cut, Route
from lmcache_s3.tiers.stores.http_head import Garbled, Head

MAX_SMALL_BYTES = 1 << 16
"""The most that is read of an answer that says what went wrong."""

_REST_S = 60.0
"""A connection that rested longer is not used again: what lies between may have forgotten it without a word."""


class Answer:
    """A head, and a body yet to be read. Use as a context manager: it gives the connection back, or ends it."""

    def __init__(self, head: Head, connection: Connection, done: Callable[[Connection, bool], None]) -> None:
        self.status = head.status
        self.headers = head.headers
        self.length = head.length
        self._head = head
        self._left = head.length
        self._connection = connection
        self._done = done

    def fill(self, into: memoryview) -> None:
        """The body's next bytes. Raises `Garbled` where it has fewer, `Cut`, `Silence`."""
        if self._left is None or len(into) > self._left:
            raise Garbled("a shorter body than expected")
        self._connection.fill(into)
        self._left -= len(into)

    def small(self) -> bytes:
        """The whole body, of `MAX_SMALL_BYTES` at most."""
        if self._head.chunked:
            body = self._connection.rest_of_chunks(MAX_SMALL_BYTES)
            self._left = 0
            return body
        if self._left is None or self._left > MAX_SMALL_BYTES:
            raise Garbled("a longer body than expected")
        read = bytearray(self._left)
        self.fill(memoryview(read))
        return bytes(read)

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._done(self._connection, self._left == 0 and self._head.reusable)


class Pool:
    """Connections of one route. most: kept at rest."""

    def __init__(self, route: Route, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.route = route
        self._most = most
        self._clock = clock
        self._resting: list[tuple[float, Connection]] = []
        self._process = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._resting)  # of a pool that nobody closed

    def exchange(self, head: bytes, body: memoryview | None, *, once: bool) -> Answer:
        """once: the server must not see the request twice, so it is sent again only where nothing of it had left."""
        connection = self._take() or Connection(self.route)
        while True:
            used = connection.used
            try:
                answered = self._carry(connection, head, body)
            except Cut as e:
                connection.close()
                if not used or (once and e.sent):
                    raise
                connection = Connection(self.route)
            except BaseException:
                connection.close()
                raise
            else:
                return Answer(answered, connection, self._give_back)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            _close_all(self._resting)

    @staticmethod
    def _carry(connection: Connection, head: bytes, body: memoryview | None) -> Head:
        try:
            connection.send(head, body)
        except Cut as e:
            # A server that refuses a large body answers and ends the connection before it has read it.
            if not e.sent:
                raise
            try:
                answered = connection.head()
            except (Cut, Garbled):
                raise e from None
            if answered.status < 300:
                raise
            return answered
        return connection.head()

    def _take(self) -> Connection | None:
        now_s = self._clock()
        while True:
            with self._lock:
                if self._process != os.getpid():  # forked: the parent speaks on those; this closes our ends only
                    _close_all(self._resting)
                    self._process = os.getpid()
                if not self._resting:
                    return None
                since_s, connection = self._resting.pop()
            if now_s - since_s <= _REST_S and not connection.ended():
                return connection
            connection.close()

    def _give_back(self, connection: Connection, reusable: bool) -> None:
        with self._lock:
            if reusable and not self._closed and len(self._resting) < self._most and self._process == os.getpid():
                self._resting.append((self._clock(), connection))
                return
        connection.close()


def _close_all(resting: list[tuple[float, Connection]]) -> None:
    while resting:
        resting.pop()[1].close()


def route_to(url: str, *, ca_file: str | None, connect_timeout_s: float, silence_s: float) -> Route:
    """The route to `url`'s server, by way of the proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name.

    ca_file: PEM file, for https. Raises `Invalid` for a proxy that cannot be used, `OSError` for a bad `ca_file`.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise ValueError(url)
    tls = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
    proxy, headers = _proxy(parts.scheme, parts.netloc)
    return Route(
        parts.hostname,
        parts.port or (443 if tls else 80),
        tls,
        proxy,
        headers,
        connect_timeout_s=connect_timeout_s,
        silence_s=silence_s,
    )


def _proxy(scheme: str, netloc: str) -> tuple[tuple[str, int] | None, dict[str, str]]:
    named = urllib.request.getproxies().get(scheme)
    if not named or urllib.request.proxy_bypass(netloc):
        return None, {}
    try:
        parts = urlsplit(named if "://" in named else "http://" + named.removeprefix("//"))
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port, parts = None, 0, urlsplit("")
    if host is None or parts.scheme != "http":
        # The value is not shown: it may hold a password.
        why = "names a proxy that is itself spoken to by TLS" if parts.scheme == "https" else "names no HTTP proxy"
        raise Invalid(
            f"{scheme.upper()}_PROXY {why}; write http://host:port, or name this endpoint in NO_PROXY",
            kind="setting",
            key=f"{scheme}_proxy",
        )
    if parts.username is None or parts.password is None:
        return (host, port), {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password)}".encode()
    return (host, port), {"Proxy-Authorization": f"Basic {base64.b64encode(pair).decode()}"}
