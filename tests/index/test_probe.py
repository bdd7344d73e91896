"""The probe: stores whose create is not put-if-absent are refused; no answer is no proof."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lmcache_s3.errors import Unavailable, Unsafe
from lmcache_s3.index.probe import probe
from lmcache_s3.index.service import Index, IndexSettings
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.small import small_space
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.local import LocalStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import Buffer, Outcome

SPACE = small_space()


class Racy(LocalStore):
    """Looks, then writes: what many clients call put-if-absent."""

    def create(self, key: str, data: Buffer) -> Outcome:
        if any(info.key == key for info in self.list(key)):
            return Outcome.LOST
        time.sleep(0.01)
        self.put(key, data)
        return Outcome.WON


class Ignoring(LocalStore):
    """Ignores the condition, and is quick enough to be caught only by what it holds."""

    def create(self, key: str, data: Buffer) -> Outcome:
        self.put(key, data)
        return Outcome.WON


class Liar(LocalStore):
    """Answers as it should, but writes anyway."""

    def create(self, key: str, data: Buffer) -> Outcome:
        outcome = super().create(key, data)
        self.put(key, data)
        return outcome


@pytest.mark.parametrize("kind", [Racy, Ignoring, Liar])
def test_probe_refuses(kind: type[LocalStore], tmp_path: Path) -> None:
    store = kind(tmp_path)
    with pytest.raises(Unsafe, match=r"single_writer=true") as e:
        Index.open(store, SPACE)
    assert e.value.kind == "no_put_if_absent"
    assert store.url in str(e.value)
    assert not list(store.list("probe/")), "cleans up"
    index = Index.open(store, SPACE, settings=IndexSettings(single_writer=True))
    assert index.probed is None
    index.close()


def test_probe_accepts(store: CountingStore, memory_url: str) -> None:
    for good in (store, open_store(memory_url)):
        report = probe(good, "spaces/")
        assert (report.races, report.undecided) == (3, 0)
        assert not list(good.list("spaces/probe/"))


def test_probe_that_nobody_answers_is_no_proof(store: CountingStore) -> None:
    with pytest.raises(Unavailable):
        probe(FaultyStore(store, [Fault(mode="lost_answer", verbs=frozenset({"create"}))]), "")


def test_probe_survives_some_lost_answers(store: CountingStore) -> None:
    lossy = FaultyStore(store, [Fault(mode="lost_answer", verbs=frozenset({"create"}), times=1)])
    report = probe(lossy, "")
    assert report.undecided <= 1
