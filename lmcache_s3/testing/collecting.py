"""A log over a store with a clock of its own, extents in it, and rounds of collection: what is there before and after.

Records are random; nothing sleeps. For tests of the collector.
"""

from __future__ import annotations

import random
import secrets
from typing import Any

from lmcache_s3.identity import root_hash
from lmcache_s3.index.gc import Collector, GcReport, GcSettings
from lmcache_s3.index.log import Log, LogLimits
from lmcache_s3.index.manifest import Verdict, checkpoints_prefix, log_key
from lmcache_s3.testing.clocked import ClockedStore
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import ExtentName, ExtentRecord, Grid, extent_prefix, shard_key

SPACE_ID = "ab" * 32
ULID = "01JDXB4Z5T8V6Q2W3E4R5T6Y7H"
HOUR_S = 3600.0
DAY_S = 86_400.0


def make_record(
    born: int = 0, *, after: ExtentRecord | None = None, salt: str = "", chunks: int = 2, cell_bytes: int = 10
) -> ExtentRecord:
    hashes = secrets.token_bytes(16 * chunks)
    parent = root_hash(SPACE_ID, salt)[:16] if after is None else after.name.last_hash
    first_token = 0 if after is None else after.first_token + 256 * after.n_chunks
    lengths = cell_bytes.to_bytes(4, "little") * chunks
    name = ExtentName.fresh(hashes[-16:], chunks, "fast", born)
    return ExtentRecord(name, Grid(), parent, first_token, hashes, lengths, b"\2" * 8 * chunks, 100)


def open_log(store: ObjectStore, *, milestone: int = 4, checkpoint_every: int = 10**9, attempts: int = 64) -> Log:
    log = Log(
        store,
        SPACE_ID,
        writer=ULID,
        sleep=lambda _: None,
        rng=random.Random(7),
        nonce=lambda: secrets.token_hex(16),
        limits=LogLimits(milestone=milestone, checkpoint_every=checkpoint_every, max_commit_attempts=attempts),
    )
    log.open()
    return log


def upload(store: ObjectStore, record: ExtentRecord) -> None:
    store.put(shard_key(SPACE_ID, record.name, record.grid, 0), b"x" * 20)
    store.put(extent_prefix(SPACE_ID, record.name) + "/zarr.json", b"{}")


def stored(log: Log, **make: Any) -> ExtentRecord:
    """An extent uploaded and committed."""
    record = make_record(log.state.version, **make)
    upload(log.store, record)
    assert log.commit([record]) == [Verdict.LIVE]
    return record


def extents_there(store: ClockedStore) -> set[ExtentName]:
    folder = f"spaces/{SPACE_ID}/extents/"
    return {
        ExtentName.parse(key.split("/")[4]) for key in store.objects if key.startswith(folder) and key.count("/") > 4
    }


def versions_there(store: ClockedStore) -> list[int]:
    folder = log_key(SPACE_ID, 0)[:-20]
    return sorted(int(key[-20:]) for key in store.objects if key.startswith(folder))


def checkpoints_there(store: ClockedStore) -> list[int]:
    keys = sorted(key for key in store.objects if key.startswith(checkpoints_prefix(SPACE_ID)))
    return sorted(10**20 - 1 - int(key.rpartition("/")[2][:20]) for key in keys)


def collect(log: Log, dry_run: bool = False, kind: type[Collector] = Collector, **settings: Any) -> GcReport:
    return kind(log, GcSettings(**settings)).run(dry_run=dry_run)
