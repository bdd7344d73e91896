"""What S3Store sends and when it sends again, seen by a server that answers as told; and odd answers."""

from __future__ import annotations

import gc
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import pytest

from lmcache_s3.errors import Invalid, LMCacheS3Error, Missing, Unavailable
from lmcache_s3.testing.http_servers import RecordingServer, Reply, Request, refusal, reply
from lmcache_s3.tiers.stores.http_connection import Connection, Cut, Route, Silence
from lmcache_s3.tiers.stores.http_head import Garbled
from lmcache_s3.tiers.stores.http_pool import Pool
from lmcache_s3.tiers.stores.options import StoreOptions
from lmcache_s3.tiers.stores.s3 import S3Store
from lmcache_s3.types import Outcome

OK = reply(200)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)


@contextmanager
def store_at(answer: Callable[[Request], Reply | None], **options: Any) -> Iterator[tuple[S3Store, RecordingServer]]:
    with RecordingServer(answer) as server:
        given = StoreOptions(**{"endpoint_url": server.url, "region": "here", "request_timeout_s": 5.0, **options})
        with closing(S3Store("bucket", "pre", options=given)) as store:
            yield store, server


def in_turn(*replies: Reply | None) -> Callable[[Request], Reply | None]:
    left = list(replies)
    return lambda request: left.pop(0)


class TestWhatIsSent:
    def test_a_request_names_what_it_wants_and_is_signed(self) -> None:
        ranged = reply(206, b"cde", Content_Range="bytes 2-4/9")
        with store_at(in_turn(ranged, OK, OK, reply(204))) as (store, server):
            assert store.get("a b/c+ü", 2, 5) == b"cde"
            store.put("k", b"body")
            assert store.create("k", b"body") is Outcome.WON
            store.delete("k")
        get, put, create, delete = server.requests
        assert (get.method, get.target) == ("GET", "/bucket/pre/a%20b/c%2B%C3%BC")
        assert (get.headers["range"], get.headers["accept-encoding"]) == ("bytes=2-4", "identity")
        assert get.headers["host"] == server.url.removeprefix("http://")
        assert get.headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=key/")
        assert "/here/s3/aws4_request" in get.headers["authorization"]
        assert (put.method, put.body, put.headers["content-length"]) == ("PUT", b"body", "4")
        assert "if-none-match" not in put.headers
        assert create.headers["if-none-match"] == "*"
        assert "if-none-match" in create.headers["authorization"]
        assert delete.method == "DELETE"
        for request in server.requests:
            assert "expect" not in request.headers
            assert "x-amz-request-payer" not in request.headers
        assert server.connections == 1

    def test_small_bodies_are_signed_over_plain_http_large_ones_are_not(self) -> None:
        small, large = os.urandom(1 << 18), os.urandom((1 << 18) + 1)
        with store_at(lambda request: OK) as (store, server):
            for body in (small, large, b""):
                store.put("k", body)
        signs = [request.headers["x-amz-content-sha256"] for request in server.requests]
        assert signs == [hashlib.sha256(small).hexdigest(), "UNSIGNED-PAYLOAD", hashlib.sha256(b"").hexdigest()]
        assert [request.body for request in server.requests] == [small, large, b""]

    def test_requester_pays(self) -> None:
        page = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
        with store_at(
            lambda request: reply(200, page if "list-type" in request.target else b""), requester_pays=True
        ) as (store, server):
            store.check()
            assert list(store.list("")) == []
            store.get("k")
            store.put("k", b"")
            store.create("k", b"")
            store.delete("k")
        assert [request.headers.get("x-amz-request-payer") for request in server.requests] == ["requester"] * 6
        assert all("x-amz-request-payer" in request.headers["authorization"] for request in server.requests)

    @pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda b: memoryview(b).cast("I")])
    def test_any_buffer_is_a_body(self, make: Callable[[bytes], Any]) -> None:
        data = os.urandom(4 << 20)
        with store_at(lambda request: OK) as (store, server):
            store.put("k", make(data))
            store.create("k", make(data))
        assert [request.body == data for request in server.requests] == [True, True]


