"""The hash table against a dict from hash to a list of rows, and names parsed many at once against one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_s3.errors import Unusable
from lmcache_s3.kernels import extent_names, hash_index
from lmcache_s3.types import ExtentName

HASHES = [bytes([i]) * 16 for i in range(6)] + [bytes(8) + bytes([i]) * 8 for i in range(4)]
"""Few, and some that share their first half."""


@dataclass
class Readable:
    """The same as a dict."""

    rows: dict[bytes, list[int]] = field(default_factory=dict)
    owner: list[int] = field(default_factory=list)
    removed_at: dict[int, int] = field(default_factory=dict)

    def visible(self, key: bytes, rows: int, version: int) -> list[int]:
        found = (row for row in self.rows.get(key, []) if row < rows)
        return [row for row in found if self.removed_at.get(self.owner[row], 2**64) > version]


@given(
    owners=st.lists(st.lists(st.sampled_from(HASHES), min_size=1, max_size=4, unique=True), min_size=1, max_size=8),
    removed=st.dictionaries(st.integers(0, 7), st.integers(1, 3)),
    rows=st.integers(0, 32),
    version=st.integers(0, 3),
    hidden=st.lists(st.integers(0, 7), max_size=2),
    keys=st.lists(st.sampled_from(HASHES), max_size=5),
    seed=st.integers(0, 2**63).map(lambda n: 2 * n + 1),
)
def test_look_ups_are_those_of_a_dict(
    owners: list[list[bytes]],
    removed: dict[int, int],
    rows: int,
    version: int,
    hidden: list[int],
    keys: list[bytes],
    seed: int,
) -> None:
    readable = Readable(removed_at=removed)
    for number, hashes in enumerate(owners):
        for key in hashes:
            readable.rows.setdefault(key, []).append(len(readable.owner))
            readable.owner.append(number)
    n = len(readable.owner)
    counts = np.array([len(hashes) for hashes in owners])
    halves = np.frombuffer(b"".join(key for one in owners for key in one), np.uint64).reshape(-1, 2)
    slots, owner = np.zeros(64, np.uint32), np.array(readable.owner, np.uint32)
    shift, key_seed = hash_index.shift_of(slots), np.uint64(seed % 2**64)
    starts = np.cumsum(counts) - counts
    assert hash_index.insert(slots, key_seed, shift, halves, owner, starts, np.arange(n), halves) == 0
    removed_at = np.full(len(owners), hash_index.NEVER)
    for number, at in removed.items():
        if number < len(owners):
            removed_at[number] = at
    table = (slots, key_seed, shift, halves, owner, removed_at, rows, np.uint64(version))
    wanted = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)

    expected: list[int] = []
    for key in keys:
        shown = [row for row in readable.visible(key, rows, version) if readable.owner[row] not in hidden]
        if not shown:
            break
        expected.append(shown[0])
    out = np.empty(len(keys), np.int64)
    found = hash_index.match(*table, np.array(hidden, np.int64), wanted, out)
    assert out[:found].tolist() == expected

    hash_index.resolve(*table, wanted, out)
    assert out.tolist() == [next(iter(readable.visible(key, rows, version)), -1) for key in keys]

    for i, key in enumerate(keys):
        some = np.empty(16, np.int64)
        count = hash_index.find(*table, wanted[i], some)
        assert some[:count].tolist() == readable.visible(key, rows, version)
        # One that has no room for all still says how many there are.
        assert hash_index.find(*table, wanted[i], some[:1]) == count


def test_an_owner_that_holds_a_hash_twice_is_named() -> None:
    hashes = np.frombuffer(b"".join([HASHES[0], HASHES[1], HASHES[2], HASHES[1]]), np.uint64).reshape(-1, 2)
    slots, owner, starts = np.zeros(64, np.uint32), np.array([0, 1, 1, 1], np.uint32), np.array([0, 1])
    shift = hash_index.shift_of(slots)
    assert hash_index.insert(slots, np.uint64(1), shift, hashes, owner, starts, np.arange(4), hashes) == -1 - 1


NAMES = st.builds(
    ExtentName,
    st.binary(min_size=16, max_size=16),
    st.integers(1, 65_536),
    st.from_regex(r"[a-z0-9_-]{1,64}", fullmatch=True),
    st.integers(0, 2**63 - 1),
    st.binary(min_size=16, max_size=16).map(bytes.hex),
)


def parsed(names: list[str], codecs: list[str]) -> tuple[int, list[ExtentName]]:
    def text(column: list[str]) -> tuple[np.ndarray, np.ndarray]:
        _, offsets, data = pa.array(column, pa.string()).buffers()
        return np.frombuffer(data, np.uint8), np.frombuffer(offsets, np.int32, len(column) + 1)

    n = len(names)
    last, nonce = np.empty((n, 16), np.uint8), np.empty((n, 16), np.uint8)
    chunks, born = np.empty(n, np.int64), np.empty(n, np.int64)
    bad = extent_names.parse(*text(names), *text(codecs), 65_536, 2**63 - 1, last, chunks, born, nonce)
    found = [
        ExtentName(last[i].tobytes(), int(chunks[i]), codecs[i], int(born[i]), nonce[i].tobytes().hex())
        for i in range(n if bad < 0 else bad)
    ]
    return int(bad), found


@given(st.lists(NAMES, min_size=1, max_size=5))
def test_names_are_parsed_as_one_by_one(names: list[ExtentName]) -> None:
    assert parsed([str(name) for name in names], [name.codec for name in names]) == (-1, names)


@given(NAMES, st.data())
def test_a_changed_name_is_none_or_what_it_says(name: ExtentName, data: st.DataObject) -> None:
    text = str(name)
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.sampled_from("0af.-gZ")) + text[at + data.draw(st.integers(0, 1)) :]
    bad, found = parsed([changed], [name.codec])
    try:
        expected = ExtentName.parse(changed)
    except Unusable:
        assert bad == 0
        return
    bounded = expected.n_chunks <= 65_536 and expected.born < 2**63
    assert found == ([expected] if bounded and expected.codec == name.codec else [])


@pytest.mark.parametrize("text", ["", ".", "-", "0" * 32, "0" * 32 + "." + "-" + "0" * 32, "0" * 65, "." * 80])
def test_what_is_no_name(text: str) -> None:
    assert parsed([text], ["fast"])[0] == 0
