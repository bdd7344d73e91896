"""The kernels of `transform`: the fast give the bits of the readable, and streams come back whole or not at all."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lmcache_s3.codecs.dtypes import from_float32
from lmcache_s3.kernels import rans_reference as rans
from lmcache_s3.kernels import transform_reference as reference
from lmcache_s3.kernels.float_forms import FORMS
from lmcache_s3.kernels.rans_tables import all_tables
from lmcache_s3.kernels.strided import flat_view
from lmcache_s3.kernels.transform_products import pack, packed_columns
from lmcache_s3.kernels.transform_streams import (
    Streams,
    decode_unit,
    encode_unit,
    idle_states,
    streams_of,
    whole,
)
from lmcache_s3.kernels.transform_turns import cos_sin
from lmcache_s3.kernels.transform_values import Place, Rotation, decode_values
from lmcache_s3.types import STORAGE_DTYPE, KVDtype

DTYPES: tuple[KVDtype, ...] = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")


def coefficients(live: int, tokens: int, seed: int) -> np.ndarray:
    """int8 [coefficient, ≥ tokens + 1]: wide ones first, most of the last ones 0."""
    rng = np.random.default_rng(seed)
    widths = 20 * 0.02 ** (np.arange(live) / live)
    q = np.zeros((live, tokens + 2 - tokens % 2), np.int8)
    q[:, :tokens] = np.clip(np.rint(rng.standard_t(3, (live, tokens)) * widths[:, None]), -127, 127)
    return q


# --- values


@pytest.mark.parametrize(
    ("planes", "layers", "heads", "channels", "live", "rotary", "streams"),
    [
        (1, 1, 3, 64, 150, 64, 1),
        (2, 2, 1, 64, 255, 32, 3),
        (1, 2, 2, 80, 320, 0, 2),
        (2, 1, 3, 12, 40, 6, 1),
        (1, 5, 3, 1, 15, 0, 1),
        (1, 1, 1, 576, 300, 64, 1),
    ],
)
@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_values_have_the_references_bits(
    planes: int, layers: int, heads: int, channels: int, live: int, rotary: int, streams: int, kv_dtype: KVDtype
) -> None:
    rng = np.random.default_rng(live)
    tokens, cell_tokens = 21, 30
    vectors, width = planes * layers * heads, planes * layers * heads * channels
    inverse = rng.integers(-400, 401, (width, live)).astype(np.int16)
    scale = rng.standard_normal(width).astype(np.float32)
    mean = rng.standard_normal(width).astype(np.float32)
    q = coefficients(live, tokens, 1)[:, :tokens]
    which = np.sort(rng.choice(cell_tokens, tokens, replace=False))
    cosine, sine = cos_sin(rng.random(rotary // 2), 1000, cell_tokens)
    turned = layers * heads if rotary else 0
    wanted = reference.decode_values(inverse, scale, mean, q, cosine[which], sine[which], vectors, turned)

    around = np.full((planes, layers + 1, cell_tokens, heads + 1, channels), 0x55, STORAGE_DTYPE[kv_dtype])
    before, out = around.copy(), around[:, 1:, :, 1:]
    layout = flat_view(out)
    assert layout is not None
    plane, layer, token, head = (int(stride) for stride in layout[1])
    packed = pack(inverse, vectors, streams)
    entries, filled = reference.entries_of(q, streams)
    decode_values(
        packed, packed_columns(packed, scale, vectors), packed_columns(packed, mean, vectors), vectors, channels,
        Rotation(cosine.reshape(-1), sine.reshape(-1), rotary // 2, turned), entries, filled, which, layout[0],
        FORMS[kv_dtype], Place(0, plane, layer, token, head, layers, heads),
    )  # fmt: skip
    got = out[:, :, which].transpose(2, 0, 1, 3, 4).reshape(wanted.shape)
    assert got.tobytes() == from_float32(wanted, kv_dtype).tobytes()
    out[:, :, which] = before[:, 1:, which, 1:]
    assert around.tobytes() == before.tobytes(), "written outside of what was asked for"


def test_sums_at_their_bound_are_exact() -> None:
    inverse = np.full((16, 64), 2047, np.int16)
    q = np.full((64, 1), -127, np.int8)
    packed = pack(inverse, 1, 1)
    entries, filled = reference.entries_of(q, 1)
    out = np.zeros((1, 1, 1, 1, 16), np.float32)
    layout = flat_view(out)
    assert layout is not None
    ones, nothing = np.ones(16, np.float32), np.zeros(0, np.float32)
    decode_values(
        packed, ones, np.zeros(16, np.float32), 1, 16, Rotation(nothing, nothing, 0, 0), entries, filled,
        np.zeros(1, np.int64), layout[0], FORMS["float32"], Place(0, 0, 0, 0, 0, 1, 1),
    )  # fmt: skip
    assert (out == -2047 * 127 * 64).all()


def test_weights_lie_within_cache_lines() -> None:
    for live in (1, 2, 3, 50):
        assert pack(np.ones((48, live), np.int16), 3, 1).weights.ctypes.data % 64 == 0


def test_turns_are_those_of_trigonometry() -> None:
    turns = np.concatenate(([0, 0.5, 0.25, -0.125, 1.0], np.geomspace(0.159, 1e-6, 30)))
    for first in (0, 777, 131_072):
        cosine, sine = cos_sin(turns, first, 64)
        for token in (0, 1, 17, 63):
            for j, turn in enumerate(turns):
                angle = 2 * math.pi * math.fmod(turn * (first + token), 1)
                assert cosine[token, j] == pytest.approx(math.cos(angle), abs=1e-7)
                assert sine[token, j] == pytest.approx(math.sin(angle), abs=1e-7)
    assert cos_sin(np.array([0.25]), 0, 5)[0][:, 0].tolist() == [1, 0, -1, 0, 1]
    assert cos_sin(np.array([0.25]), 0, 5)[1][:, 0].tolist() == [0, 1, 0, -1, 0]


# --- streams


def encoded(units: list[tuple[np.ndarray, np.ndarray, int, int]], tokens: int, streams: int) -> Streams:
    """units: (q, tables, first stream, its streams)."""
    room = sum(q.size for q, *_ in units)
    words, escapes, states = np.zeros(room, np.uint16), np.zeros(room, np.int8), idle_states(streams)
    starts, escape_starts = np.full(streams + 1, room), np.full(streams + 1, room)
    place = escape_place = room
    for q, chosen, first, n in reversed(units):
        place, escape_place = encode_unit(
            q, tokens, all_tables(), chosen, first, n, states, words, starts, place, escapes, escape_starts,
            escape_place,
        )  # fmt: skip
    counts = np.stack((np.diff(starts), np.diff(escape_starts)), axis=1)
    return streams_of(states, words[place:], counts, escapes[escape_place:])


@pytest.mark.parametrize("tokens", [1, 2, 40, 255, 256])
@pytest.mark.parametrize("n", [1, 3])
def test_units_come_back_from_their_streams(tokens: int, n: int) -> None:
    q, more = coefficients(37, tokens, 2), coefficients(10, tokens, 3)
    chosen, others = np.arange(37, dtype=np.uint8) * 3, np.full(10, 5, np.uint8)
    streams = encoded([(q, chosen, 0, n), (more, others, n - 1, 1)], tokens, n)
    # The same streams, as the readable coder writes them.
    for stream in range(n):
        runs = [(q[r, :tokens].tolist(), int(chosen[r])) for r in range(stream, 37, n)]
        runs += [(more[r, :tokens].tolist(), 5) for r in range(10)] if stream == n - 1 else []
        wanted = rans.encode(runs)
        assert streams.states[stream].tolist() == wanted.states
        assert streams.words[streams.places[stream] : streams.word_ends[stream]].tolist() == wanted.words
        assert streams.escapes[streams.escape_places[stream] : streams.escape_ends[stream]].tolist() == wanted.escapes
    for these, tables, first, of_unit in ((q, chosen, 0, n), (more, others, n - 1, 1)):
        packed = pack(np.zeros((1, len(tables)), np.int16), 1, of_unit)
        entries, filled = np.empty((tokens, packed.pairs + 1), np.int64), np.empty(tokens, np.int64)
        assert not whole(streams)
        assert decode_unit(streams, all_tables(), tables, first, packed.first_pairs, tokens, entries, filled)
        wanted_entries, wanted_filled = reference.entries_of(these[:, :tokens], of_unit)
        assert (filled == wanted_filled).all()
        for token in range(tokens):
            assert (entries[token, : filled[token]] == wanted_entries[token, : filled[token]]).all()
    assert whole(streams)


def test_a_stream_that_ends_too_early_is_told() -> None:
    q, chosen = coefficients(20, 64, 4), np.full(20, 20, np.uint8)
    streams = encoded([(q, chosen, 0, 1)], 64, 1)
    packed = pack(np.zeros((1, 20), np.int16), 1, 1)
    entries, filled = np.empty((64, 11), np.int64), np.empty(64, np.int64)
    for cut in (
        streams._replace(word_ends=streams.word_ends - 8),
        streams._replace(escape_ends=streams.escape_ends - 1),
    ):
        copied = Streams(*(array.copy() for array in cut))
        done = decode_unit(copied, all_tables(), chosen, 0, packed.first_pairs, 64, entries, filled)
        assert not done or not whole(copied)
