"""How the index is doing: rates of the last hour, leader, inbox, dollars by the protocol's own table."""

from __future__ import annotations

import random
import secrets

import pytest

from lmcache_s3.analysis.pulse import NEWEST, Pulse, pulse
from lmcache_s3.identity import KVGroup, Space
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import Delta, encode_delta, inbox_key, log_key
from lmcache_s3.testing.clocked import ClockedStore
from lmcache_s3.types import ExtentName, ExtentRecord, Grid

SPACE = Space("ab" * 32, "bfloat16", (KVGroup("full", 2, 2, 2, 4),), chunk_tokens=16, model="org/small")
WRITERS = [f"01JDXB4Z5T8V6Q2W3E4R5T6Y7{c}" for c in "HJK"]


def make_record() -> ExtentRecord:
    hashes = secrets.token_bytes(16)
    return ExtentRecord(
        ExtentName.fresh(hashes, 1, "fast", 0), Grid(), b"\0" * 16, 0, hashes, b"\1\0\0\0", b"\2" * 8, 100
    )


@pytest.fixture
def store() -> ClockedStore:
    return ClockedStore()


def versions(store: ClockedStore, n: int, every_s: float, lead: str | None = None) -> None:
    for i in range(1, n + 1):
        delta = Delta(WRITERS[i % 3] if lead is None else lead, add=(make_record(),), lead=lead)
        store.create(log_key(SPACE.id, i), encode_delta(delta))
        store.now_s += every_s


def look(store: ClockedStore) -> Pulse:
    return pulse(store, SPACE, store.now_s)


def test_an_empty_space_costs_its_polls(store: ClockedStore) -> None:
    found = look(store)
    assert (found.version, found.idle_s, found.versions_per_s, found.inbox, found.hints) == (0, None, 0, 0, ())
    assert found.read_dollars_per_day == pytest.approx(0.0173, abs=0.0005)  # one GET each 2 s
    assert found.write_dollars_per_day == 0


def test_rates_are_of_the_last_hour(store: ClockedStore) -> None:
    versions(store, 100, 72.0)
    found = look(store)
    assert found.versions_per_s == pytest.approx(50 / 3600)
    assert found.extents_per_s == found.versions_per_s
    assert (found.writers, found.idle_s, found.behind, found.lead) == (3, 72, 100, None)
    store.now_s += 7200
    found = look(store)
    assert (found.versions_per_s, found.writers, found.idle_s) == (0, 0, 7272)


def test_a_busy_log_is_judged_by_its_newest_versions(store: ClockedStore) -> None:
    versions(store, 2 * NEWEST, 0.2)
    found = look(store)
    assert found.versions_per_s == pytest.approx(5.0)
    assert found.write_dollars_per_day == pytest.approx(86_400 * 5 * 5.8e-6)
    (hint,) = found.hints
    assert "3 writers contend at 5.0 versions/s" in hint


def test_under_a_leader(store: ClockedStore) -> None:
    versions(store, 2 * NEWEST, 1.0, lead=WRITERS[0])
    found = look(store)
    assert (found.lead, found.writers, found.hints) == (WRITERS[0], 1, ())
    assert found.write_dollars_per_day == pytest.approx(86_400 * (5.8e-6 + 5e-6 + 5.4e-6))


def test_hand_overs_that_nobody_merges(store: ClockedStore) -> None:
    store.put(inbox_key(SPACE.id, WRITERS[0]), b"{}")
    store.now_s += 20
    assert (look(store).inbox, look(store).inbox_age_s, look(store).hints) == (1, 20, ())
    store.now_s += 20
    assert "1 hand-overs wait, the oldest for 40 s" in look(store).hints[0]


def test_what_an_engine_reads_that_opens_now(store: ClockedStore) -> None:
    versions(store, 5, 1.0)
    log = Log(store, SPACE.id, writer=WRITERS[0], sleep=lambda _: None, rng=random.Random(1), nonce=lambda: "a" * 32)
    log.open()
    log.checkpoint()
    store.create(log_key(SPACE.id, 6), encode_delta(Delta(WRITERS[0])))
    assert look(store).behind == 1
