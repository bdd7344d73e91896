"""A second reader of the index, written from FORMAT.md (§1, §2, §4, §5) alone, and compared with the package's.

The upper half imports nothing of the package: where the two disagree, either the document or the package is wrong. It
reads plain files of a root that lies in a directory, where an object's key is its path.
"""

from __future__ import annotations

import base64
import json
import random
import re
import secrets
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

# only to make what is read, and to compare
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
from lmcache_s3.testing.small import small_space
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import ExtentName, ExtentRecord, Grid

Entry = tuple[str, int, tuple[int, ...], tuple[int, ...]]  # extent, position, lengths and sums of each shard

ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
NAME = re.compile(r"([0-9a-f]{32})\.([1-9][0-9]{0,4})\.([a-z0-9_-]{1,64})\.(0|[1-9][0-9]{0,18})-[0-9a-f]{32}")
CHECKPOINT = re.compile(r"([0-9]{20})\.([0-9a-f]{32})\.json")
MIB = 2**20
U32, U64 = pa.uint32(), pa.uint64()
ENTRIES = {
    "prefix_hash": pa.binary(16),
    "extent": U32,
    "position": pa.uint16(),
    "lengths": pa.list_(U32),
    "sums": pa.list_(U64),
}
EXTENTS = {
    "ordinal": U32, "name": pa.string(), "parent": pa.binary(16), "first_token": U64, "stages": U32, "head_groups": U32,
    "born": U64, "raw_bytes": U64, "created": U64, "last_access": U64, "codec": pa.string(), "place": U32,
}  # fmt: skip


class Stopped(Exception):
    """The reader cannot go on; its state is that of the last version it could read."""


class Extent(NamedTuple):
    name: str
    parent: bytes
    first_token: int
    stages: int
    head_groups: int
    hashes: tuple[bytes, ...]
    lengths: tuple[tuple[int, ...], ...]  # [chunk][shard]
    sums: tuple[tuple[int, ...], ...]
    raw_bytes: int
    created: int = 0
    place: int = 0
    last_access: int = 0


class Version(NamedTuple):
    add: tuple[Extent, ...]
    remove: tuple[str, ...]
    floor: int
    access: tuple[str, ...]
    lead: tuple[str | None, ...]  # empty: changes nothing


def must(ok: object, what: str) -> None:
    if not ok:
        raise Stopped(what)


def integer(value: object, below: int = 2**63) -> int:
    must(type(value) is int and 0 <= value < below, f"{value!r} is no integer below {below}")
    assert isinstance(value, int)
    return value


def matched(pattern: re.Pattern[str], value: object) -> re.Match[str]:
    found = pattern.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise Stopped(f"{value!r} is not of the form {pattern.pattern}")
    return found


def named(name: object) -> re.Match[str]:
    """An extent's name (§6.1), wherever it stands: last hash, number of chunks, codec, born."""
    found = matched(NAME, name)
    must(int(found[2]) <= 65536 and int(found[4]) < 2**63, f"{found[0]}: beyond the bounds")
    return found


def born(name: str) -> int:
    return int(named(name)[4])


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    must(len(dict(pairs)) == len(pairs), "a key twice")
    return dict(pairs)


def no_nan(word: str) -> None:
    raise Stopped(f"{word} in JSON")


