"""Small HTTP machinery for tests of the S3 client: a server that answers as told, a proxy, and TLS before a server.

Each is a context manager on a loopback port of its own, with a thread a connection. Only for what our own clients send:
bodies have a `Content-Length`.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Request:
    """headers: names in lower case. connection: number of the connection it came by, from 0."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int


@dataclass(frozen=True)
class Reply:
    """Sent as it is. end: close the connection afterwards, whatever `data` says of that."""

    data: bytes
    end: bool = False


def reply(status: int, body: bytes = b"", *, end: bool = False, **headers: str) -> Reply:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return Reply("\r\n".join([*lines, "", ""]).encode() + body, end)


def refusal(status: int, code: str, **headers: str) -> Reply:
    """As AWS sends it: in chunks."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>".encode()
    lines = [f"HTTP/1.1 {status} X", "Transfer-Encoding: chunked"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = "\r\n".join([*lines, "", ""]).encode()
    return Reply(head + b"%x\r\n%b\r\n5;last=1\r\n     \r\n0\r\n\r\n" % (len(body), body))


class _Listening(ABC):
    """A listening socket; each connection is served by a thread of its own."""

    def __init__(self) -> None:
        self.connections = 0
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._ended = False

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @abstractmethod
    def serve(self, connection: socket.socket, number: int) -> None:
        """Speak on one connection until it ends; `number` counts them from 0."""

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._ended = True
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            number, self.connections = self.connections, self.connections + 1
            self._open.add(connection)
            if self._ended:
                connection.close()
                return
            self._start(lambda c=connection, n=number: self._serve(c, n))  # type: ignore[misc]

    def _serve(self, connection: socket.socket, number: int) -> None:
        with connection, contextlib.suppress(OSError):
            self.serve(connection, number)
        self._open.discard(connection)

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        """Both ways, until either ends."""
        self._open.add(other)
        others = {one: other, other: one}
        while True:
            for source in select.select([one, other], [], [])[0]:
                block = source.recv(_BLOCK_BYTES)
                while isinstance(source, ssl.SSLSocket) and source.pending():
                    block += source.recv(_BLOCK_BYTES)
                if not block:
                    self._open.discard(other)
                    return
                others[source].sendall(block)


class RecordingServer(_Listening):
    """answer: called with each request, from many threads; None ends the connection without a word. requests: all."""

    def __init__(self, answer: Callable[[Request], Reply | None]) -> None:
        super().__init__()
        self.requests: list[Request] = []
        self._answer = answer

    def serve(self, connection: socket.socket, number: int) -> None:
        ahead = b""
        while request := _read_request(connection, ahead, number):
            ahead = b""
            self.requests.append(request)
            answer = self._answer(request)
            if answer is None:
                return
            connection.sendall(answer.data)
            if answer.end:
                return


@dataclass
class Seen:
    """What a proxy was asked for: the first line and headers of each connection's first request."""

    line: str
    headers: dict[str, str] = field(default_factory=dict)


class ForwardProxy(_Listening):
    """An HTTP proxy, by CONNECT and by absolute URLs, for which every name means `127.0.0.1:port`."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self._target = (HOST, port)

    def serve(self, connection: socket.socket, number: int) -> None:
        head, rest = _read_head(connection)
        line, headers = _head_of(head)
        self.seen.append(Seen(line, headers))
        with socket.create_connection(self._target) as server:
            if line.startswith("CONNECT "):
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:  # a server takes absolute URLs, too
                server.sendall(head + b"\r\n\r\n" + rest)
            self._pump(connection, server)


class TlsFront(_Listening):
    """TLS ended here, plain TCP to `127.0.0.1:port` behind. chain: PEM file with certificate and key."""

    def __init__(self, port: int, chain: str) -> None:
        super().__init__()
        self._target = (HOST, port)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(chain)

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}"

    def serve(self, connection: socket.socket, number: int) -> None:
        with (
            self._context.wrap_socket(connection, server_side=True) as tls,
            socket.create_connection(self._target) as server,
        ):
            self._open.add(tls)
            self._pump(tls, server)
            self._open.discard(tls)


def _read_head(connection: socket.socket, ahead: bytes = b"") -> tuple[bytes, bytes]:
    """The head without its empty line, and what came after it; nothing where the connection ended."""
    data = ahead
    while b"\r\n\r\n" not in data:
        block = connection.recv(_BLOCK_BYTES)
        if not block:
            return b"", b""
        data += block
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def _head_of(head: bytes) -> tuple[str, dict[str, str]]:
    line, *lines = head.decode("latin-1").split("\r\n")
    pairs = (one.split(":", 1) for one in lines)
    return line, {name.lower(): value.strip() for name, value in pairs}


def _read_request(connection: socket.socket, ahead: bytes, number: int) -> Request | None:
    head, body = _read_head(connection, ahead)
    if not head:
        return None
    line, headers = _head_of(head)
    method, target, _ = line.split(" ")
    length = int(headers.get("content-length", 0))
    while len(body) < length:
        block = connection.recv(_BLOCK_BYTES)
        if not block:
            return None
        body += block
    return Request(method, target, headers, body, number)
