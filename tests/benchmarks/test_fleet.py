"""`bench fleet` in short, on the real cluster, and whether its checks notice what they are there to notice."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lmcache_s3.benchmarks import fleet, fleet_worker
from lmcache_s3.benchmarks.fleet_worker import GRID, SPACE, Collected, Done, Looked, Where, hashes_of
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.errors import Missing, Unusable
from lmcache_s3.index.service import Index, IndexSettings
from lmcache_s3.testing.lean_store import LeanStore
from lmcache_s3.testing.servers import CephRGW
from lmcache_s3.tiers.stores.local import LocalStore
from lmcache_s3.types import Outcome, extent_prefix, shard_key

SHORT = fleet.Plan(writers=8, processes=2, warm_up_s=4.0, store_s=6.0, collect_s=25.0, grace_s=2.0)
QUIET = Steps(Console(quiet=True))


def tick(_: float) -> None:
    pass


@pytest.mark.slow
@pytest.mark.s3
def test_a_short_run_loses_nothing_and_sees_everything(ceph_rgw: CephRGW, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ceph_rgw.env().items():
        monkeypatch.setenv(name, value)
    run = fleet.Fleet(ceph_rgw, SHORT)
    result = run.store(tick)
    assert result.wrong == []
    assert result.stored == result.acknowledged == result.verdicts["live"] > 100
    assert result.unseen == 0
    assert len(result.visible_s) > 50
    assert 0 < np.percentile(result.visible_s, 50) < 10
    assert 1 < result.puts_per_1000_chunks < 50
    looked, collected, done = run.collect(tick)
    assert looked.gone == []
    assert looked.looks > 20
    assert sum(one.verdicts["live"] for one in done) > 50
    assert sum(one.rounds for one in collected) > 0


@pytest.mark.slow
@pytest.mark.s3
def test_the_lean_client_keeps_the_port(ceph_rgw: CephRGW, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ceph_rgw.env().items():
        monkeypatch.setenv(name, value)
    store = LeanStore(f"s3://tests/{secrets.token_hex(8)}", ceph_rgw.endpoint_url)
    assert store.create("d/a", b"first") is Outcome.WON
    assert store.create("d/a", b"second") is Outcome.LOST
    store.put("d/b", b"0123456789")
    assert store.get("d/a") == b"first"
    assert store.get("d/b", 2, 4) == b"23"
    assert [info.key for info in store.list("d/")] == ["d/a", "d/b"]
    assert [info.key for info in store.list("d/", start_after="d/a", limit=1)] == ["d/b"]
    with pytest.raises(Unusable, match="shorter"):
        store.get("d/b", 5, 20)
    store.delete("d/b")
    store.delete("d/b")
    with pytest.raises(Missing):
        store.get("d/b")
    with pytest.raises(Missing):
        store.get("d/b", 0, 1)


@pytest.fixture
def stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Where, LocalStore, dict[tuple[int, int], str], Any]:
    """Two extents of one writer in a local store, which every `Where` opens."""
    monkeypatch.setattr(Where, "open", lambda _: LocalStore(tmp_path))
    where, store = Where("file://", ""), LocalStore(tmp_path)
    names: dict[tuple[int, int], str] = {}
    with Index.open(store, SPACE, settings=IndexSettings(single_writer=True), background=False) as index:
        for number in range(2):
            record = fleet_worker.upload(store, index.version, "run", 3, number, 4)
            index.commit([record]).result(5)
            names[3, number] = str(record.name)
    return where, store, names, record


Damage = Callable[[LocalStore, str], None]


def flip(store: LocalStore, key: str) -> None:
    data = bytearray(store.get(key))
    data[5000] ^= 1
    store.put(key, data)


@pytest.mark.parametrize(("damage", "says"), [(flip, "cell 1 is not what"), (LocalStore.delete, "not there")])
def test_reading_back_notices_damage(stored: Any, damage: Damage, says: str) -> None:
    where, store, names, record = stored
    assert fleet_worker.read_back(where, "run", 4, names) == []
    damage(store, shard_key(SPACE.id, record.name, GRID, 0))
    (wrong,) = fleet_worker.read_back(where, "run", 4, names)
    assert says in wrong


def test_reading_back_notices_what_is_not_indexed_or_is_another_extent(stored: Any) -> None:
    where, _, names, _ = stored
    (wrong,) = fleet_worker.read_back(where, "run", 4, names | {(3, 2): "nobody"})
    assert "not in the index" in wrong
    swapped = {(3, 0): names[3, 1], (3, 1): names[3, 0]}
    assert all("other prefix hashes" in wrong for wrong in fleet_worker.read_back(where, "run", 4, swapped))
    assert len(fleet_worker.read_back(where, "run", 4, swapped)) == 2


def test_looking_notices_a_live_extent_without_its_bytes(stored: Any) -> None:
    _, store, _, record = stored
    log, looked = fleet_worker.new_log(store, 64), Looked()
    log.open()
    fleet_worker.look_once(store, log, looked)
    assert (looked.looks, looked.gone) == (2, [])
    store.delete(f"{extent_prefix(SPACE.id, record.name)}/zarr.json")
    fleet_worker.look_once(store, log, looked)
    assert looked.gone == [f"{record.name} at version 2"]
    fleet_worker.new_log(store, 64).commit([], [record.name])  # out of the index: nobody misses it
    fleet_worker.look_once(store, log, looked)
    assert (looked.looks, len(looked.gone)) == (5, 1)


def test_what_was_not_acknowledged_void_or_unreadable_counts_as_lost() -> None:
    done = Done(
        asked_s={(0, 0): 1.0, (0, 1): 2.0, (0, 2): 12.0, (0, 3): 13.0},
        acknowledged_s={(0, 0): 1.5, (0, 1): 2.5, (0, 2): 13.0},
        seen_s={(0, 0): 2.0, (0, 2): 14.0},
        names={(0, 0): "a", (0, 2): "c"},
        verdicts=Counter(live=2, void=1),
        requests=Counter(put=3, create=1, get=9),
    )
    result = fleet._result([done], ["c: damaged"], from_s=10.0)
    assert result.visible_s.tolist() == [2.0]
    assert result.start_visible_s.tolist() == [1.0]
    assert result.unseen == 0
    figures = {f.name: f for f in fleet.figures_of("fleet.", result, 3, 22)}
    assert figures["fleet.lost"].value == 1 + 1 + 1
    assert not figures["fleet.lost"].ok
    assert figures["fleet.puts_per_1000_chunks"].value == 1000 * 4 / (4 * 64)


def test_a_live_extent_that_is_gone_fails_the_collection() -> None:
    figures = fleet.collection_figures(Looked(["x"], 5), [Collected(2, 3, 4)], [Done()], QUIET)
    assert not next(f for f in figures if f.name == "fleet.gc_deleted_live").ok


def test_hashes_and_cells_are_a_function_of_run_writer_and_number() -> None:
    assert hashes_of("r", 1, 2, 3) == hashes_of("r", 1, 2, 3)
    assert len({hashes_of(r, w, n, 3) for r in "rs" for w in (1, 2) for n in (1, 2)}) == 8
    assert fleet_worker.cells_of("r", 1, 2, 3) == fleet_worker.cells_of("r", 1, 2, 3)
    assert fleet_worker.cells_of("r", 1, 2, 3) != fleet_worker.cells_of("r", 1, 3, 3)
