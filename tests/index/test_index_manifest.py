"""Pure properties of versions, states and checkpoints: `delta`, `manifest`, `segments`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_s3.errors import Unusable
from lmcache_s3.index import checkpoint_loading, segments
from lmcache_s3.index.manifest import (
    EMPTY,
    NOBODY,
    Delta,
    State,
    Verdict,
    apply,
    checkpoint_key,
    decode_delta,
    encode_delta,
    fence,
    judged,
    log_key,
    parse_checkpoint_key,
)
from lmcache_s3.types import ExtentName, ExtentRecord, Grid

ULID = "01JDXB4Z5T8V6Q2W3E4R5T6Y7H"
SPACE = "ab" * 32
HASHES = [bytes([17 * i]) * 16 for i in range(8)]
"""Few, so that extents overlap."""


@st.composite
def records(draw: st.DrawFn, nonces: int = 6, born: int = 6) -> ExtentRecord:
    hashes = draw(st.lists(st.sampled_from(HASHES), min_size=1, max_size=4, unique=True))
    grid = draw(st.sampled_from([Grid(1, 1), Grid(2, 1), Grid(1, 4), Grid(2, 2)]))
    cells = len(hashes) * grid.shards
    nonce = f"{draw(st.integers(0, nonces)):032x}"
    name = ExtentName(
        hashes[-1], len(hashes), draw(st.sampled_from(["fast", "cachegen"])), draw(st.integers(0, born)), nonce
    )
    return ExtentRecord(
        name=name,
        grid=grid,
        parent=draw(st.sampled_from(HASHES)),
        first_token=draw(st.integers(0, 2**40)),
        hashes=b"".join(hashes),
        lengths=draw(st.binary(min_size=4 * cells, max_size=4 * cells)),
        sums=draw(st.binary(min_size=8 * cells, max_size=8 * cells)),
        raw_bytes=draw(st.integers(1, 2**63 - 1)),
    )


@st.composite
def histories(draw: st.DrawFn) -> list[Delta]:
    known: list[ExtentName] = []
    history: list[Delta] = []
    for version in range(1, draw(st.integers(0, 8)) + 1):
        add = draw(st.lists(records(), max_size=3))
        known += [record.name for record in add]
        some = st.lists(st.sampled_from(known), max_size=3) if known else st.just([])
        history.append(
            Delta(
                writer=ULID,
                add=tuple(add),
                remove=tuple(draw(some)),
                floor=draw(st.integers(0, version - 1)),
                lead=draw(st.sampled_from([None, NOBODY, ULID])),
                access=tuple(draw(some)),
            )
        )
    return history


def state_of(history: list[Delta]) -> State:
    state = EMPTY
    for delta in history:
        state = apply(state, delta)
    return state


def naive(history: list[Delta]) -> tuple[list[ExtentRecord], int]:
    """The same pure function, written to be read: (live records in order of first add, floor)."""
    live: list[ExtentRecord] = []
    floor = 0
    for delta in history:
        for record in delta.add:
            if record.name not in [r.name for r in live] and record.name.born >= floor:
                live.append(record)
        live = [r for r in live if r.name not in delta.remove]
        floor = max(floor, delta.floor)
    return live, floor


@given(histories())
def test_state_is_the_naive_function_of_the_history(history: list[Delta]) -> None:
    state = state_of(history)
    live, floor = naive(history)
    assert state.version == len(history)
    assert state.floor == floor
    assert [extent.record for extent in state.in_order()] == live
    expected: dict[bytes, list[tuple[ExtentName, int]]] = {}
    for record in live:
        for i, h in enumerate(record.chunk_hashes()):
            expected.setdefault(h, []).append((record.name, i))
    found = {h: [(ref.extent.name, ref.position) for ref in refs] for h, refs in state.chunks.items()}
    assert found == expected
    leads = [delta.lead for delta in history if delta.lead is not None]
    assert state.lead == (leads[-1] or None if leads else None)


@given(histories(), records())
def test_judged(history: list[Delta], record: ExtentRecord) -> None:
    state = state_of(history)
    verdict = judged(state, record)
    after = apply(state, Delta(ULID, add=(record,)))
    if verdict is Verdict.LIVE:
        assert record.name in state.extents
    elif verdict is Verdict.VOID:
        assert record.name not in after.extents
    else:
        assert record.name in after.extents
        gained = set(after.chunks) - set(state.chunks)
        assert (verdict is Verdict.COVERED) == (not gained)
    # Idempotent: adding it twice changes nothing but the version.
    again = apply(after, Delta(ULID, add=(record,)))
    assert (again.extents, again.chunks) == (after.extents, after.chunks)


@given(histories())
def test_an_old_state_never_changes(history: list[Delta]) -> None:
    states = [EMPTY]
    for delta in history:
        states.append(apply(states[-1], delta))
    for n, state in enumerate(states):
        assert state == state_of(history[:n])


@given(histories())
def test_delta_round_trip(history: list[Delta]) -> None:
    for version, delta in enumerate(history, 1):
        assert decode_delta(encode_delta(delta), version) == delta


@given(histories(), st.integers(1, 64))
@settings(deadline=None)
def test_checkpoint_round_trip(history: list[Delta], entries_per_shard: int) -> None:
    state = state_of(history)
    files, index_bytes = segments.encode_checkpoint(state, "0" * 32, ULID, entries_per_shard=entries_per_shard)
    index = segments.decode_index(index_bytes, state.version, "0" * 32)
    assert checkpoint_loading.decode_segments(index, files) == state
    assert len(files) == 2 * (
        1 << max(0, (sum(s.rows for s in index.segments[::2]) - 1) // entries_per_shard).bit_length()
    )


def test_fence_is_the_second_milestone_above() -> None:
    assert [fence(n, 4) for n in (0, 1, 3, 4, 5, 7, 8)] == [8, 8, 8, 12, 12, 12, 16]
    assert fence(1) == 8192
    assert fence(4096) == 12288


def test_keys() -> None:
    assert log_key(SPACE, 7) == f"spaces/{SPACE}/manifest/log/00000000000000000007"
    key = checkpoint_key(SPACE, 7, "a" * 32)
    assert key == f"spaces/{SPACE}/manifest/checkpoints/99999999999999999992.{'a' * 32}.json"
    assert parse_checkpoint_key(key) == (7, "a" * 32)
    assert checkpoint_key(SPACE, 300, "a" * 32) < checkpoint_key(SPACE, 299, "0" * 32)
    for bad in ("x", key + "x", key.replace(".json", ""), key.replace("9999", "999", 1)):
        with pytest.raises(Unusable):
            parse_checkpoint_key(bad)


def test_delta_golden() -> None:
    """The bytes of FORMAT.md's test vector."""
    assert encode_delta(golden_delta()) == GOLDEN
    assert decode_delta(GOLDEN, 8) == golden_delta()


