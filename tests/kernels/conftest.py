"""What several tests of kernels need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmcache_s3.testing.interpreted import Interpreter


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as running:
        yield running
