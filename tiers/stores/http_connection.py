"""One HTTP/1.1 connection over a socket: requests leave in one piece, bodies arrive in the caller's memory.

Made for large bodies and many threads beside an engine that holds the interpreter's lock: over plain TCP a body of any
size is one system call each way, in which the lock is free; nothing is copied on the way. Silence is measured by the
kernel (SO_RCVTIMEO, SO_SNDTIMEO), so that any progress starts the time anew. Over TLS each record is a call.

Header and (the beginning of) the body leave in one segment: of a process killed in between, a header alone would be
left, for which some servers store an empty object. One thread at a time. Raises `Trouble`'s kinds and `Garbled`.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from lmcache_s3.tiers.stores.http_head import (
    MAX_CHUNK_LINE_BYTES,
    MAX_HEAD_BYTES,
    Garbled,
    Head,
    parse_chunk_size,
    parse_head,
)

_RECEIVE_BYTES = 1 << 14
_RECORD_BYTES = 1 << 14
"""The most one TLS record carries."""


class Trouble(Exception):
    """The connection failed. sent: part of the request may have reached the server."""

    def __init__(self, message: str, *, sent: bool = False) -> None:
        super().__init__(message)
        self.sent = sent


class Unreachable(Trouble):
    """Nobody took the connection: refused, no route, no such host."""


class ProxyRefused(Unreachable):
    """Nobody took the connection at the proxy's address, or the proxy did not let it through."""


class Untrusted(Trouble):
    """The server's certificate is not one to trust."""


class NoTls(Trouble):
    """TLS could not be agreed on; perhaps the server does not speak it."""


class Silence(Trouble):
    """Nothing moved for as long as is waited."""


class Cut(Trouble):
    """The other side ended or reset the connection."""


