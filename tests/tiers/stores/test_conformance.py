"""The conformance suite against every store we ship: memory, local, S3 (SeaweedFS, Ceph), s3fs."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.exceptions
import fsspec
import pytest

from lmcache_s3.testing.object_store import ObjectStoreTests
from lmcache_s3.testing.servers import CephRGW, SeaweedFS
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.fsspec_ import FsspecStore
from lmcache_s3.tiers.stores.local import LocalStore
from lmcache_s3.tiers.stores.open import StoreOptions, open_store
from lmcache_s3.tiers.stores.s3 import S3Store
from lmcache_s3.types import Outcome


class TestLocalStore(ObjectStoreTests):
    race_keys = 40

    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        self.root = tmp_path / "not yet" / "there"
        return LocalStore(self.root)

    def plant(self, store: ObjectStore, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def peek(self, store: ObjectStore, key: str) -> bytes | None:
        path = self.root / key
        return path.read_bytes() if path.is_file() else None


class TestCountingStore(TestLocalStore):
    """A wrapper is a store, too."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        self.root = tmp_path / "store"
        return CountingStore(LocalStore(self.root))


class TestMemoryStore(ObjectStoreTests):
    race_keys = 200

    @pytest.fixture
    def store(self, memory_url: str) -> Iterator[ObjectStore]:
        self.root = memory_url.replace("memory://", "/") + "/pre"
        store = open_store(memory_url + "/pre")
        yield store
        store.close()

    def plant(self, store: ObjectStore, key: str, data: bytes) -> None:
        fsspec.filesystem("memory").pipe_file(f"{self.root}/{key}", data)

    def peek(self, store: ObjectStore, key: str) -> bytes | None:
        file = fsspec.filesystem("memory").store.get(f"{self.root}/{key}")
        return None if file is None else bytes(file.getvalue())


@pytest.fixture(scope="module")
def seaweedfs_client(seaweedfs: SeaweedFS) -> Iterator[Any]:
    with seaweedfs.client() as client:
        yield client


@pytest.fixture(scope="module")
def ceph_client(ceph_rgw: CephRGW) -> Iterator[Any]:
    with ceph_rgw.client() as client:
        yield client


class S3Backdoor(ObjectStoreTests):
    """Plants and peeks with a plain boto3 client."""

    bucket: str
    prefix: str
    client: Any

    @pytest.fixture
    def root(self, bucket_url: str, seaweedfs_client: Any) -> str:
        return self.at(bucket_url, seaweedfs_client)

    def at(self, url: str, client: Any) -> str:
        self.client = client
        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix}/pre fix"
        return f"s3://{self.bucket}/{self.prefix}"

    def plant(self, store: ObjectStore, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}", Body=data)

    def peek(self, store: ObjectStore, key: str) -> bytes | None:
        try:
            body = self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}")["Body"]
        except botocore.exceptions.ClientError as e:
            if e.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise
            return None
        with body:
            data: bytes = body.read()
        return data


@pytest.mark.s3
class TestS3StoreOnSeaweedFS(S3Backdoor):
    sorts_directories = False
    race_threads = 4
    race_keys = 2  # losers wait whole seconds there

    @pytest.fixture
    def store(self, root: str) -> Iterator[ObjectStore]:
        store = open_store(root)
        assert isinstance(store, S3Store)
        yield store
        store.close()


@pytest.mark.s3
@pytest.mark.slow
class TestS3fsOnSeaweedFS(S3Backdoor):
    """The same server through fsspec: what `open_store` does for schemes that have no native store."""

    race_threads = 4
    race_keys = 1

    @pytest.fixture
    def store(self, root: str) -> Iterator[ObjectStore]:
        store = FsspecStore.from_url(root)
        yield store
        store.close()


@pytest.mark.s3
@pytest.mark.slow
class TestS3StoreOnCeph(S3Backdoor):
    @pytest.fixture
    def root(self, ceph_bucket_url: str, ceph_client: Any) -> str:
        return self.at(ceph_bucket_url, ceph_client)

    @pytest.fixture
    def store(self, root: str) -> Iterator[ObjectStore]:
        store = open_store(root)
        yield store
        store.close()

    def test_creators_on_two_gateways(self, root: str, ceph_rgw: CephRGW) -> None:
        """Each gateway alone could serialise creates; only the cluster below can do so for both."""
        stores = [
            open_store(root, options=StoreOptions(endpoint_url=url)) for url in ceph_rgw.endpoint_urls for _ in range(4)
        ]
        self.race(stores)
        key = f"race/{secrets.token_hex(4)}"
        assert stores[0].create(key, b"a") is Outcome.WON
        assert stores[-1].create(key, b"b") is Outcome.LOST
        for store in stores:
            store.close()
