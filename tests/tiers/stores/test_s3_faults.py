"""S3Store when things go wrong: credentials, buckets, lost answers, cut bodies, odd servers."""

from __future__ import annotations

import http.server
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from lmcache_s3.errors import Invalid, LMCacheS3Error, Unavailable, Unusable
from lmcache_s3.testing.proxy import Proxy
from lmcache_s3.testing.servers import HOST, SeaweedFS
from lmcache_s3.tiers.stores.fsspec_ import FsspecStore
from lmcache_s3.tiers.stores.options import StoreOptions
from lmcache_s3.tiers.stores.s3 import S3Store
from lmcache_s3.types import Outcome

pytestmark = pytest.mark.s3


@pytest.fixture
def place(bucket_url: str) -> tuple[str, str]:
    """Bucket and prefix."""
    bucket, _, prefix = bucket_url.removeprefix("s3://").partition("/")
    return bucket, prefix


@pytest.fixture
def direct(place: tuple[str, str]) -> Iterator[S3Store]:
    with closing(S3Store(*place)) as store:
        yield store


@pytest.fixture
def proxy(seaweedfs: SeaweedFS) -> Iterator[Proxy]:
    with Proxy(HOST, seaweedfs.port) as proxy:
        yield proxy


@pytest.fixture
def far(place: tuple[str, str], proxy: Proxy) -> Iterator[S3Store]:
    """The same place through the proxy, with short time-outs."""
    options = StoreOptions(endpoint_url=proxy.endpoint_url, request_timeout_s=0.5, connect_timeout_s=0.5)
    with closing(S3Store(*place, options=options)) as store:
        yield store


def test_check_is_content_with_a_good_bucket(direct: S3Store, bucket_url: str) -> None:
    direct.check()
    with closing(FsspecStore.from_url(bucket_url)) as store:
        store.check()


