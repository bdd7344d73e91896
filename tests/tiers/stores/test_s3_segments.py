"""Header and body of a small PUT leave together: a process killed in between must not leave a header alone, for which
some servers store an empty object."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from lmcache_s3.testing.servers import HOST
from lmcache_s3.tiers.stores.options import StoreOptions
from lmcache_s3.tiers.stores.s3 import S3Store
from lmcache_s3.types import Outcome

BODY = b"0123456789" * 1000


@contextmanager
def first_segments() -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers each request with 200, and keeps what the first receive of each gave."""
    firsts: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(1 << 20):
                    firsts.append(data)
                    while b"\r\n\r\n" not in data or not data.endswith(BODY):
                        data += connection.recv(1 << 20)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield f"http://{HOST}:{listener.getsockname()[1]}", firsts
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_header_and_body_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    with (
        first_segments() as (url, firsts),
        closing(S3Store("bucket", options=StoreOptions(endpoint_url=url, region="r"))) as store,
    ):
        for i in range(20):
            store.put("k", BODY)
            assert store.create("k", memoryview(BODY) if i % 2 else BODY) is Outcome.WON
    assert len(firsts) == 40
    assert all(first.startswith(b"PUT ") and first.endswith(BODY) for first in firsts)
