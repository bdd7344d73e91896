"""The clients that we are compared with, on a real server: they read what is there, and say what it cost them."""

from __future__ import annotations

from contextlib import closing
from typing import get_args

import pytest

from lmcache_s3.benchmarks.transfer_raw import Client, Range, RawClient
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Unavailable
from lmcache_s3.testing.extents import make_extent
from lmcache_s3.testing.servers import SeaweedFS
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import Geometry, Grid

pytestmark = pytest.mark.s3


@pytest.mark.parametrize("client", get_args(Client))
def test_each_client_reads_and_writes(client: Client, bucket_url: str, seaweedfs: SeaweedFS) -> None:
    with closing(open_store(bucket_url)) as store, RawClient(bucket_url, seaweedfs.env(), client, busy=True) as raw:
        assert raw.put({f"o{i}": 10_000 + i for i in range(6)}, at_once=3).n_bytes == 60_015
        assert sum(info.size_bytes for info in store.list("o")) == 60_015
        assert raw.get([Range(f"o{i}", 10, 5_000 + i) for i in range(6)], at_once=3).n_bytes == 6 * 4_990 + 15
        assert raw.get([Range("o0", 0, 10_000), Range("o1", 5, 6)], at_once=1).n_bytes == 10_001


def test_orders_one_after_another(bucket_url: str, seaweedfs: SeaweedFS) -> None:
    made = make_extent(make_codec("fast"), Geometry(2, 4, 4, 8, "bfloat16", 16), Grid(2, 2), 3)
    with closing(open_store(bucket_url)) as store, RawClient(bucket_url, seaweedfs.env()) as raw:
        for path, data in made.objects.items():
            store.put(f"extent/{path}", data)
        spent = raw.put({f"o{i}": 10_000 + i for i in range(6)}, at_once=3)
        assert spent.n_bytes == sum(info.size_bytes for info in store.list("o")) == 60_015
        spent = raw.get([Range(f"o{i}", 10, 5_000 + i) for i in range(6)], at_once=3)
        assert spent.n_bytes == 6 * 4_990 + 15
        assert spent.seconds > 0
        assert spent.cpu_s > 0
        assert raw.zarr(["extent"] * 3, at_once=2).n_bytes == 3 * made.bits.nbytes
        with pytest.raises(Unavailable, match="bytes of"):
            raw.get([Range("o0", 9_000, 11_000)], at_once=1)
        with pytest.raises(Unavailable):
            raw.get([Range("none", 0, 1)], at_once=1)
        assert raw.get([Range("o0", 0, 1)], at_once=1).n_bytes == 1
