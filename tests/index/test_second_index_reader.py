"""The same histories and damage, read by the package and by the second reader: both must say the same."""

from __future__ import annotations

import json
import random
import secrets
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from lmcache_s3.errors import Unusable
from lmcache_s3.index.change import Change
from lmcache_s3.index.delta import Delta
from lmcache_s3.index.log import Log
from lmcache_s3.index.manifest import (
    EMPTY,
    NOBODY,
    State,
    apply,
    checkpoint_key,
    checkpoints_prefix,
    encode_delta,
    inbox_key,
    log_key,
    segments_prefix,
)
from lmcache_s3.index.segments import encode_checkpoint
from lmcache_s3.testing.second_index_reader import Extent, Reader, Stopped, read
from lmcache_s3.testing.small import small_space
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import ExtentName, ExtentRecord, Grid

WRITER = "01JDXB4Z5T8V6Q2W3E4R5T6Y7H"
OTHER = "01JDXB4Z5T8V6Q2W3E4R5T6Y7J"
SPACE_ID = small_space().id


class Past:
    """A history as its writers leave it in a directory: the package encodes, plain files take it in."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.rng, self.state = root, random.Random(seed), EMPTY
        self.pool = [self.rng.randbytes(16) for _ in range(24)]  # few chunks, so that extents overlap
        self.made: list[ExtentRecord] = []

    def put(self, key: str, data: bytes) -> Path:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def log(self) -> Log:
        nonce = lambda: secrets.token_hex(16)  # noqa: E731
        log = Log(open_store(f"file://{self.root}"), SPACE_ID, WRITER, lambda _: None, random.Random(1), nonce)
        log.open()
        return log

    def reader(self) -> Reader:
        return Reader(self.root, SPACE_ID).open()

    def record(self, born: int | None = None) -> ExtentRecord:
        rng, n = self.rng, self.rng.randint(1, 6)
        grid = Grid(rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 4]))
        hashes = rng.sample(self.pool, n)
        born = max(0, self.state.version - rng.randint(0, 9)) if born is None else born
        name = ExtentName(hashes[-1], n, rng.choice(["fast", "torch", "x-1_y"]), born, rng.randbytes(16).hex())
        cells = n * grid.shards
        made = ExtentRecord(
            name, grid, rng.randbytes(16), rng.choice([0, 64, 2**40]), b"".join(hashes),
            rng.randbytes(4 * cells), rng.randbytes(8 * cells), rng.randint(1, 2**50),
        )  # fmt: skip
        self.made.append(made)
        return made

    def some(self, most: int) -> list[ExtentRecord]:
        """Of all that were ever made: live ones, removed ones, void ones, never added ones."""
        return self.rng.sample(self.made, min(len(self.made), self.rng.randint(0, most)))

    def delta(self) -> Delta:
        rng, version = self.rng, self.state.version + 1
        add = [self.record() for _ in range(rng.randint(0, 3))] + self.some(1)
        add += add[: rng.randint(0, 1)]  # one twice in a version
        remove = [record.name for record in self.some(2)] if rng.random() < 0.5 else []
        floor = rng.randint(0, version - 1) if rng.random() < 0.15 else 0
        lead = rng.choice([None, None, None, NOBODY, WRITER, OTHER])
        return Delta(WRITER, tuple(add), tuple(remove), floor, lead, tuple(record.name for record in self.some(3)))

    def commit(self, delta: Delta) -> None:
        self.put(log_key(SPACE_ID, self.state.version + 1), encode_delta(delta))
        self.state = apply(self.state, delta)

    def checkpoint(self, entries_per_shard: int = 16, nonce: str | None = None) -> Path:
        nonce = nonce or self.rng.randbytes(16).hex()
        files, index = encode_checkpoint(self.state, nonce, WRITER, entries_per_shard=entries_per_shard)
        for file, data in files.items():
            self.put(segments_prefix(SPACE_ID, self.state.version, nonce) + file, data)
        return self.put(checkpoint_key(SPACE_ID, self.state.version, nonce), index)

    def version_path(self, version: int) -> Path:
        return self.root / log_key(SPACE_ID, version)


def assert_same(reader: Reader, state: State) -> None:
    """Everything that a state says, said by both."""
    assert (reader.version, reader.floor, reader.lead) == (state.version, state.floor, state.lead)
    expected = []
    for live in state.in_order():
        record, n = live.record, live.record.n_chunks
        shards = record.grid.shards
        lengths = struct.unpack(f"<{n * shards}I", record.lengths)
        sums = struct.unpack(f"<{n * shards}Q", record.sums)
        expected.append(
            Extent(
                str(record.name), record.parent, record.first_token, record.grid.stages, record.grid.head_groups,
                tuple(record.hashes[16 * i : 16 * i + 16] for i in range(n)),
                tuple(lengths[i::n] for i in range(n)), tuple(sums[i::n] for i in range(n)),
                record.raw_bytes, live.created, live.place, live.last_access,
            )
        )  # fmt: skip
    assert list(reader.live.values()) == expected
    chunks = {digest.hex(): (str(refs[0].extent.name), refs[0].position) for digest, refs in state.chunks.items()}
    table = read(reader.directory, reader.space_id)
    assert {digest: entry[:2] for digest, entry in table.items()} == chunks
    for name, position, lengths, sums in table.values():
        assert (lengths, sums) == (reader.live[name].lengths[position], reader.live[name].sums[position])


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_are_read_alike(tmp_path: Path, seed: int) -> None:
    past = Past(tmp_path, seed)
    replica = Reader(tmp_path, SPACE_ID)
    for version in range(1, 41):
        past.commit(past.delta())
        if seed % 3 and version in (12, 25, 40 - seed % 2):
            past.checkpoint(past.rng.choice([8, 32, 2**20]))
        if version % 8 == 0:
            assert_same(replica.sync(), past.state)
    assert past.state.n_extents
    assert_same(past.reader(), past.log().state)

    expected: dict[str, bool | None] = {}
    for i in range(30):
        ulid = f"{WRITER[:-2]}{i:02}"
        delta = past.rng.choice([past.delta(), Delta(WRITER, add=tuple(past.some(2)))])
        data = past.rng.choice([encode_delta(delta)] * 9 + [b"junk"])
        past.put(inbox_key(SPACE_ID, ulid), data)
        expected[ulid] = None if data == b"junk" else Change.of(delta).is_judged(past.state)
    past.put(inbox_key(SPACE_ID, "no-ulid"), encode_delta(Delta(WRITER)))
    assert past.reader().inbox() == expected | {"no-ulid": None}
    assert {True, False} <= set(expected.values())


def test_what_is_judged_in_the_inbox(tmp_path: Path) -> None:
    past = Past(tmp_path, 4)
    held, waiting = past.record(born=3), past.record(born=3)
    late = replace(held, name=replace(held.name, nonce="0" * 32))
    void = replace(waiting, name=replace(waiting.name, born=2))
    for delta in (Delta(WRITER), Delta(WRITER, floor=1), Delta(WRITER), Delta(WRITER, (held,), floor=3)):
        past.commit(delta)
    cases = [
        (Delta(WRITER, (held,)), True),  # live
        (Delta(WRITER, (late,)), True),  # covered
        (Delta(WRITER, (void,)), True),
        (Delta(WRITER, (held, late, void, waiting)), False),
        (Delta(WRITER, (), (held.name,)), False),
        (Delta(WRITER, (), (waiting.name,)), True),
        (Delta(WRITER, (waiting,), (waiting.name,)), True),  # added and removed
        (Delta(WRITER, access=(held.name,)), True),
        (Delta(WRITER, floor=2**40, lead=OTHER), True),  # neither counts
    ]
    for i, (delta, expected) in enumerate(cases):
        assert Change.of(delta).is_judged(past.state) == expected, i
        past.put(inbox_key(SPACE_ID, f"{WRITER[:-2]}{i:02}"), encode_delta(delta))
    assert list(past.reader().inbox().values()) == [expected for _, expected in cases]


def test_a_past_that_was_deleted_is_never_gone_on_from(tmp_path: Path) -> None:
    past = Past(tmp_path, 5)
    for _ in range(20):
        past.commit(past.delta())
    stale_reader, stale_log = past.reader(), past.log()
    for _ in range(20):
        past.commit(past.delta())
    dull = encode_delta(Delta(WRITER))
    # Versions that change nothing, to just past the fence. Those before the first milestone are deleted already; those
    # after it would still be there, but nobody reads them: the checkpoint is newer.
    for version in (4096, 8192, 8193, 8194):
        past.put(log_key(SPACE_ID, version), dull)
    past.state = replace(past.state, version=8194)
    past.checkpoint()
    for _ in range(20):
        past.commit(past.delta())
    for version in range(1, 41):
        past.version_path(version).unlink()
    assert_same(past.reader(), past.log().state)

    # a create of long ago takes effect only now
    past.put(log_key(SPACE_ID, 21), encode_delta(Delta(OTHER, add=(past.record(born=20),))))
    assert_same(stale_reader.sync(), past.state)
    assert stale_log.sync() == past.state


def test_the_newest_checkpoint_sorts_first_and_junk_is_passed_over(tmp_path: Path) -> None:
    past = Past(tmp_path, 2)
    folder = checkpoints_prefix(SPACE_ID)
    for version in range(1, 13):
        past.commit(past.delta())
        if version in (3, 9):
            past.checkpoint()
    # of two of one version, the first; the other may be gone in part
    past.checkpoint(nonce="0" * 32)
    past.checkpoint(nonce="1" * 32).write_bytes(b"damaged")
    for junk in ("!", "0" * 20, "0" * 20 + ".json", f"{0:020}.{'0' * 32}.json", f"{7:020}.{'G' * 32}.json", "README"):
        past.put(folder + junk, b"{}")
    for version in range(1, 13):
        past.version_path(version).unlink()
    assert Reader(tmp_path, SPACE_ID).newest() == (12, "0" * 32)
    assert_same(past.reader(), past.log().state)


def assert_both_stop(past: Past, why: str) -> None:
    with pytest.raises(Stopped, match=why):
        past.reader()
    with pytest.raises(Unusable):
        past.log()


def test_a_damaged_checkpoint_stops_the_reader(tmp_path: Path) -> None:
    past = Past(tmp_path, 3)
    for _ in range(20):
        past.commit(past.delta())
    index = past.checkpoint()
    segments = sorted(tmp_path.glob("spaces/*/segments/*/*.parquet"))
    assert len(segments) >= 4
    for path in (segments[0], segments[-1]):
        good = path.read_bytes()
        at = len(good) // 2
        for bad in (good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :], good[:-1], segments[1].read_bytes()):
            path.write_bytes(bad)
            assert_both_stop(past, "digest|larger")
        path.unlink()
        assert_both_stop(past, "missing")
        path.write_bytes(good)
    assert_same(past.reader(), past.log().state)

    good, document = index.read_bytes(), json.loads(index.read_bytes())
    lines = document["segments"]
    for change, why in (
        ({"format": 2}, "format 2"),
        ({"version": 19}, "another's name"),
        ({"nonce": "0" * 32}, "another's name"),
        ({"floor": 21}, "no integer below 21"),
        ({"segments": lines[:-1]}, "segments"),
        ({"segments": lines[:2] * 3}, "no power of two"),
        ({"segments": lines[::-1]}, "segment 0"),
        ({"segments": [lines[0] | {"rows": lines[0]["rows"] + 1}, *lines[1:]]}, "number of rows"),
    ):
        index.write_bytes(json.dumps(document | change).encode())
        assert_both_stop(past, why)
    index.write_bytes(json.dumps(document | {"later": [1.5]}).encode())
    assert_same(past.reader(), past.log().state)


VECTOR = next(
    line for line in (Path(__file__).parents[2] / "FORMAT.md").read_text().splitlines() if '"writer":"01' in line
)


def test_the_vector_of_the_document(tmp_path: Path) -> None:
    past = Past(tmp_path, 0)
    for _ in range(6):
        past.commit(Delta(WRITER))
    past.put(log_key(SPACE_ID, 7), VECTOR.encode())
    reader = past.reader()
    assert_same(reader, past.log().state)
    name = "101112131415161718191a1b1c1d1e1f.2.fast.6-0123456789abcdef0123456789abcdef"
    assert reader.table() == {
        "000102030405060708090a0b0c0d0e0f": (name, 0, (100, 200), (1, 3)),
        "101112131415161718191a1b1c1d1e1f": (name, 1, (101, 201), (2, 2**64 - 1)),
    }
    assert reader.floor == 3


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Past:
    """Six versions, a place for the seventh, and an eighth that nobody may come to."""
    past = Past(tmp_path_factory.mktemp("six"), 1)
    for _ in range(6):
        past.commit(past.delta())
    past.put(log_key(SPACE_ID, 8), encode_delta(Delta(WRITER)))
    return past


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"format":1', '"format":2'),
        ('"format":1', '"format":1.0'),
        ('"format":1', '"format":true'),
        ('"format":1', '"format":1,"format":1'),
        ('"format":1,', ""),
        ('"format":1', '"format":1,"later":NaN'),
        ('"floor":3', '"floor":7'),
        ('"floor":3', '"floor":-1'),
        ('"floor":3', '"floor":null'),
        ('"lead":null', '"lead":""'),
        ('"lead":null', f'"lead":"{WRITER.lower()}"'),
        (WRITER, WRITER[1:]),
        ('"access":[]', '"access":null'),
        ('"access":[]', '"access":["foreign"]'),
        ("eee.1.torch.0-", "eee.0.torch.0-"),
        ("eee.1.torch.0-", "eee.65537.torch.0-"),
        ("eee.1.torch.0-", "eee.1.torch.9223372036854775808-"),
        ("eee.1.torch.0-", "eee.01.torch.0-"),
        ("eee.1.torch.0-", "eee.1.torch.00-"),
        ("eee.1.torch.0-", "eee.1.Torch.0-"),
        (".2.fast", ".1.fast"),
        ('"stages":1', '"stages":2'),
        ('"stages":1', '"stages":0'),
        ('"head_groups":2', '"head_groups":262144'),
        ('"first_token":512', '"first_token":9223372036854775808'),
        ('"raw_bytes":4096', '"raw_bytes":0'),
        ("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh9="),
        ("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", "EBESExQVFhcYGRobHB0eHxAREhMUFRYXGBkaGxwdHh8="),
        ("ZAAAAGUAAADIAAAAyQAAAA==", "ZAAAAGUAAADIAAAAyQAAAA"),
        ("101112131415161718191a1b1c1d1e1f.2", "101112131415161718191a1b1c1d1e1e.2"),
        ('"parent":"f', '"parent":"F'),
        ("}", ""),
    ],
)
def test_a_version_that_cannot_be_read_stops_the_reader_at_the_one_before(six: Past, old: str, new: str) -> None:
    assert old in VECTOR
    six.version_path(7).write_text(VECTOR.replace(old, new, 1))
    reader = Reader(six.root, SPACE_ID)
    with pytest.raises(Stopped, match="version 7: format 2" if '"format":2' in new else "version 7: "):
        reader.open()
    assert (reader.version, list(reader.live)) == (6, [str(live.record.name) for live in six.state.in_order()])
    assert_both_stop(six, "version 7: ")


def test_a_checkpoint_leads_past_a_version_that_cannot_be_read(tmp_path: Path) -> None:
    past = Past(tmp_path, 1)
    past.commit(past.delta())
    past.put(log_key(SPACE_ID, 2), b"damaged")
    past.put(log_key(SPACE_ID, 3), encode_delta(Delta(WRITER)))
    reader = Reader(tmp_path, SPACE_ID)
    with pytest.raises(Stopped, match="version 2"):
        reader.open()
    past.state = replace(past.state, version=2)
    past.checkpoint()
    past.state = replace(past.state, version=3)
    assert_same(reader.sync(), past.log().state)