def document(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw.decode(), object_pairs_hook=no_key_twice, parse_constant=no_nan)
    except (ValueError, RecursionError) as error:
        raise Stopped(f"no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Stopped("not a JSON object")
    # before anything else: a higher format may change whatever follows
    form = integer(found.get("format"))
    must(form == 1, f"format {form}, and this reader knows only 1")
    matched(ULID, found.get("writer"))
    return found


def from_base64(value: object, size: int) -> bytes:
    must(isinstance(value, str), "base64 is a string")
    assert isinstance(value, str)
    try:
        raw = base64.b64decode(value, validate=True)
    except ValueError as error:
        raise Stopped(f"no base64: {error}") from error
    must(base64.b64encode(raw).decode() == value and len(raw) == size, "base64: not canonical, or of another length")
    return raw


def whole(extent: Extent) -> Extent:
    """What §4.2 and §6.1 ask of an extent, wherever it was read."""
    name, shards = named(extent.name), extent.stages * extent.head_groups
    must(int(name[2]) == len(extent.hashes), f"{extent.name}: number of chunks")
    must(0 < shards * len(extent.hashes) <= 262144, f"{extent.name}: number of cells")
    must(extent.hashes[-1].hex() == name[1], f"{extent.name}: the last hash is not the name's")
    must(len(set(extent.hashes)) == len(extent.hashes), f"{extent.name}: a hash twice")
    must(all(len(cells) == shards for cells in (*extent.lengths, *extent.sums)), f"{extent.name}: cells of a chunk")
    must(extent.raw_bytes > 0, f"{extent.name}: raw_bytes")
    return extent


def added(item: Any) -> Extent:
    must(isinstance(item, dict), "an extent is an object")
    chunks, stages, groups = int(named(item.get("name"))[2]), item.get("stages"), item.get("head_groups")
    shards = integer(stages) * integer(groups)
    must(0 < shards * chunks <= 262144, f"{item['name']}: number of cells")  # before memory is taken for them
    must(isinstance(item.get("parent"), str) and re.fullmatch("[0-9a-f]{32}", item["parent"]), "parent")
    hashes = from_base64(item.get("hashes"), 16 * chunks)
    lengths = struct.unpack(f"<{shards * chunks}I", from_base64(item.get("lengths"), 4 * shards * chunks))
    sums = struct.unpack(f"<{shards * chunks}Q", from_base64(item.get("sums"), 8 * shards * chunks))
    return whole(
        Extent(
            item["name"], bytes.fromhex(item["parent"]), integer(item.get("first_token")), stages, groups,
            tuple(hashes[16 * i : 16 * i + 16] for i in range(chunks)),
            tuple(lengths[i::chunks] for i in range(chunks)), tuple(sums[i::chunks] for i in range(chunks)),
            integer(item.get("raw_bytes")),
        )
    )  # fmt: skip


def parsed(raw: bytes, version: int | None) -> Version:
    """A version's bytes (§4.2); `version` None: an inbox object, of which floor and lead do not count (§4.6)."""
    found = document(raw)
    lists = {key: found.get(key, []) for key in ("add", "remove", "access")}
    must(all(isinstance(value, list) for value in lists.values()), "add, remove and access are lists")
    floor = integer(found.get("floor", 0), below=2**63 if version is None else version)
    lead: tuple[str | None, ...] = ()
    if "lead" in found:
        lead = (None if found["lead"] is None else matched(ULID, found["lead"])[0],)
    add = tuple(added(item) for item in lists["add"])
    remove, access = (tuple(named(item)[0] for item in lists[key]) for key in ("remove", "access"))
    return Version(add, remove, floor, access, lead)


@dataclass
class Reader:
    """A replica (§4.4). Nobody deletes while it reads a checkpoint, so what is missing there is missing for good."""

    directory: Path
    space_id: str
    version: int = 0
    floor: int = 0
    lead: str | None = None
    live: dict[str, Extent] = field(default_factory=dict)  # in the order of the first add

    def path(self, key: str) -> Path:
        return self.directory / "spaces" / self.space_id / key

    def get(self, key: str, limit: int) -> bytes | None:
        path = self.path(key)
        if not path.is_file():
            return None
        must(path.stat().st_size <= limit, f"{key} is larger than {limit} bytes")
        return path.read_bytes()

    def names(self, key: str) -> list[str]:
        return sorted(path.name for path in self.path(key).glob("*") if path.is_file())

    # §4.4
    def open(self) -> Reader:
        if (newest := self.newest()) is not None:
            self.load(*newest)
        return self.sync()

    def sync(self) -> Reader:
        while True:
            batch: list[Version] = []
            problem: Stopped | None = None
            first = self.version + 1
            while problem is None:
                version = first + len(batch)
                try:
                    if (raw := self.get(f"manifest/log/{version:020}", 16 * MIB)) is None:
                        break
                    batch.append(parsed(raw, version))
                except Stopped as error:
                    problem = Stopped(f"version {version}: {error}")
            fence = (first // 4096 + 2) * 4096
            # a checkpoint also leads past a version that cannot be read
            fenced = problem is not None or self.path(f"manifest/log/{fence:020}").is_file()
            newest = self.newest() if fenced else None
            if newest is not None and newest[0] > self.version:
                self.load(*newest)
                continue
            for found in batch:
                self.apply(found)
            if problem is not None:
                raise problem
            return self

    def apply(self, found: Version) -> None:
        """§4.3, in its order."""
        self.version += 1
        for place, extent in enumerate(found.add):
            if born(extent.name) >= self.floor and extent.name not in self.live:
                self.live[extent.name] = extent._replace(created=self.version, last_access=self.version, place=place)
        for name in found.remove:
            self.live.pop(name, None)
        for name in found.access:
            if name in self.live:
                self.live[name] = self.live[name]._replace(last_access=self.version)
        self.floor = max(self.floor, found.floor)
        for lead in found.lead:
            self.lead = lead

    # §5
    def newest(self) -> tuple[int, str] | None:
        """The newest checkpoint's version and nonce. Names of no checkpoint are nobody's, and passed over."""
        for match in map(CHECKPOINT.fullmatch, self.names("manifest/checkpoints")):
            if match is not None and (version := 10**20 - 1 - int(match[1])) < 2**63:
                return version, match[2]
        return None

    def load(self, version: int, nonce: str) -> None:
        raw = self.get(f"manifest/checkpoints/{10**20 - 1 - version:020}.{nonce}.json", 16 * MIB)
        must(raw is not None, "the checkpoint is gone")
        index = document(raw or b"")
        must(index.get("version") == version and index.get("nonce") == nonce, "a checkpoint under another's name")
        floor, lead, segments = integer(index.get("floor"), below=version + 1), index.get("lead"), index.get("segments")
        must(lead is None or matched(ULID, lead), "lead")
        must(isinstance(segments, list) and len(segments) % 2 == 0, "segments")
        shards = len(segments or ()) // 2
        must(0 < shards <= 4096 and shards & (shards - 1) == 0, "the number of shards is no power of two")
        cells: dict[int, dict[int, dict[str, Any]]] = {}
        extents: dict[int, dict[str, Any]] = {}
        for number, item in enumerate(segments or ()):
            shard, kind = number // 2, ("entries", "extents")[number % 2]
            must(isinstance(item, dict) and item.get("file") == f"{shard:05}.{kind}.parquet", f"segment {number}")
            last = (-1, -1)
            for row in self.segment(f"segments/{version:020}.{nonce}/{item['file']}", item, kind):
                digest = row["prefix_hash"] if kind == "entries" else bytes.fromhex(named(row["name"])[1])
                must(int.from_bytes(digest, "big") * shards >> 128 == shard, f"{item['file']}: a row of another shard")
                at = (row["extent"], row["position"]) if kind == "entries" else (row["ordinal"], 0)
                must(at > last, f"{item['file']}: the rows' order")
                last = at
                if kind == "entries":
                    cells.setdefault(at[0], {})[at[1]] = row
                else:
                    extents[at[0]] = row
        must(sorted(extents) == list(range(len(extents))) and cells.keys() == extents.keys(), "entries without extents")
        live: dict[str, Extent] = {}
        last = (1, -1)  # the first version that can create
        for ordinal, row in sorted(extents.items()):
            mine, name = cells[ordinal], row["name"]
            must(sorted(mine) == list(range(len(mine))), f"{name}: entries 0 … n-1")
            must(row["codec"] == named(name)[3] and row["born"] == born(name), f"{name}: not what it says")
            at = (integer(row["created"], version + 1), row["place"])
            must(at > last and at[0] <= integer(row["last_access"], version + 1), f"{name}: order")
            last = at
            columns = {key: tuple(mine[i][key] for i in range(len(mine))) for key in ("prefix_hash", "lengths", "sums")}
            live[name] = whole(
                Extent(
                    name, row["parent"], integer(row["first_token"]), row["stages"], row["head_groups"],
                    columns["prefix_hash"], tuple(map(tuple, columns["lengths"])), tuple(map(tuple, columns["sums"])),
                    integer(row["raw_bytes"]), at[0], at[1], row["last_access"],
                )
            )  # fmt: skip
        must(len(live) == len(extents), "an extent twice")
        self.version, self.floor, self.lead, self.live = version, floor, lead, live

    def segment(self, key: str, item: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        raw = self.get(key, integer(item.get("bytes")))
        must(raw is not None, f"{key} is missing")
        raw = raw or b""
        must(len(raw) == item["bytes"] and xxhash.xxh3_128_hexdigest(raw) == item.get("xxh3"), f"{key}: its digest")
        must(kind == "extents" or 16 * integer(item.get("rows")) <= len(raw), f"{key}: more rows than fit")
        try:
            file = pq.ParquetFile(pa.BufferReader(raw))
            must(file.metadata.num_rows == integer(item.get("rows")), f"{key}: its number of rows")
            columns = {found.name: found for found in file.schema_arrow}
            for name, kind_of in (ENTRIES if kind == "entries" else EXTENTS).items():
                found = columns.get(name)
                if found is None or found.nullable:
                    raise Stopped(f"{key}: column {name}")
                lists = pa.types.is_list(kind_of) and pa.types.is_list(found.type)
                # what a list calls its elements is nobody's business
                same = found.type.value_type == kind_of.value_type if lists else found.type == kind_of
                must(same, f"{key}: the type of {name}")
            rows: list[dict[str, Any]] = file.read().to_pylist()
        except pa.ArrowException as error:
            raise Stopped(f"{key}: {error}") from error
        return rows

    # what was asked for
    def table(self) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for name, extent in self.live.items():
            for i, digest in enumerate(extent.hashes):
                found.setdefault(digest.hex(), (name, i, extent.lengths[i], extent.sums[i]))
        return found

    def inbox(self) -> dict[str, bool | None]:
        """Whether each object of the inbox is judged (§4.3, §4.6); None: it is no document."""
        found: dict[str, bool | None] = {}
        held = {digest for extent in self.live.values() for digest in extent.hashes}
        for name in self.names("manifest/inbox"):
            try:
                matched(ULID, name)
                given = parsed(self.get(f"manifest/inbox/{name}", 16 * MIB) or b"", None)
            except Stopped:
                found[name] = None
                continue
            # what is in both is removed: it never becomes live
            kept = [extent for extent in given.add if extent.name not in given.remove]
            found[name] = not any(item in self.live for item in given.remove) and all(
                e.name in self.live or held.issuperset(e.hashes) or born(e.name) < self.floor for e in kept
            )
        return found


def read(directory: Path, space_id: str) -> dict[str, Entry]:
    return Reader(directory, space_id).open().table()


# ---- the same histories, read by both --------------------------------------------------------------------------------

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
