"""Kernels compile where nothing can be cached on disk."""

from __future__ import annotations

from typing import Any

import numba
import pytest

from lmcache_s3.kernels.jit import kernel


def double(x: int) -> int:
    return 2 * x


def test_without_a_directory_to_write_kernels_are_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def refusing(*args: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            return broken
        return njit(*args, **options)

    def broken(function: object) -> object:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(numba, "njit", refusing)
    assert kernel(double)(21) == 42
