"""Writers killed with SIGKILL at random moments, two hundred times, on a real S3 server."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
from ulid import ULID

from lmcache_s3.analysis.check import check_extent
from lmcache_s3.index.follower import Follower, Pacing
from lmcache_s3.index.gc import Collector, GcSettings
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import State
from lmcache_s3.index.probe import probe
from lmcache_s3.index.space_file import ensure_space
from lmcache_s3.testing import doomed_writer
from lmcache_s3.testing.doomed_writer import SPACE
from lmcache_s3.testing.filling import fill
from lmcache_s3.testing.servers import SeaweedFS
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import ExtentName, space_prefix


@dataclass(frozen=True)
class Round:
    """kills: writers that live and die, at_once of them at a time, each for longest_life_s at most. led: a leader, who
    lives, merges what they hand over; else they commit themselves, and pause so that none becomes a leader who dies."""

    kills: int
    at_once: int
    longest_life_s: float
    pause_s: float
    led: bool


ROUNDS = (Round(100, 2, 1.5, 1.0, led=False), Round(100, 6, 5.0, 0.0, led=True))


def live_and_die(url: str, server: SeaweedFS, seed: int, one_round: Round) -> list[ExtentName]:
    """One writer; what it was acknowledged before it was killed. Its life begins when its index is open (a busy machine
    takes long to get there), one in five's at once."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=doomed_writer.write, args=(url, server.env(), seed, one_round.pause_s, theirs))
    process.start()
    theirs.close()
    if seed % 5:
        assert ours.poll(120), "a writer does not start"
    time.sleep(random.Random(seed).uniform(0.0, one_round.longest_life_s))
    process.kill()
    process.join()
    told = []
    try:
        while True:
            told.append(ours.recv())
    except (EOFError, OSError):
        return [ExtentName.parse(name) for name in told if name != doomed_writer.OPEN]


@contextmanager
def leader(url: str) -> Iterator[None]:
    """A process's part that merges the inbox meanwhile."""
    store = open_store(url)
    log = opened(store)
    log.commit((), lead=log.writer)
    follower = Follower(log, Pacing(poll_s=0.3, merge_s=0.2), rng=random.Random(0), ulid=lambda: str(ULID()))
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(max(0.0, follower.due_s() - time.monotonic())):
            follower.step()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        follower.drain()
        store.close()


def opened(store: ObjectStore) -> Log:
    numbers = iter(range(10**6))
    log = Log(store, SPACE.id, str(ULID()), time.sleep, random.Random(0), lambda: f"{next(numbers):032x}")
    log.open()
    return log


def uploads(store: ObjectStore) -> Iterator[tuple[str, ExtentName]]:
    """(key, extent) of every object under extents/."""
    for info in store.list(space_prefix(SPACE.id) + "extents/"):
        yield info.key, ExtentName.parse(info.key.split("/")[4])


def orphans(store: ObjectStore, state: State) -> set[str]:
    live = {one.record.name for one in state.in_order()}
    return {key for key, name in uploads(store) if name not in live}


@pytest.mark.slow
def test_kill_9_of_writers_loses_nothing_acknowledged(bucket_url: str, seaweedfs: SeaweedFS) -> None:
    store = open_store(bucket_url)
    probe(store, "")
    ensure_space(store, SPACE)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["lmcache_s3.testing.doomed_writer"])
    acknowledged: set[ExtentName] = set()
    for number, one_round in enumerate(ROUNDS):
        with leader(bucket_url) if one_round.led else nullcontext(), ThreadPoolExecutor(one_round.at_once) as pool:
            seeds = range(1000 * number, 1000 * number + one_round.kills)
            lives = [pool.submit(live_and_die, bucket_url, seaweedfs, seed, one_round) for seed in seeds]
            told = [life.result() for life in lives]
        assert sum(map(bool, told)) > one_round.kills // 4, "too few writers lived to store anything"
        acknowledged.update(name for names in told for name in names)

    log = opened(store)
    state = log.state
    assert acknowledged <= set(state.extents), "an acknowledged commit is lost"
    for one in state.in_order():
        assert check_extent(store, SPACE, one.record) == [], "an entry without its bytes"

    # What was named at the newest version is only known to be an orphan once there is a newer one.
    assert fill(store, SPACE, range(SPACE.chunk_tokens)) is not None
    log.sync()
    collector = Collector(log, GcSettings(grace_s=0.0))
    left_behind = orphans(store, log.state)
    handed_over = log.state
    planned = {one.key for one in collector.run(dry_run=True).deletions if one.kind == "extent"}
    assert planned == left_behind, "gc finds all orphans, and nothing else"
    assert left_behind, "nobody died between its upload and its commit"

    report = collector.run()  # merges what the dead handed over, then deletes
    assert set(handed_over.extents) <= set(log.state.extents)
    assert orphans(store, log.state) == set()
    assert report.objects["extent"] <= len(left_behind)
    assert all(check_extent(store, SPACE, one.record) == [] for one in log.state.in_order())
