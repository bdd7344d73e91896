"""The tables agree with what was stored."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache_s3.analysis import chunks, extents, spaces
from lmcache_s3.errors import Invalid
from lmcache_s3.extent_array import open_extent
from lmcache_s3.identity import KVGroup, Space
from lmcache_s3.testing.filling import fill
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import Grid

SPACE = Space("ab" * 32, "float16", (KVGroup("full", 4, 2, 2, 8),), chunk_tokens=16, model="org/small")


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in list(os.environ):
        if name.startswith("LMCACHE_S3_"):
            monkeypatch.delenv(name)
    return f"file://{tmp_path / 'store'}"


def test_tables_of_a_cache(url: str) -> None:
    store = open_store(url)
    first, second = fill(store, SPACE, range(32)), fill(store, SPACE, range(80), grid=Grid(2, 2))
    assert first is not None
    assert second is not None
    one = spaces(url).iloc[0]
    assert (one["space"], one["model"], one["chunks"], one["tokens"]) == (SPACE.id, "org/small", 5, 80)
    rows = extents(url, SPACE.id[:7])
    assert list(rows["extent"]) == [str(first.name), str(second.name)]
    assert list(rows["first_token"]) == [0, 32]
    assert list(rows["encoded_bytes"]) == [first.encoded_bytes, second.encoded_bytes]
    assert rows["created_at"].notna().all()
    assert rows["created_at"].dt.year.min() >= 2024
    assert open_extent(rows["url"][1]).shape == (2, 4, 48, 2, 8)
    cells = chunks(url)
    assert list(cells["first_token"]) == [0, 16, 32, 48, 64]
    assert list(cells["prefix_hash"]) == [h.hex() for r in (first, second) for h in r.chunk_hashes()]
    assert cells.groupby("extent", sort=False)["encoded_bytes"].sum().tolist() == [
        first.encoded_bytes, second.encoded_bytes,
    ]  # fmt: skip


def test_an_empty_root_gives_empty_tables_with_their_columns(url: str) -> None:
    assert list(spaces(url)["chunks"]) == []
    assert str(extents(url)["created_at"].dtype).startswith("datetime64")
    assert list(chunks(url).columns)[:2] == ["space", "prefix_hash"]
    with pytest.raises(Invalid, match="no space of that id"):
        extents(url, "ab")


@pytest.mark.parametrize("table", [spaces, extents, chunks])
def test_without_pandas(url: str, table: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(Invalid, match="pandas is missing: pip install"):
        table(url)


def test_the_url_comes_from_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(open_store(url), SPACE, range(16))
    monkeypatch.setenv("LMCACHE_S3_URL", url)
    assert len(spaces()) == 1
