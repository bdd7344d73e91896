"""Ways to a real S3 server: TLS with a CA of one's own, proxies, buckets named by host, credentials that are renewed.

`tls/` holds a CA and a certificate of it for 127.0.0.1, localhost and *.s3.test, valid for a hundred years (openssl req
-x509 for the first, openssl x509 -req -CA for the second); the CA's key is thrown away.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lmcache_s3.errors import Invalid, Unavailable
from lmcache_s3.testing.http_servers import ForwardProxy, RecordingServer, TlsFront, reply
from lmcache_s3.testing.servers import VIRTUAL_DOMAIN, SeaweedFS
from lmcache_s3.tiers.stores.options import StoreOptions
from lmcache_s3.tiers.stores.s3 import S3Store
from lmcache_s3.types import Outcome

pytestmark = pytest.mark.s3

TLS = Path(__file__).parent / "tls"
CA = str(TLS / "ca.pem")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def place(bucket_url: str) -> tuple[str, str]:
    bucket, _, prefix = bucket_url.removeprefix("s3://").partition("/")
    return bucket, prefix


@pytest.fixture
def tls(seaweedfs: SeaweedFS) -> Iterator[TlsFront]:
    with TlsFront(seaweedfs.port, str(TLS / "server.pem")) as front:
        yield front


def use(place: tuple[str, str], **options: Any) -> None:
    """All verbs, with bodies of one and of many TLS records."""
    with closing(S3Store(*place, options=StoreOptions(**options))) as store:
        store.check()
        for size in (10, 20_000, 3_000_000):
            data = os.urandom(size)
            store.put("put", data)
            assert store.get("put") == data
            assert store.create(f"created {size}", memoryview(data)) is Outcome.WON
            into = bytearray(size - 5)
            store.get_into(f"created {size}", 5, memoryview(into))
            assert into == data[5:]
        assert store.create("created 10", data) is Outcome.LOST  # once: SeaweedFS lets a loser wait
        assert len(list(store.list("created "))) == 3
        store.delete("put")
        assert list(store.list("put")) == []


class TestTls:
    def test_all_verbs(self, place: tuple[str, str], tls: TlsFront) -> None:
        use(place, endpoint_url=tls.url, ca_bundle=CA)

    def test_the_ca_from_the_environment(
        self, place: tuple[str, str], tls: TlsFront, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_CA_BUNDLE", CA)
        use(place, endpoint_url=tls.url)

    def test_a_server_that_nobody_vouches_for(self, place: tuple[str, str], tls: TlsFront) -> None:
        with closing(S3Store(*place, options=StoreOptions(endpoint_url=tls.url))) as store:
            for call in (store.check, lambda: store.get("k"), lambda: store.put("k", b"")):
                with pytest.raises(Unavailable, match="ca_bundle"):
                    call()
            assert store.create("k", b"") is Outcome.UNKNOWN

    def test_a_server_that_speaks_no_tls(self, place: tuple[str, str], seaweedfs: SeaweedFS) -> None:
        options = StoreOptions(endpoint_url=f"https://127.0.0.1:{seaweedfs.port}", ca_bundle=CA)
        with closing(S3Store(*place, options=options)) as store:
            for call in (store.check, lambda: store.get("k")):
                with pytest.raises(Unavailable, match="does it speak TLS there, or plain http:") as e:
                    call()
                assert "ca_bundle" not in str(e.value)

    def test_another_servers_certificate(
        self, place: tuple[str, str], tls: TlsFront, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with ForwardProxy(tls.port) as proxy:
            monkeypatch.setenv("https_proxy", proxy.url)
            options = StoreOptions(endpoint_url="https://example.org", addressing_style="path", ca_bundle=CA)
            with closing(S3Store(*place, options=options)) as store, pytest.raises(Unavailable, match="TLS"):
                store.get("k")

    def test_bodies_are_not_signed(self, place: tuple[str, str]) -> None:
        with (
            RecordingServer(lambda request: reply(200)) as server,
            TlsFront(server.port, str(TLS / "server.pem")) as front,
            closing(S3Store(*place, options=StoreOptions(endpoint_url=front.url, ca_bundle=CA))) as store,
        ):
            store.put("k", b"body")
            assert server.requests[0].headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
            assert server.requests[0].body == b"body"

    def test_a_ca_file_that_is_none(self, place: tuple[str, str], tls: TlsFront, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").write_text("no certificate")
        options = StoreOptions(endpoint_url=tls.url, ca_bundle=str(tmp_path / "ca.pem"))
        with pytest.raises(Invalid) as e, closing(S3Store(*place, options=options)) as store:
            store.get("k")
        assert e.value.key == "ca_bundle"


class TestProxies:
    def test_http_by_absolute_urls(
        self, place: tuple[str, str], seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with ForwardProxy(seaweedfs.port) as proxy:
            monkeypatch.setenv("http_proxy", proxy.url.replace("http://", "http://user:p%40ss@"))
            use(place, endpoint_url="http://s3.test:1234", addressing_style="path")
            assert all(one.line.split()[1].startswith("http://s3.test:1234/") for one in proxy.seen)
            assert {one.headers["proxy-authorization"] for one in proxy.seen} == {"Basic dXNlcjpwQHNz"}

    def test_https_by_a_tunnel(self, place: tuple[str, str], tls: TlsFront, monkeypatch: pytest.MonkeyPatch) -> None:
        with ForwardProxy(tls.port) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("http://", "//user:pass@"))
            use(place, endpoint_url="https://s3.test:1234", addressing_style="path", ca_bundle=CA)
            assert {one.line.split()[1] for one in proxy.seen} == {"s3.test:1234"}
            assert {one.headers["proxy-authorization"] for one in proxy.seen} == {"Basic dXNlcjpwYXNz"}

    def test_endpoints_in_no_proxy_are_reached_directly(
        self, place: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("no_proxy", "example.org,127.0.0.1")
        use(place)

    def test_a_proxy_that_refuses(self, place: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        with RecordingServer(lambda request: reply(407, end=True)) as server:
            monkeypatch.setenv("https_proxy", server.url)
            options = StoreOptions(endpoint_url="https://far.s3.test", ca_bundle=CA)
            with closing(S3Store(*place, options=options)) as store:
                with pytest.raises(Unavailable):
                    store.get("k")
                assert store.create("k", b"") is Outcome.UNKNOWN

    def test_a_proxy_that_is_not_there_is_named_and_its_password_is_not(
        self, place: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", "http://u:secret@127.0.0.1:1")
        with closing(S3Store(*place)) as store:
            for call in (lambda: store.get("k"), lambda: list(store.list("k"))):
                with pytest.raises(Unavailable, match="by way of the proxy") as e:
                    call()
                assert "secret" not in str(e.value)

    @pytest.mark.parametrize(
        "proxy", ["https://u:secret@host:1", "socks5://host:1", "http://u:secret@host:port", "http://"]
    )
    def test_proxies_of_other_kinds_are_refused_without_repeating_them(
        self, place: tuple[str, str], proxy: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", proxy)
        with closing(S3Store(*place)) as store:
            for call in (store.check, lambda: store.get("k"), lambda: list(store.list("k"))):
                with pytest.raises(Invalid, match=r"HTTP_PROXY names .*NO_PROXY") as e:
                    call()
                assert e.value.key == "http_proxy"
                assert "secret" not in str(e.value)
                assert ("by TLS" in str(e.value)) == proxy.startswith("https")


class TestAddressing:
    def test_buckets_named_by_host(
        self, place: tuple[str, str], seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Virtual-hosted style, on a real server; the proxy stands for the name service."""
        with ForwardProxy(seaweedfs.port) as proxy:
            monkeypatch.setenv("http_proxy", proxy.url)
            use(place, endpoint_url=f"http://{VIRTUAL_DOMAIN}:8000", addressing_style="virtual")
            start = f"http://{place[0]}.{VIRTUAL_DOMAIN}:8000/"
            targets = [one.line.split()[1] for one in proxy.seen]
            assert targets
            assert all(target.startswith(start) for target in targets)
            assert any(target.startswith(f"{start}{place[1]}/put") for target in targets)

    def test_over_tls(self, place: tuple[str, str], tls: TlsFront, monkeypatch: pytest.MonkeyPatch) -> None:
        with ForwardProxy(tls.port) as proxy:
            monkeypatch.setenv("https_proxy", proxy.url)
            use(place, endpoint_url=f"https://{VIRTUAL_DOMAIN}", addressing_style="virtual", ca_bundle=CA)
            assert {one.line.split()[1] for one in proxy.seen} == {f"{place[0]}.{VIRTUAL_DOMAIN}:443"}

    def test_an_endpoint_with_a_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        with RecordingServer(lambda request: reply(200)) as server:
            options = StoreOptions(endpoint_url=server.url + "/gate/way", region="r", addressing_style="path")
            with closing(S3Store("bucket", options=options)) as store:
                store.put("k", b"")
            assert server.requests[0].target == "/gate/way/bucket/k"


