"""Spaces and prefix hashes: FORMAT's vector, and that everything which changes KV changes the hash."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.identity import ExtraKey, KVGroup, PrefixHasher, Space, prefix_hashes, root_hash

GROUP = KVGroup("full", 30, 2, 3, 64)
SPACE = Space("ab" * 32, "bfloat16", (GROUP,), {"rope_theta": 500000.0}, model="Smol")
VECTOR_ID = hashlib.sha256(b'{"a":1}').hexdigest()


def naive(
    space_id: str, tokens: list[int], chunk_tokens: int, salt: str = "", extra: tuple[Any, ...] = ()
) -> list[bytes]:
    """The specification, written to be read."""
    parent = hashlib.sha256(
        b"lmcache-s3/1/root\x00" + bytes.fromhex(space_id) + struct.pack("<I", len(salt.encode())) + salt.encode()
    ).digest()
    out = []
    for i in range(len(tokens) // chunk_tokens):
        chunk = tokens[i * chunk_tokens : (i + 1) * chunk_tokens]
        body = b"".join(struct.pack("<I", t) for t in chunk)
        here = sorted(e for e in extra if i * chunk_tokens <= e[2] < (i + 1) * chunk_tokens)
        text = json.dumps([list(e) for e in here], separators=(",", ":")).encode() if here else b""
        parent = hashlib.sha256(
            b"lmcache-s3/1/chunk\x00"
            + parent
            + struct.pack("<I", len(body))
            + body
            + struct.pack("<I", len(text))
            + text
        ).digest()
        out.append(parent[:16])
    return out


def test_vector_of_the_format() -> None:
    assert [h.hex() for h in prefix_hashes(VECTOR_ID, list(range(8)), 4)] == [
        "b098794899605172f5df0077b32a6a43",
        "8738e83f07bc66ea116526365e020e9e",
    ]


token = st.integers(0, 2**32 - 1)
extras = st.lists(
    st.tuples(st.sampled_from(["lora", "image"]), st.binary(min_size=1, max_size=4).map(bytes.hex), st.integers(0, 40)),
    max_size=4,
)


@given(st.lists(token, max_size=40), st.integers(1, 9), st.text(max_size=5), extras, st.data())
def test_chain_equals_the_naive_reference(
    tokens: list[int], chunk: int, salt: str, extra: list[tuple[str, str, int]], data: st.DataObject
) -> None:
    expected = naive(VECTOR_ID, tokens, chunk, salt, tuple(extra))
    keys = [ExtraKey(*e) for e in extra]
    assert prefix_hashes(VECTOR_ID, tokens, chunk, salt=salt, extra=keys) == expected
    assert prefix_hashes(VECTOR_ID, np.array(tokens, np.int64), chunk, salt=salt, extra=keys[::-1]) == expected
    hasher = PrefixHasher(VECTOR_ID, chunk, salt, keys)
    grown: list[bytes] = []
    position = 0
    while position < len(tokens):
        step = data.draw(st.integers(1, 12))
        grown += hasher.extend(tokens[position : position + step])
        position += step
    assert grown == hasher.hashes == expected
    assert hasher.n_tokens == len(tokens)
    assert hasher.root == root_hash(VECTOR_ID, salt)[:16]


@given(st.lists(token, min_size=8, max_size=8), st.integers(0, 7), st.integers(1, 2**32 - 1))
def test_a_changed_token_changes_every_hash_from_its_chunk_on(tokens: list[int], at: int, by: int) -> None:
    other = list(tokens)
    other[at] = (other[at] + by) % 2**32
    a, b = prefix_hashes(VECTOR_ID, tokens, 2), prefix_hashes(VECTOR_ID, other, 2)
    assert [x == y for x, y in zip(a, b, strict=True)] == [i < at // 2 for i in range(4)]


def test_salts_and_spaces_share_nothing() -> None:
    tokens = list(range(64))
    seen = [
        h
        for space in (VECTOR_ID, "0" * 64)
        for salt in ("", "a", "b", "ab", "a\0")
        for h in prefix_hashes(space, tokens, 4, salt=salt)
    ]
    assert len(set(seen)) == len(seen) == 160


def test_extra_keys_count_from_their_chunk_on() -> None:
    tokens = list(range(16))
    plain = prefix_hashes(VECTOR_ID, tokens, 4)
    lora = prefix_hashes(VECTOR_ID, tokens, 4, extra=[ExtraKey("lora", "aa", 0)])
    image = prefix_hashes(VECTOR_ID, tokens, 4, extra=[ExtraKey("image", "aa", 9)])
    moved = prefix_hashes(VECTOR_ID, tokens, 4, extra=[ExtraKey("image", "aa", 10)])
    assert not set(plain) & set(lora)
    assert image[:2] == plain[:2]
    assert not set(image[2:]) & set(plain[2:])
    assert image[2:] != moved[2:]


@pytest.mark.parametrize(
    "tokens",
    [
        [1.5] * 4,
        [-1] * 4,
        [2**32] * 4,
        ["a"] * 4,
        np.zeros(4),
        np.zeros((2, 2), int),
        np.array([-1]),
        np.array([2**32]),
    ],
)
def test_what_is_no_token_is_refused(tokens: Any) -> None:
    with pytest.raises(Invalid, match="tokens"):
        prefix_hashes(VECTOR_ID, tokens, 4)


@pytest.mark.parametrize("chunk_tokens", [0, -1, 2.0, 1 << 17])
def test_chunk_tokens_out_of_range_are_refused(chunk_tokens: Any) -> None:
    with pytest.raises(Invalid, match="chunk_tokens"):
        prefix_hashes(VECTOR_ID, [1], chunk_tokens)


@pytest.mark.parametrize("arguments", [("LoRA", "aa", 0), ("lora", "AA", 0), ("lora", "a", 0), ("lora", "aa", -1)])
def test_bad_extra_keys_are_refused(arguments: tuple[str, str, int]) -> None:
    with pytest.raises(Invalid, match="extra key"):
        ExtraKey(*arguments)


# --- spaces ---------------------------------------------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8"), max_size=6)
small = st.integers(1, 99)
groups = st.builds(KVGroup, st.sampled_from(["full", "mla"]), small, st.integers(1, 2), small, small) | st.builds(
    KVGroup, st.sampled_from(["sliding", "chunked"]), small, st.integers(1, 2), small, small, small
)
numbers = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
spaces = st.builds(
    Space,
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.sampled_from(["bfloat16", "float16", "float8_e4m3fn"]),
    st.lists(groups, min_size=1, max_size=3).map(tuple),
    st.dictionaries(text, json_values, max_size=3),
    st.integers(1, 1024),
    st.none() | st.sampled_from(["fp8", "awq"]),
    st.sampled_from(["exact", "kl0.02", "kl1e-05", "unmeasured-cachegen-default"]),
    text,
)


@given(spaces)
def test_space_json_round_trips(space: Space) -> None:
    again = Space.from_json(space.to_json())
    assert again == space
    assert again.id == space.id
    assert again.model == space.model
    assert again.to_json() == space.to_json()
    assert hash(again) == hash(space)
    assert pickle.loads(pickle.dumps(space)).id == space.id  # noqa: S301 (our own bytes; spaces travel to worker processes)


OTHER: dict[str, Any] = {
    "weights": "cd" * 32,
    "kv_dtype": "float16",
    "groups": (replace(GROUP, heads=4),),
    "rope": {"rope_theta": 10000.0},
    "chunk_tokens": 128,
    "quantisation": "fp8",
    "fidelity": "kl0.02",
}


@pytest.mark.parametrize("name", list(OTHER))
def test_any_one_field_changed_is_another_space(name: str) -> None:
    other = replace(SPACE, **{name: OTHER[name]})
    assert other.id != SPACE.id
    assert other != SPACE
    tokens = list(range(1024))
    assert not set(prefix_hashes(SPACE.id, tokens, 128)) & set(prefix_hashes(other.id, tokens, 128))


@pytest.mark.parametrize(
    "change",
    [{"kind": "mla"}, {"layers": 31}, {"kv": 1}, {"heads": 4}, {"head_dim": 65}, {"kind": "sliding", "window": 9}],
)
def test_any_change_of_a_group_is_another_space(change: dict[str, Any]) -> None:
    assert replace(SPACE, groups=(replace(GROUP, **change),)).id != SPACE.id


def test_every_field_but_the_name_is_identity() -> None:
    assert set(SPACE.identity()) == set(OTHER) | {"format"}
    assert replace(SPACE, model="another name").id == SPACE.id


def test_rope_numbers_are_compared_by_value_and_cannot_be_changed_from_outside() -> None:
    rope: dict[str, Any] = {"rope_theta": 500000}
    space = replace(SPACE, rope=rope)
    assert space.id == SPACE.id
    rope["rope_theta"] = 1
    assert replace(space).id == SPACE.id


def test_golden_id() -> None:
    """Pins the canonical form: a change here strands every cache in the field."""
    assert SPACE.canonical() == (
        b'{"chunk_tokens":256,"fidelity":"exact","format":1,"groups":[{"head_dim":64,"heads":3,"kind":"full","kv":2,'
        b'"layers":30,"window":null}],"kv_dtype":"bfloat16","quantisation":null,"rope":{"rope_theta":500000},"weights":"'
        + b"ab" * 32
        + b'"}'
    )


def test_geometry_of_one_group_and_of_hybrids() -> None:
    geometry = SPACE.geometry
    assert geometry.chunk_shape == (2, 30, 256, 3, 64)
    with pytest.raises(Invalid, match="hybrid"):
        _ = replace(SPACE, groups=(GROUP, KVGroup("sliding", 2, 2, 3, 64, 512))).geometry


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights": "AB" * 32}, "weights"),
        ({"weights": ""}, "weights"),
        ({"kv_dtype": "int4"}, "kv_dtype"),
        ({"groups": ()}, "groups"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"chunk_tokens": True}, "chunk_tokens"),
        ({"quantisation": ""}, "quantisation"),
        ({"fidelity": "good"}, "fidelity"),
        ({"rope": [1]}, "rope"),
        ({"rope": {"a": float("nan")}}, "NaN|nan"),
    ],
)
def test_senseless_spaces_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(Invalid, match=named):
        replace(SPACE, **change)


def _broken(change: dict[str, Any] | None = None, **identity: Any) -> bytes:
    document = json.loads(SPACE.to_json())
    document.update(change or {})
    document["identity"].update(identity)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"3",
        b"[" * 60_000,
        b" " * 70_000,
        SPACE.to_json()[:-5],
        _broken({"format": 2}),
        _broken({"model": 7}),
        _broken({"more": 1}),
        _broken(format=2),
        _broken(weights=5),
        _broken(groups=[]),
        _broken(groups=[{}]),
        _broken(groups=3),
        _broken(chunk_tokens=10**30),
        _broken(chunk_tokens="256"),
        _broken(rope={"a": 10**400}),
        _broken(rope=float("inf")),
        _broken(more=1),
    ],
)
def test_what_is_no_space_json_is_unusable(data: bytes) -> None:
    with pytest.raises(Unusable) as caught:
        Space.from_json(data)
    assert caught.value.key == "space.json"
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    with pytest.raises(Unusable):
        Space.from_json(data)


def test_another_process_with_another_hash_seed_agrees() -> None:
    program = (
        "from lmcache_s3.identity import *\n"
        "s = Space('ab' * 32, 'bfloat16', (KVGroup('full', 30, 2, 3, 64),), {'theta': 5e5, 'b': {'y': 1, 'x': 2}})\n"
        "print(s.id, prefix_hashes(s.id, list(range(300)), 256, salt='é')[0].hex())"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "12345")
    }
    assert len(answers) == 1
    assert len(answers.pop().split()[0]) == 64