def golden_delta() -> Delta:
    hashes = bytes(range(32))
    record = ExtentRecord(
        name=ExtentName(hashes[16:], 2, "fast", 6, "0123456789abcdef" * 2),
        grid=Grid(1, 2),
        parent=b"\xff" * 16,
        first_token=512,
        hashes=hashes,
        lengths=b"".join(n.to_bytes(4, "little") for n in (100, 101, 200, 201)),
        sums=b"".join(n.to_bytes(8, "little") for n in (1, 2, 3, 2**64 - 1)),
        raw_bytes=4096,
    )
    return Delta(ULID, add=(record,), remove=(ExtentName(b"\xee" * 16, 1, "torch", 0, "f" * 32),), floor=3, lead=NOBODY)


GOLDEN = (
    b'{"format":1,"writer":"01JDXB4Z5T8V6Q2W3E4R5T6Y7H","add":[{"name":"101112131415161718191a1b1c1d1e1f.2.fast.6-012345'
    b'6789abcdef0123456789abcdef","parent":"ffffffffffffffffffffffffffffffff","first_token":512,"stages":1,"head_groups'
    b'":2,"hashes":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","lengths":"ZAAAAGUAAADIAAAAyQAAAA==","sums":"AQAAAAAAA'
    b'AACAAAAAAAAAAMAAAAAAAAA//////////8=","raw_bytes":4096}],"remove":["eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee.1.torch.0-fff'
    b'fffffffffffffffffffffffffffff"],"floor":3,"access":[],"lead":null}'
)


def test_unknown_keys_are_ignored_and_absent_lists_are_empty() -> None:
    document = json.loads(GOLDEN) | {"new": {"deep": [1]}}
    document["add"][0]["colour"] = "blue"
    assert decode_delta(json.dumps(document).encode(), 8) == golden_delta()
    assert decode_delta(b'{"format":1,"writer":"%s"}' % ULID.encode(), 1) == Delta(ULID)


def mutate(**changes: Any) -> bytes:
    return json.dumps(json.loads(GOLDEN) | changes).encode()