def test_wrong_secret(direct: S3Store, place: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with closing(S3Store(*place)) as store:
        for call in (store.check, lambda: store.get("a"), lambda: store.put("a", b""), lambda: store.create("a", b"")):
            with pytest.raises(Invalid) as e:
                call()
            assert e.value.kind == "credentials"
            assert "wrong" not in str(e.value)
            assert "\n" not in str(e.value)
    assert list(direct.list("")) == []


def test_unknown_access_key(place: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with closing(S3Store(*place)) as store, pytest.raises(Invalid) as e:
        store.check()
    assert e.value.kind == "credentials"


def test_no_credentials_at_all(place: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with closing(S3Store(*place)) as store, pytest.raises(Invalid, match="AWS_ACCESS_KEY_ID") as e:
        store.check()
    assert e.value.kind == "credentials"


def test_missing_bucket(bucket_url: str) -> None:
    with closing(S3Store("no-such-bucket", "p")) as store:
        for call in (
            store.check,
            lambda: store.get("a"),
            lambda: store.put("a", b""),
            lambda: store.create("a", b""),
            lambda: list(store.list("")),
        ):
            with pytest.raises(Invalid, match="no-such-bucket") as e:
                call()
            assert e.value.kind == "bucket"


def test_missing_bucket_through_fsspec(bucket_url: str) -> None:
    with closing(FsspecStore.from_url("s3://no-such-bucket/p")) as store, pytest.raises(Invalid) as e:
        store.check()
    assert e.value.kind == "bucket"


def test_nobody_at_the_endpoint(place: tuple[str, str]) -> None:
    with socket.socket() as s:
        s.bind((HOST, 0))
        options = StoreOptions(endpoint_url=f"http://{HOST}:{s.getsockname()[1]}", connect_timeout_s=1.0)
        with closing(S3Store(*place, options=options)) as store:
            with pytest.raises(Unavailable, match="endpoint_url") as e:
                store.check()
            assert e.value.kind == "network"
            assert store.create("a", b"x") is Outcome.UNKNOWN


def test_a_create_whose_answer_is_lost_is_unknown_and_in_effect(far: S3Store, direct: S3Store, proxy: Proxy) -> None:
    """The classic: had the client sent it again, 412 would have told us that we lost to ourselves."""
    for reset in (False, True):
        proxy.reset = reset
        key = f"log/{secrets.token_hex(4)}"
        far.put("warm", b"x")
        proxy.cut_answer_after_bytes = 0
        before = proxy.counts["connections"]
        assert far.create(key, b"mine") is Outcome.UNKNOWN
        proxy.cut_answer_after_bytes = None
        assert proxy.counts["connections"] - before <= 1  # sent once
        deadline = time.monotonic() + 5
        while not list(direct.list(key)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert direct.get(key) == b"mine"
        assert far.create(key, b"other") is Outcome.LOST


def test_a_lost_answer_through_s3fs_is_unknown_too(
    bucket_url: str, proxy: Proxy, direct: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
    with closing(FsspecStore.from_url(bucket_url)) as store:
        store.put("warm", b"x")
        proxy.cut_answer_after_bytes = len(b"HTTP/1.1 100 Continue\r\n\r\n") + 1  # s3fs asks before it sends
        assert store.create("log/1", b"mine") is Outcome.UNKNOWN
        proxy.cut_answer_after_bytes = None
        deadline = time.monotonic() + 5
        while not list(direct.list("log/")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert direct.get("log/1") == b"mine"


def test_a_create_that_times_out_is_unknown(far: S3Store, proxy: Proxy) -> None:
    proxy.latency_s = 5.0
    assert far.create("log/1", b"mine") is Outcome.UNKNOWN


def test_silence_is_a_timeout(far: S3Store, direct: S3Store, proxy: Proxy) -> None:
    direct.put("a", b"x")
    proxy.bytes_per_s = 1.0
    start = time.monotonic()
    with pytest.raises(Unavailable) as e:
        far.get("a")
    assert e.value.kind == "timeout"
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("reset", [False, True])
def test_a_body_cut_in_the_middle_is_unavailable_never_bytes(
    far: S3Store, direct: S3Store, proxy: Proxy, reset: bool
) -> None:
    data = secrets.token_bytes(500_000)
    direct.put("big", data)
    proxy.reset = reset
    proxy.cut_answer_after_bytes = 200_000
    for call in (
        lambda: far.get("big"),
        lambda: far.get("big", 100, 400_000),
        lambda: far.get_into("big", 0, memoryview(bytearray(500_000))),
    ):
        with pytest.raises(Unavailable) as e:
            call()
        assert e.value.kind == "network"
    proxy.cut_answer_after_bytes = None
    assert far.get("big") == data  # and it recovers by itself


def test_reads_are_retried_but_not_for_ever(far: S3Store, direct: S3Store, proxy: Proxy) -> None:
    direct.put("a", b"x")
    proxy.refuse = True
    with pytest.raises(Unavailable) as e:
        far.get("a")
    assert e.value.kind == "network"
    assert proxy.counts["refused"] == 3
    proxy.refuse = False
    assert far.get("a") == b"x"


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextmanager
def odd_server(answer: Answer) -> Iterator[str]:
    """An HTTP server that answers every request as told."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def reply(status: int, body: bytes, **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True

    return answer


def at(url: str) -> S3Store:
    return S3Store("bucket", options=StoreOptions(endpoint_url=url, request_timeout_s=5.0))


@pytest.fixture
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")


@pytest.mark.usefixtures("_credentials")
class TestOddServers:
    def test_one_that_ignores_ranges_gives_the_right_bytes_all_the_same(self) -> None:
        with odd_server(reply(200, b"0123456789")) as url, closing(at(url)) as store:
            assert store.get("k", 3, 7) == b"3456"
            assert store.get("k", 3) == b"3456789"
            into = bytearray(4)
            store.get_into("k", 6, memoryview(into))
            assert into == b"6789"
            with pytest.raises(Unusable) as e:
                store.get("k", 6, 12)
            assert e.value.kind == "truncated"

    @pytest.mark.parametrize("content_range", ["bytes 0-3/10", "bytes 4-7/10", "bytes 3-9/10", "nonsense"])
    def test_one_that_answers_another_range_is_not_believed(self, content_range: str) -> None:
        with odd_server(reply(206, b"0123", Content_Range=content_range)) as url, closing(at(url)) as store:
            for call in (lambda: store.get("k", 3, 7), lambda: store.get_into("k", 3, memoryview(bytearray(4)))):
                with pytest.raises(Unavailable):
                    call()

    @pytest.mark.parametrize(
        ("status", "code", "error", "kind"),
        [
            (503, "SlowDown", Unavailable, "throttled"),
            (500, "InternalError", Unavailable, "network"),
            (403, "AccessDenied", Invalid, "permission"),
            (403, "SignatureDoesNotMatch", Invalid, "credentials"),
            (404, "NoSuchBucket", Invalid, "bucket"),
            (416, "InvalidRange", Unusable, "truncated"),
            (507, "InsufficientStorage", Unavailable, "full"),
        ],
    )
    def test_answers_are_mapped_by_status_and_code(
        self, status: int, code: str, error: type[LMCacheS3Error], kind: str
    ) -> None:
        body = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
        with odd_server(reply(status, body)) as url, closing(at(url)) as store:
            with pytest.raises(error) as e:
                store.get("k", 0, 5)
            assert e.value.kind == kind
            assert "\n" not in str(e.value)

    @pytest.mark.parametrize(
        ("status", "outcome"),
        [
            (200, Outcome.WON),
            (412, Outcome.LOST),
            (409, Outcome.UNKNOWN),
            (500, Outcome.UNKNOWN),
            (503, Outcome.UNKNOWN),
        ],
    )
    def test_answers_to_a_create(self, status: int, outcome: Outcome) -> None:
        seen: list[tuple[str | None, str | None]] = []

        def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
            seen.append((handler.headers["If-None-Match"], handler.headers["Expect"]))
            reply(status, b"")(handler)

        with odd_server(answer) as url, closing(at(url)) as store:
            assert store.create("k", b"x") is outcome
        assert seen == [("*", None)]  # once, conditional, and without a round trip before the body