@dataclass(frozen=True)
class Route:
    """How to reach a server. tls: None for plain HTTP. proxy: (host, port) of an HTTP proxy between, None for none;
    proxy_headers: what it wants to see. connect_timeout_s: also of TLS. silence_s: the longest without progress."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    proxy: tuple[str, int] | None = None
    proxy_headers: Mapping[str, str] = field(default_factory=dict)
    connect_timeout_s: float = 5.0
    silence_s: float = 30.0

    @property
    def forwarded(self) -> bool:
        """Whether a proxy reads the requests: they then name the whole URL, and carry `proxy_headers`."""
        return self.proxy is not None and self.tls is None


class Connection:
    """Connects at once. used: it carried a request before, so the server may have ended it meanwhile."""

    def __init__(self, route: Route) -> None:
        self.used = False
        self._tls = False
        self._ahead = bytearray()  # received, not yet taken
        try:
            self._socket = socket.create_connection(route.proxy or (route.host, route.port), route.connect_timeout_s)
        except TimeoutError as e:
            raise Silence("no connection in time") from e
        except OSError as e:
            raise (Unreachable if route.proxy is None else ProxyRefused)(str(e)) from e
        try:
            self._prepare(route)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def ended(self) -> bool:
        """Whether the server has ended a resting connection, or said something nobody asked for."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(self._ahead or poll.poll(0))

    def send(self, head: bytes, body: memoryview | None = None) -> None:
        """The whole request. `Trouble.sent` is False only where surely nothing left."""
        sent = 0
        total = len(head) + (0 if body is None else len(body))
        try:
            if body is None or self._tls:
                # A copy of what fits a TLS record, so that the first holds some of the body.
                start = head if body is None else head + body[: max(_RECORD_BYTES - len(head), 1)]
                sent += self._socket.send(start)
            else:
                sent += self._socket.sendmsg([head, body])
            while sent < total:
                if sent < len(head):
                    sent += self._socket.send(head[sent:])
                else:
                    assert body is not None
                    sent += self._socket.send(body[sent - len(head) :])
        except (TimeoutError, BlockingIOError) as e:
            raise Silence("the request was not taken in time", sent=sent > 0 or self._tls) from e
        except OSError as e:
            raise Cut(str(e), sent=sent > 0 or self._tls) from e
        self.used = True

    def head(self) -> Head:
        """The next answer's head; interim answers are passed over."""
        while True:
            end = self._ahead.find(b"\r\n\r\n")
            while end < 0:
                if len(self._ahead) > MAX_HEAD_BYTES:
                    raise Garbled("a head without end")
                searched = max(len(self._ahead) - 3, 0)
                self._receive_ahead()
                end = self._ahead.find(b"\r\n\r\n", searched)
            head = parse_head(bytes(self._ahead[:end]))
            del self._ahead[: end + 4]
            if head.status >= 200:
                return head
            if head.status == 101:
                raise Garbled("another protocol")

    def fill(self, into: memoryview) -> None:
        """Exactly as many bytes as `into` (writeable, of bytes) holds."""
        done = min(len(self._ahead), len(into))
        if done:
            with memoryview(self._ahead) as ahead:
                into[:done] = ahead[:done]
            del self._ahead[:done]
        flags = 0 if self._tls else socket.MSG_WAITALL
        while done < len(into):
            done += self._receive_into(into[done:], flags)

    def rest_of_chunks(self, limit_bytes: int) -> bytes:
        """A chunked body to its end. Raises `Garbled` where it is longer than `limit_bytes`."""
        body = bytearray()
        while size := parse_chunk_size(self._line()):
            if len(body) + size > limit_bytes:
                raise Garbled("a longer body than expected")
            chunk = bytearray(size)
            self.fill(memoryview(chunk))
            body += chunk
            if self._line():
                raise Garbled("a chunk longer than it said")
        trailers = 0
        while line := self._line():
            trailers += len(line)
            if trailers > MAX_HEAD_BYTES:
                raise Garbled("trailers without end")
        return bytes(body)

    def _line(self) -> bytes:
        while (end := self._ahead.find(b"\r\n")) < 0:
            if len(self._ahead) > MAX_CHUNK_LINE_BYTES:
                raise Garbled("a line without end")
            self._receive_ahead()
        line = bytes(self._ahead[:end])
        del self._ahead[: end + 2]
        return line

    def _receive_ahead(self) -> None:
        block = bytearray(_RECEIVE_BYTES)
        n = self._receive_into(memoryview(block), 0)
        self._ahead += block[:n]

    def _receive_into(self, into: memoryview, flags: int) -> int:
        try:
            n = self._socket.recv_into(into, len(into), flags)
        except (TimeoutError, BlockingIOError) as e:
            raise Silence("no answer in time", sent=True) from e
        except OSError as e:
            raise Cut(str(e), sent=True) from e
        if n == 0:
            raise Cut("the connection ended within an answer", sent=True)
        return n

    def _prepare(self, route: Route) -> None:
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if route.tls is not None:
            if route.proxy is not None:
                self._tunnel(route)
            try:
                self._socket = route.tls.wrap_socket(self._socket, server_hostname=route.host)
            except TimeoutError as e:
                raise Silence("no TLS in time") from e
            except ssl.SSLCertVerificationError as e:
                raise Untrusted(str(e)) from e
            except ssl.SSLError as e:
                raise NoTls(str(e)) from e
            except OSError as e:
                raise Cut(str(e)) from e
            self._tls = True
            self._socket.settimeout(route.silence_s)
        else:
            whole, part = divmod(route.silence_s, 1)
            wait = struct.pack("@ll", int(whole), max(int(part * 1e6), 0 if whole else 1))
            self._socket.settimeout(None)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)

    def _tunnel(self, route: Route) -> None:
        where = f"[{route.host}]:{route.port}" if ":" in route.host else f"{route.host}:{route.port}"
        lines = [f"CONNECT {where} HTTP/1.1", f"Host: {where}", *(f"{k}: {v}" for k, v in route.proxy_headers.items())]
        try:
            self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))
            head = self.head()
        except (Cut, Garbled) as e:
            raise ProxyRefused(f"the proxy did not let through ({e})") from e
        self.used = False
        if head.status != 200 or self._ahead:
            raise ProxyRefused(f"the proxy answered {head.status}")
