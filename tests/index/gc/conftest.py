"""An empty store with a clock of its own, and a log over it."""

from __future__ import annotations

import pytest

from lmcache_s3.index.log import Log
from lmcache_s3.testing.clocked import ClockedStore
from lmcache_s3.testing.collecting import open_log


@pytest.fixture
def store() -> ClockedStore:
    return ClockedStore()


@pytest.fixture
def log(store: ClockedStore) -> Log:
    return open_log(store)
