"""What the processes of the world do: store extents directly or as an engine does, read, checkpoint, collect, sweep.

Policy is replaced by whim. Everybody tries again for as long as the store does not answer.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from functools import lru_cache

from lmcache_s3.codecs.fast import FastCodec
from lmcache_s3.errors import Conflict, LMCacheS3Error, Unavailable
from lmcache_s3.extent import array_metadata
from lmcache_s3.index.change import Change
from lmcache_s3.index.follower import Follower, Pacing
from lmcache_s3.index.gc import GcReport, GcSettings
from lmcache_s3.index.history import list_versions
from lmcache_s3.index.inbox import Leader
from lmcache_s3.index.manifest import Verdict
from lmcache_s3.testing.manifest_process import SPACE, SPACE_ID, ULID, Process
from lmcache_s3.types import ExtentName, ExtentRecord, Grid, extent_prefix, shard_key

_LONGEST = 3
"""Chunks in an extent."""


# ---- extents ---------------------------------------------------------------------------------------------------------


def object_keys(name: ExtentName) -> tuple[str, str]:
    return shard_key(SPACE_ID, name, Grid(), 0), f"{extent_prefix(SPACE_ID, name)}/zarr.json"


@lru_cache(256)
def _prefix_hash(prompt: int, chunk: int) -> bytes:
    return hashlib.sha256(b"%d %d" % (prompt, chunk)).digest()[:16]


def make_record(me: Process) -> ExtentRecord:
    """An extent of some prompt's beginning, named now."""
    prompt, chunks = me.rng.randrange(me.world.prompts), me.rng.randint(1, _LONGEST)
    hashes = [_prefix_hash(prompt, chunk) for chunk in range(chunks)]
    nonce = f"{me.world.number():032x}" if me.rules.fresh_names else hashes[-1].hex()
    name = ExtentName(hashes[-1], chunks, "fast", me.log.state.version, nonce)
    cell_bytes = SPACE.geometry.chunk_bytes + 4
    return ExtentRecord(
        name=name,
        grid=Grid(),
        parent=b"\0" * 16,
        first_token=0,
        hashes=b"".join(hashes),
        lengths=struct.pack(f"<{chunks}I", *[cell_bytes] * chunks),
        sums=struct.pack(f"<{chunks}Q", *range(chunks)),
        raw_bytes=SPACE.geometry.chunk_bytes * chunks,
    )


def upload(me: Process, record: ExtentRecord) -> None:
    """Shard, then `zarr.json`. Two uploads never have the same bytes: engines round differently."""
    shard, document = object_keys(record.name)
    data = b"%8d" % me.world.number()
    data += bytes(record.encoded_bytes + 16 * record.n_chunks + 4 - len(data))
    metadata = array_metadata(
        record, SPACE.geometry, FastCodec(), space_id=SPACE_ID, fidelity="exact", writer=me.log.writer
    )
    retry(lambda: me.log.store.put(shard, data))
    retry(lambda: me.log.store.put(document, metadata))


def retry(step: Callable[[], object]) -> None:
    """Until the store answers."""
    while True:
        try:
            step()
        except (Unavailable, Conflict):
            continue
        return


# ---- processes -------------------------------------------------------------------------------------------------------


class WhimLeader(Leader):
    """Leads and steps down at whim, by its log's generator."""

    def should_claim(self) -> bool:
        return self.log.state.lead is None and self.log.rng.random() < 0.3

    def _is_quiet(self, arrived: int) -> bool:
        return self.log.rng.random() < 0.1


def writer(extents: int) -> Callable[[Process], None]:
    """Stores `extents` extents: names one, uploads it, commits it directly."""

    def body(me: Process) -> None:
        for _ in range(extents):
            record = make_record(me)
            if me.rules.uploads_first:
                upload(me, record)

            def commit(record: ExtentRecord = record) -> None:
                verdict = me.log.commit([record])[0]
                me.world.acknowledge(record, verdict)
                _answered(me, record, verdict)

            retry(commit)
            if not me.rules.uploads_first:
                upload(me, record)
            retry(me.log.checkpoint_if_due)

    return body


