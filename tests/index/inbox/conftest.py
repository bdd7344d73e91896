"""Followers over one store in memory."""

from __future__ import annotations

import pytest

from lmcache_s3.testing.stepped import Fleet
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store


@pytest.fixture
def fleet(memory_url: str) -> Fleet:
    return Fleet(CountingStore(open_store(memory_url)))