class TestCredentials:
    def test_renewed_near_their_end(
        self, place: tuple[str, str], seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """By a process of the profile, whose keys end in ten minutes: less than is kept in hand, so each use asks."""
        calls, config, process = tmp_path / "calls", tmp_path / "config", tmp_path / "process.py"
        ends = (datetime.now(UTC) + timedelta(minutes=10)).isoformat()
        keys = {"Version": 1, "AccessKeyId": "outdated", "SecretAccessKey": "outdated", "Expiration": ends}
        good = {**keys, "AccessKeyId": seaweedfs.access_key, "SecretAccessKey": seaweedfs.secret_key}
        process.write_text(
            f"import pathlib\ncalls = pathlib.Path({str(calls)!r})\n"
            "n = len(calls.read_text()) if calls.exists() else 0\n"
            f"calls.write_text('x' * (n + 1))\nprint({json.dumps(keys)!r} if n == 0 else {json.dumps(good)!r})\n"
        )
        config.write_text(f"[profile renewing]\ncredential_process = {sys.executable} {process}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with closing(S3Store(*place, options=StoreOptions(profile="renewing"))) as store:
            store.put("k", b"abc")  # the first keys would be refused
            assert store.get("k") == b"abc"
        assert len(calls.read_text()) >= 2

    def test_a_token_is_sent_and_signed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("SESSION_TOKEN", "the token")):
            monkeypatch.setenv(f"AWS_{name}", value)
        with RecordingServer(lambda request: reply(200)) as server:
            with closing(S3Store("bucket", options=StoreOptions(endpoint_url=server.url, region="r"))) as store:
                store.put("k", b"")
            (request,) = server.requests
            assert request.headers["x-amz-security-token"] == "the token"
            assert "x-amz-security-token" in request.headers["authorization"]

    def test_a_process_that_fails(
        self, place: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        config = tmp_path / "config"
        config.write_text(f"[profile failing]\ncredential_process = {sys.executable} -c 'raise SystemExit(1)'\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(Invalid) as e, closing(S3Store(*place, options=StoreOptions(profile="failing"))) as store:
            store.create("k", b"")
        assert e.value.kind == "credentials"