def mutate_add(**changes: Any) -> bytes:
    document = json.loads(GOLDEN)
    document["add"][0] |= changes
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"\xef\xbb\xbf" + GOLDEN,
        GOLDEN[:-1],
        GOLDEN + b"x",
        GOLDEN.decode().encode("utf-16"),
        GOLDEN.replace(b'"floor":3', b'"floor":3,"floor":4'),
        GOLDEN.replace(b'"floor":3', b'"floor":' + b"9" * 5000),
        GOLDEN.replace(b'"floor":3', b'"floor":NaN'),
        b'{"format":1,"writer":"' + b"x" * (16 * 2**20) + b'"}',
        mutate(format=2),
        mutate(format=0),
        mutate(format=True),
        mutate(format="1"),
        mutate(format=1.0),
        mutate(writer=7),
        mutate(writer="me"),
        mutate(lead=7),
        mutate(lead=""),
        mutate(floor=-1),
        mutate(floor=8),
        mutate(floor=2.0),
        mutate(floor=True),
        mutate(floor=None),
        mutate(add={}),
        mutate(add=[1]),
        mutate(remove=["../../etc/passwd"]),
        mutate(remove=[None]),
        mutate(remove=["e" * 32 + ".70000.fast.0-" + "f" * 32]),
        mutate(access=["e" * 32 + ".1.fast.99999999999999999999-" + "f" * 32]),
        mutate_add(name="x"),
        mutate_add(name=None),
        mutate_add(parent="ff"),
        mutate_add(parent="FF" * 16),
        mutate_add(first_token=-1),
        mutate_add(first_token=2**63),
        mutate_add(stages=0),
        mutate_add(stages=2),
        mutate_add(stages=2**62),
        mutate_add(head_groups=True),
        mutate_add(hashes=""),
        mutate_add(hashes="AAEC AwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="),
        mutate_add(hashes="AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh9="),
        mutate_add(hashes="EBESExQVFhcYGRobHB0eHxAREhMUFRYXGBkaGxwdHh8="),
        mutate_add(lengths="ZAAAAGUAAADIAAAA"),
        mutate_add(lengths=5),
        mutate_add(lengths="é" * 24),
        mutate_add(sums="AQAAAAAAAAA="),
        mutate_add(raw_bytes=0),
        mutate_add(raw_bytes=2**63),
    ],
)
def test_malformed_versions_are_unusable(data: bytes) -> None:
    with pytest.raises(Unusable):
        decode_delta(data, 8)


@given(st.binary(max_size=64))
def test_random_bytes_are_unusable(data: bytes) -> None:
    with pytest.raises(Unusable):
        decode_delta(data, 8)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_one_changed_value_decodes_or_is_unusable(data: st.DataObject) -> None:
    document = json.loads(GOLDEN)
    target = data.draw(st.sampled_from([document, document["add"][0]]))
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON)
    try:
        delta = decode_delta(json.dumps(document).encode(), 8)
    except Unusable:
        return
    assert decode_delta(encode_delta(delta), 8) == delta


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_damaged_checkpoints_are_unusable(data: st.DataObject) -> None:
    """Any flipped bit, cut or swap in a segment, and any lie of the index, is found."""
    record = golden_delta().add[0]
    state = apply(EMPTY, Delta(ULID, add=(record,)))
    files, index_bytes = segments.encode_checkpoint(state, "0" * 32, ULID, entries_per_shard=1)
    index = segments.decode_index(index_bytes, 1, "0" * 32)
    file = data.draw(st.sampled_from(sorted(files)))
    raw = bytearray(files[file])
    how = data.draw(st.sampled_from(["flip", "cut", "grow", "swap"]))
    if how == "flip":
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    elif how == "grow":
        raw += b"\0"
    else:
        other = data.draw(st.sampled_from(sorted(set(files) - {file})))
        if files[other] == files[file]:
            return
        raw = bytearray(files[other])
    with pytest.raises(Unusable):
        checkpoint_loading.decode_segments(index, files | {file: bytes(raw)})


def _other_type(schema: Any) -> Any:
    """The same with a wider type for `extent`."""
    import pyarrow as pa

    i = schema.get_field_index("extent")
    return schema.set(i, pa.field("extent", pa.uint64(), nullable=False))


