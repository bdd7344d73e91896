"""A second reader of the index, written from FORMAT.md (§1, §2, §4, §5) alone: `read(directory, space_id)`.

Imports nothing of the package: where the two disagree, either the document or the package is wrong. It reads plain
files of a root that lies in a directory, where an object's key is its path. Raises `Stopped`, with its state that of
the last version it could read.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

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
