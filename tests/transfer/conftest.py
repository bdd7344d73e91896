"""A counted store in memory, and transfers over it that end with the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.testing.gated import GatedStore
from lmcache_s3.testing.small import fresh_memory_url
from lmcache_s3.testing.whole_arrays import GEOMETRY, SPACE, MakeTransfer
from lmcache_s3.tiers.base import Tier
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.transfer import Transfer, TransferSettings
from lmcache_s3.types import Geometry


@pytest.fixture
def store() -> CountingStore:
    return CountingStore(open_store(fresh_memory_url()))


@pytest.fixture
def make(store: CountingStore) -> Iterator[MakeTransfer]:
    made: list[Transfer] = []

    def make(
        *tiers: Tier,
        over: object = store,
        codec: str | KVCodec = "fast",
        geometry: Geometry = GEOMETRY,
        **settings: object,
    ) -> Transfer:
        known = TransferSettings(**({"io_threads": 4, "staging_bytes": 8 << 20} | settings))  # type: ignore[arg-type]
        own = make_codec(codec) if isinstance(codec, str) else codec
        transfer = Transfer(over, SPACE.id, geometry, own, tiers, settings=known)  # type: ignore[arg-type]
        made.append(transfer)
        return transfer

    yield make
    for transfer in made:
        transfer.close()


@pytest.fixture
def gate(store: CountingStore) -> GatedStore:
    return GatedStore(store)