def _answered(me: Process, record: ExtentRecord, verdict: Verdict) -> None:
    if me.rules.sweeps_covered and verdict is Verdict.COVERED:
        for key in object_keys(record.name):
            retry(lambda key=key: me.log.store.delete(key))  # type: ignore[misc]


def follower(extents: int) -> Callable[[Process], None]:
    """Stores `extents` extents the way that is cheapest, as an engine does: directly, by hand-over, or as the leader.
    Takes back a damaged one and records accesses now and then. Ends by stepping down, or dies."""

    def body(me: Process) -> None:
        pacing = Pacing(poll_s=2.0, hand_over_s=0.5, merge_s=1.0, access_s=5.0)
        ulid = lambda: ULID.format(100_000 + me.world.number())  # noqa: E731
        whole = Follower(me.log, pacing, rng=me.rng, ulid=ulid)
        whole.inbox = me.rules.inbox(me.log)
        whole.leader = WhimLeader(me.log, whole.inbox, me.log.clock)
        whole.hand_overs = me.rules.hand_overs(me.log, clock=me.log.clock, rng=me.rng, ulid=ulid)
        covered: list[ExtentRecord] = []
        retry(me.log.open)
        left = extents
        while left or whole.pending:
            if left and (whole.pending < 2 or me.rng.random() < 0.1):
                left -= 1
                record = make_record(me)
                if me.rules.uploads_first:
                    upload(me, record)
                whole.submit(_change(me, record), _done(me, record, covered))
            if me.rng.random() < 0.3:
                whole.touch(name for name in me.log.state.extents if me.rng.random() < 0.3)
            me.now_s = max(me.now_s, whole.due_s()) + me.rng.choice([0.0, 0.0, 0.0, 20.0])
            try:
                whole.step()
            except LMCacheS3Error:
                continue
            while covered:
                _answered(me, covered.pop(), Verdict.COVERED)
        if me.rng.random() < 0.5:
            retry(whole.drain)

    return body


def _change(me: Process, record: ExtentRecord) -> Change:
    names = [name for name in me.log.state.extents if me.rng.random() < 0.05]
    return Change(add=(record,), remove=tuple(names))


def _done(me: Process, record: ExtentRecord, covered: list[ExtentRecord]) -> Callable[[list[Verdict]], None]:
    def done(verdicts: list[Verdict]) -> None:
        me.world.acknowledge(record, verdicts[0])
        if verdicts[0] is Verdict.COVERED:
            covered.append(record)

    return done


def reader(me: Process) -> None:
    """Opens and follows the log for ever."""
    retry(me.log.open)
    while True:
        retry(me.log.sync)


def checkpointer(me: Process) -> None:
    """Opens, and writes a checkpoint of every version it sees."""
    retry(me.log.open)
    done = 0
    while True:
        retry(me.log.sync)
        if me.log.state.version > done:
            done = me.log.state.version
            retry(me.log.checkpoint)


def collector(me: Process) -> None:
    """Round after round with another policy each: what to remove, how old is old."""
    retry(me.log.open)
    while True:
        settings = GcSettings(
            grace_s=me.rng.choice([0.0, 10.0, 100.0]),
            history_s=me.rng.choice([0.0, 0.0, 50.0]),
            ttl_s=me.rng.choice([None, 0.0, 30.0]),
            max_bytes=me.rng.choice([None, None, 0, 60]),
            max_attempts=3,
        )
        try:
            me.rules.collector(me.log, settings).run()
        except (Unavailable, Conflict):
            continue


def sweeper(me: Process) -> None:
    """A collector that keeps no history and only sweeps the manifest: versions go as early as they may."""
    retry(me.log.open)
    whole = me.rules.collector(me.log, GcSettings(history_s=0.0))
    while True:
        retry(me.log.sync)
        try:
            versions = list_versions(me.log.store, SPACE_ID, upto=me.log.state.version)
            whole._sweep_manifest(versions, GcReport(dry_run=False, now_s=math.inf))
        except Unavailable:
            continue