def test_parquet_that_is_valid_but_lies_is_unusable() -> None:
    """Right digests, wrong rows: entries of no extent, positions out of order, a missing entry."""
    import pyarrow as pa

    from lmcache_s3.index.segments import CheckpointIndex, Segment

    state = apply(EMPTY, Delta(ULID, add=(golden_delta().add[0],)))
    files, _ = segments.encode_checkpoint(state, "0" * 32, ULID)
    good = {
        kind: pa.parquet.read_table(pa.BufferReader(files[f"00000.{kind}.parquet"])) for kind in ("entries", "extents")
    }

    def load(entries: Any, extents: Any) -> State:
        made = {}
        for kind, table in (("entries", entries), ("extents", extents)):
            sink = pa.BufferOutputStream()
            pa.parquet.write_table(table, sink, store_schema=False)
            made[f"00000.{kind}.parquet"] = sink.getvalue().to_pybytes()
        lines = tuple(
            Segment(name, len(data), segments.digest(data), (entries, extents)[i].num_rows)
            for i, (name, data) in enumerate(made.items())
        )
        return checkpoint_loading.decode_segments(CheckpointIndex(1, "0" * 32, 0, None, ULID, lines), made)

    def changed(table: Any, column: str, values: list[Any]) -> Any:
        i = table.schema.get_field_index(column)
        return table.set_column(i, table.schema.field(i), pa.array(values, table.schema.field(i).type))

    entries, extents = good["entries"], good["extents"]
    assert load(entries, extents) == state
    more = extents.append_column("more", pa.array(["x"]))
    assert load(entries.select(entries.column_names[::-1]), more.select(more.column_names[::-1])) == state, "by name"
    nothing = pa.field("sums", pa.list_(pa.uint64()))
    lies = [
        (entries.set_column(4, nothing, pa.array([[1, 3], [2, None]], nothing.type)), extents),
        (entries.set_column(4, nothing, pa.array([[1, 3], None], nothing.type)), extents),
        (changed(entries, "extent", [0, 0]).cast(_other_type(entries.schema)), extents),
        (changed(entries, "extent", [0, 1]), extents),
        (changed(entries, "position", [0, 0]), extents),
        (changed(entries, "position", [0, 9]), extents),
        (changed(entries, "lengths", [[1], [2, 3]]), extents),
        (changed(entries, "sums", [[1, 2], [3]]), extents),
        (changed(entries, "prefix_hash", [b"a" * 16, b"b" * 16]), extents),
        (entries.slice(0, 1), extents),
        (entries, extents.slice(0, 0)),
        (entries, pa.concat_tables([extents, extents])),
        (entries, changed(extents, "ordinal", [1])),
        (entries, changed(extents, "name", ["x"])),
        (entries, changed(extents, "stages", [2])),
        (entries, changed(extents, "stages", [2**32 - 1])),
        (entries, changed(extents, "born", [5])),
        (entries, changed(extents, "codec", ["torch"])),
        (entries, changed(extents, "created", [2])),
        (entries, changed(extents, "created", [0])),
        (entries, changed(extents, "last_access", [2])),
        (entries, changed(extents, "raw_bytes", [0])),
        (entries, changed(extents, "raw_bytes", [2**63])),
        (entries.drop_columns(["sums"]), extents),
        (extents, entries),
    ]
    for lying in lies:
        with pytest.raises(Unusable):
            load(*lying)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"version": 2},
        {"version": True},
        {"nonce": "1" * 32},
        {"floor": 2},
        {"floor": -1},
        {"lead": 1},
        {"writer": None},
        {"segments": None},
        {"segments": []},
        {"segments": [{}, {}]},
        {"segments": [{"file": "../x", "bytes": 1, "xxh3": "", "rows": 0}] * 2},
    ],
)
def test_lying_checkpoint_index_is_unusable(change: dict[str, Any]) -> None:
    state = apply(EMPTY, Delta(ULID, add=(golden_delta().add[0],)))
    _, index = segments.encode_checkpoint(state, "0" * 32, ULID)
    document = json.loads(index)
    segments.decode_index(json.dumps(document | {"more": 1}).encode(), 1, "0" * 32)
    with pytest.raises(Unusable):
        segments.decode_index(json.dumps(document | change).encode(), 1, "0" * 32)
    for key, value in (("bytes", 2**40), ("rows", 2**40), ("rows", -1), ("xxh3", 5), ("file", "x"), ("bytes", True)):
        lying = json.loads(index)
        lying["segments"][0][key] = value
        with pytest.raises(Unusable):
            segments.decode_index(json.dumps(lying).encode(), 1, "0" * 32)
