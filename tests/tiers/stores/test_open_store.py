"""`open_store`: which URL gives which store, and what is said of the others."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lmcache_s3.errors import Invalid
from lmcache_s3.tiers.stores.fsspec_ import FsspecStore
from lmcache_s3.tiers.stores.local import LocalStore
from lmcache_s3.tiers.stores.open import StoreOptions, open_store
from lmcache_s3.tiers.stores.s3 import S3Store


@pytest.mark.parametrize(
    ("url", "kind", "shown"),
    [
        ("/tmp/a b", LocalStore, "file:///tmp/a b"),
        ("file:///tmp/a%20b/", LocalStore, "file:///tmp/a b"),
        ("file://localhost/tmp/x", LocalStore, "file:///tmp/x"),
        ("memory://name/prefix/", FsspecStore, "memory:///name/prefix"),
        ("s3://bucket", S3Store, "s3://bucket"),
        ("s3://bucket/", S3Store, "s3://bucket"),
        ("S3://bucket/a/b/", S3Store, "s3://bucket/a/b"),
    ],
)
def test_urls(url: str, kind: type, shown: str) -> None:
    store = open_store(url)
    assert type(store) is kind
    assert store.url == shown
    store.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "no scheme"),
        ("bucket/prefix", "no scheme"),
        ("s4://bucket", "did you mean s3://"),
        ("flie:///x", "did you mean file://"),
        ("qqqq://x", "known are s3, gs, az"),
        ("s3://", "no valid bucket name"),
        ("s3:///prefix", "no valid bucket name"),
        ("s3://b", "no valid bucket name"),
        ("s3://bucket/a?region=x", "use settings instead"),
        ("file://host/path", "three slashes"),
        ("file://relative", "three slashes"),
    ],
)
def test_bad_urls_are_named_with_the_mend(url: str, says: str) -> None:
    with pytest.raises(Invalid, match=says) as e:
        open_store(url)
    assert (e.value.kind, e.value.key) == ("url", "url")
    assert "\n" not in str(e.value)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(Invalid, match="environment or profile") as e:
        open_store("s3://KEY:topsecret@bucket/prefix")
    assert "topsecret" not in str(e.value)


@pytest.mark.parametrize("url", ["s3://bucket/../other", "s3://bucket/a//b"])
def test_a_bad_prefix_is_refused(url: str) -> None:
    with pytest.raises(Invalid):
        open_store(url)


@pytest.mark.parametrize(("url", "package", "extra"), [("gs://b/p", "gcsfs", "gcs"), ("az://b/p", "adlfs", "azure")])
def test_a_missing_extra_is_named(url: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(Invalid) as e:
        open_store(url)
    assert f"pip install lmcache-s3[{extra}]" in str(e.value)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (StoreOptions(endpoint_url="no url"), "endpoint_url"),
        (StoreOptions(profile="nobody"), None),
        (StoreOptions(ca_bundle="/does/not/exist.pem", endpoint_url="https://127.0.0.1:1"), "ca_bundle"),
    ],
)
def test_bad_options_are_refused_at_start(options: StoreOptions, key: str | None) -> None:
    with pytest.raises(Invalid) as e:
        open_store("s3://bucket", options=options)
    assert e.value.key == key
    assert "\n" not in str(e.value)


def test_options_in_the_words_of_fsspec() -> None:
    options = StoreOptions(
        endpoint_url="http://h:1", region="eu", addressing_style="path", ca_bundle="/ca.pem", profile="p",
        requester_pays=True, storage_options={"token": "anon"},
    )  # fmt: skip
    assert options.for_fsspec("s3://bucket/x") == {
        "endpoint_url": "http://h:1",
        "profile": "p",
        "requester_pays": True,
        "client_kwargs": {"region_name": "eu", "verify": "/ca.pem"},
        "config_kwargs": {"s3": {"addressing_style": "path"}},
    }
    assert options.for_fsspec("gs://bucket/x") == {"token": "anon"}
    assert options.for_fsspec("file:///x") == options.for_fsspec("/x") == StoreOptions().for_fsspec("s3://b/x") == {}


def test_unknown_storage_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="storage_options"):
        open_store("zip://x", options=StoreOptions(storage_options={"parrots": 12}))