class TestSentAgain:
    def test_a_connection_that_the_server_ended_while_it_rested(self) -> None:
        """Its end is seen before anything is sent, also of a create."""
        with store_at(lambda request: reply(200, end=True)) as (store, server):
            for _ in range(5):
                store.put("k", b"x")
                time.sleep(0.05)
                assert store.create("k", b"y") is Outcome.WON
                time.sleep(0.05)
            assert len(server.requests) == server.connections == 2 * 5

    def test_a_connection_that_ends_just_when_it_is_used_again(self) -> None:
        """Reads and puts go out again at once, on a fresh connection; a create may have arrived."""

        def answer(request: Request) -> Reply | None:
            return None if request.target.endswith("/die") and request.connection == 0 else reply(200, b"abc")

        calls: list[Callable[[S3Store], object]] = [
            lambda s: s.get("die"),
            lambda s: s.put("die", b"x"),
            lambda s: s.delete("die"),
        ]
        for call in calls:
            with store_at(answer) as (store, server):
                store.get("live")
                call(store)
                assert [request.connection for request in server.requests] == [0, 0, 1]
        with store_at(answer) as (store, server):
            store.get("live")
            assert store.create("die", b"x") is Outcome.UNKNOWN
            assert [request.connection for request in server.requests] == [0, 0]

    def test_three_times_after_server_errors(self) -> None:
        busy = refusal(503, "SlowDown")
        with store_at(in_turn(busy, refusal(500, "InternalError"), reply(200, b"abc"))) as (store, server):
            assert store.get("k") == b"abc"
            assert server.connections == 1  # refusals in chunks are read to their end
        with store_at(lambda request: refusal(500, "InternalError")) as (store, server):
            with pytest.raises(Unavailable):
                store.put("k", b"x")
            assert len(server.requests) == 3

    def test_a_body_cut_once(self) -> None:
        cut = Reply(b"HTTP/1.1 206 X\r\nContent-Length: 4\r\nContent-Range: bytes 0-3/9\r\n\r\nab", end=True)
        whole = reply(206, b"abcd", Content_Range="bytes 0-3/9")
        into = bytearray(4)
        with store_at(in_turn(cut, whole, cut, whole)) as (store, _):
            store.get_into("k", 0, memoryview(into))
            assert into == b"abcd"
            assert store.get("k", 0, 4) == b"abcd"

    @pytest.mark.parametrize("status", [400, 403, 404, 412])
    def test_never_after_a_clear_no(self, status: int) -> None:
        with store_at(lambda request: refusal(status, "No")) as (store, server):
            with pytest.raises(LMCacheS3Error):
                store.get("k")
            assert len(server.requests) == 1

    @pytest.mark.parametrize("by", ["header", "body"])
    def test_where_the_bucket_lives_in_another_region(self, by: str) -> None:
        """Every verb follows where told so, also a create: nothing was done at the first place."""

        def answer(request: Request) -> Reply:
            if "/there/s3/" in request.headers["authorization"]:
                return reply(200, b"<ListBucketResult/>" if "list-type" in request.target else b"abc")
            if by == "header":
                return refusal(301, "PermanentRedirect", x_amz_bucket_region="there")
            return reply(400, b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>there</Region></Error>")

        with store_at(answer) as (store, server):
            assert store.create("k", b"x") is Outcome.WON
            assert store.get("k") == b"abc"
            assert list(store.list("")) == []
            assert len(server.requests) == 4

    @pytest.mark.parametrize("region", [None, "", "wrong again", "x" * 50])
    def test_where_nobody_says_in_which(self, region: str | None) -> None:
        headers = {} if region is None else {"x_amz_bucket_region": region}
        with store_at(lambda request: refusal(301, "PermanentRedirect", **headers)) as (store, server):
            with pytest.raises(Invalid) as e:
                store.get("k")
            assert (e.value.kind, e.value.key) == ("setting", "region")
            assert len(server.requests) == 1

    def test_not_in_circles(self) -> None:
        with store_at(lambda request: refusal(307, "TemporaryRedirect", x_amz_bucket_region="there")) as (
            store,
            server,
        ):
            with pytest.raises(Invalid):
                store.get("k")
            assert len(server.requests) == 2


class TestOddAnswers:
    def test_a_refusal_before_the_body_was_read(self) -> None:
        """A server may refuse a large body by its head alone, and close."""

        def refuse(connection: socket.socket, number: int) -> None:
            connection.recv(1000)
            connection.sendall(refusal(403, "AccessDenied").data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass

        with store_at(lambda request: None) as (store, server):
            server.serve = refuse  # type: ignore[method-assign]
            with pytest.raises(Invalid) as e:
                store.put("k", bytes(32 << 20))
            assert e.value.kind == "permission"

    def test_interim_answers_are_passed_over(self) -> None:
        whole = Reply(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\na: b\r\n\r\n" + reply(200, b"abc").data)
        with store_at(lambda request: whole) as (store, server):
            assert store.get("k") == store.get("k") == b"abc"
            assert server.connections == 1

    def test_bytes_beyond_an_answer_end_the_connection(self) -> None:
        with store_at(lambda request: Reply(reply(200, b"abc").data + b"HTTP/1.1 200 OK\r\n")) as (store, server):
            assert store.get("k") == store.get("k") == b"abc"
            assert server.connections == 2

    @pytest.mark.parametrize(
        "data",
        [
            b"\x16\x03\x01 this is TLS\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            b"HTTP/1.1 200 OK\r\n\r\nabc",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            b"HTTP/1.1 101 Switching\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000,
        ],
        ids=["tls", "two lengths", "no length", "chunks", "101", "endless"],
    )
    def test_what_is_no_answer_of_s3(self, data: bytes) -> None:
        with store_at(lambda request: Reply(data, end=True)) as (store, _):
            with pytest.raises(Unavailable) as e:
                store.get("k")
            assert e.value.kind == "network"
            assert "\n" not in str(e.value)
            assert store.create("k", b"x") in (Outcome.UNKNOWN, Outcome.WON)  # the status alone decides

    def test_a_length_of_an_exabyte_allocates_nothing(self) -> None:
        data = b"HTTP/1.1 200 X\r\nContent-Length: 999999999999999999\r\n\r\nab"
        with store_at(lambda request: Reply(data, end=True)) as (store, _), pytest.raises(Unavailable):
            store.get("k")

    @pytest.mark.parametrize(
        "body",
        [
            b"5\r\nab",
            b"zz\r\nabc",
            b"2\r\nabcd\r\n",
            b"fffffff\r\nabc",
            b"1\r\na\r\n" * 100_000,
            b"0\r\n" + b"a: b\r\n" * 20_000,
        ],
        ids=["cut", "no size", "longer", "huge", "endless", "trailers"],
    )
    def test_a_refusal_whose_words_cannot_be_read_refuses_all_the_same(self, body: bytes) -> None:
        data = b"HTTP/1.1 404 X\r\nTransfer-Encoding: chunked\r\n\r\n" + body
        with store_at(lambda request: Reply(data, end=True)) as (store, _), pytest.raises(Missing):
            store.get("k")


class TestConnections:
    def test_many_threads_share_as_many_connections(self) -> None:
        barrier = threading.Barrier(8)

        def answer(request: Request) -> Reply:
            if request.target.endswith("/first"):
                barrier.wait(10)
            return reply(200, request.target[-5:].encode())

        with store_at(answer, max_connections=8) as (store, server), ThreadPoolExecutor(8) as pool:
            assert list(pool.map(store.get, ["first"] * 8)) == [b"first"] * 8
            keys = [f"{i:05}" for i in range(200)]
            assert list(pool.map(store.get, keys)) == [key.encode() for key in keys]
            assert server.connections == 8

    def test_no_more_rest_than_may(self) -> None:
        barrier = threading.Barrier(4)

        def answer(request: Request) -> Reply:
            barrier.wait(10)
            return OK

        with store_at(answer, max_connections=2) as (store, server), ThreadPoolExecutor(4) as pool:
            list(pool.map(store.get, ["k"] * 4))
            list(pool.map(store.get, ["k"] * 4))
            assert server.connections == 6

    def test_those_that_rested_long_are_not_used_again(self) -> None:
        now_s = [0.0]
        with RecordingServer(lambda request: OK) as server:
            pool = Pool(Route("127.0.0.1", server.port), 4, clock=lambda: now_s[0])
            for rest_s in (0.0, 50.0, 61.0, 59.0):
                now_s[0] += rest_s
                with pool.exchange(b"GET / HTTP/1.1\r\n\r\n", None, once=False) as answer:
                    assert answer.small() == b""
            pool.close()
            assert [request.connection for request in server.requests] == [0, 0, 1, 1]

    def test_a_fork_leaves_the_parents_connections_alone(self) -> None:
        with store_at(lambda request: reply(200, b"abc")) as (store, server):
            store.get("k")
            child = os.fork()
            if child == 0:
                try:
                    code = 0 if store.get("k") == b"abc" else 1
                finally:
                    os._exit(code)
            assert os.waitpid(child, 0)[1] == 0
            assert store.get("k") == b"abc"
            assert [request.connection for request in server.requests] == [0, 1, 0]

    def test_silence_within_a_body_and_before_an_answer(self) -> None:
        with RecordingServer(lambda request: Reply(b"HTTP/1.1 200 X\r\nContent-Length: 5\r\n\r\nab")) as server:
            connection = Connection(Route("127.0.0.1", server.port, silence_s=0.2))
            connection.send(b"GET / HTTP/1.1\r\n\r\n")
            assert connection.head().length == 5
            with pytest.raises(Silence):
                connection.fill(memoryview(bytearray(5)))
            with pytest.raises(Silence):
                connection.head()
            connection.close()

    def test_a_slow_body_is_not_silent(self) -> None:
        """Progress begins the time anew."""

        def answer(request: Request) -> Reply:
            return reply(200, bytes(6))

        with RecordingServer(answer) as server:
            server.serve = lambda connection, number: _dribble(connection)  # type: ignore[method-assign]
            connection = Connection(Route("127.0.0.1", server.port, silence_s=0.5))
            connection.send(b"GET / HTTP/1.1\r\n\r\n")
            body = bytearray(connection.head().length or 0)
            connection.fill(memoryview(body))
            assert body == b"abcdefgh"
            connection.close()

    def test_a_request_that_nobody_takes(self) -> None:
        with RecordingServer(lambda request: None) as server:
            server.serve = lambda connection, number: time.sleep(1.5)  # type: ignore[method-assign]
            connection = Connection(Route("127.0.0.1", server.port, silence_s=0.2))
            with pytest.raises(Silence) as e:
                connection.send(b"PUT / HTTP/1.1\r\n\r\n", memoryview(bytes(64 << 20)))
            assert e.value.sent
            connection.close()

    def test_what_an_answer_may_hold_is_bounded(self) -> None:
        with RecordingServer(lambda request: reply(200, bytes(100_000))) as server:
            pool = Pool(Route("127.0.0.1", server.port), 4)
            with pool.exchange(b"GET / HTTP/1.1\r\n\r\n", None, once=False) as answer:
                with pytest.raises(Garbled):
                    answer.small()
                with pytest.raises(Garbled):
                    answer.fill(memoryview(bytearray(100_001)))
            pool.close()

    def test_a_store_that_nobody_closed_leaves_no_connection_open(self) -> None:
        with RecordingServer(lambda request: OK) as server:
            pool = Pool(Route("127.0.0.1", server.port), 4)
            with pool.exchange(b"GET / HTTP/1.1\r\n\r\n", None, once=False) as answer:
                answer.small()
            del pool, answer
            gc.collect()  # an open socket would warn, and warnings are errors

    def test_nobody_is_asked_after_the_end(self) -> None:
        with RecordingServer(lambda request: None) as server:
            connection = Connection(Route("127.0.0.1", server.port))
            connection.send(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises(Cut) as e:
                connection.head()
            assert e.value.sent
            assert connection.ended()
            connection.close()


def _dribble(connection: Any) -> None:
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 200 X\r\nContent-Length: 8\r\n\r\n")
    for letter in b"abcdefgh":
        time.sleep(0.1)
        connection.sendall(bytes([letter]))
