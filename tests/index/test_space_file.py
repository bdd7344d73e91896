"""The space's file: written once, read back when its answer is lost, refused when it is another's."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_s3.errors import Unavailable, Unsafe
from lmcache_s3.identity import Space
from lmcache_s3.index.service import Index, IndexSettings
from lmcache_s3.index.space_file import ensure_space, space_key
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.small import small_space
from lmcache_s3.tiers.stores.counting import CountingStore

SPACE = small_space()


def test_space_file(store: CountingStore) -> None:
    ensure_space(store, SPACE, read_only=True)
    assert list(store.list("")) == []
    ensure_space(store, SPACE)
    assert store.get(space_key(SPACE.id)) == SPACE.to_json()
    store.counts.clear()
    ensure_space(store, SPACE)
    assert store.counts == {"get": 1}


@pytest.mark.parametrize("mode", ["lost_answer", "error"])
def test_space_file_whose_answer_is_lost(store: CountingStore, mode: Any) -> None:
    faulty = FaultyStore(store, [Fault(mode=mode, verbs=frozenset({"create"}))])
    if mode == "lost_answer":
        ensure_space(faulty, SPACE)
    else:
        with pytest.raises(Unavailable):
            ensure_space(faulty, SPACE)


def test_a_foreign_space_file_is_refused(store: CountingStore) -> None:
    other = Space(
        **{f: getattr(SPACE, f) for f in SPACE.__dataclass_fields__} | {"weights": "cd" * 32, "model": "other"}
    )
    for content in (other.to_json(), b"junk", b"{}"):
        store.put(space_key(SPACE.id), content)
        for read_only in (False, True):
            with pytest.raises(Unsafe) as e:
                Index.open(store, SPACE, settings=IndexSettings(read_only=read_only))
            assert e.value.kind == "foreign_space"
            assert "\n" not in str(e.value)
