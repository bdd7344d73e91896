"""The store that most tests of the index are about: local files, each request counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(LocalStore(tmp_path))
