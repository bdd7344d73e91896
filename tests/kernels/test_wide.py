"""Kernels with sixteen lanes an instruction beside those for any processor: both give the same bits."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from lmcache_s3.codecs.dtypes import from_float32
from lmcache_s3.kernels import (
    cachegen_tiles_scalar,
    cachegen_tiles_wide,
    column_rans,
    column_rans_scalar,
    column_rans_wide,
    column_tables,
    column_tables_wide,
    quantise,
    quantise_wide,
    rans_scalar,
    rans_wide,
)
from lmcache_s3.kernels import rans_reference as reference
from lmcache_s3.kernels.float_forms import FORMS
from lmcache_s3.kernels.quantise import block_of
from lmcache_s3.kernels.rans import SPARE_WORDS
from lmcache_s3.kernels.rans_tables import all_tables, codes_pairs
from lmcache_s3.kernels.vectors import WIDE

pytestmark = pytest.mark.skipif(not WIDE, reason="the processor has no AVX-512")
CODERS = [rans_scalar, rans_wide]


def values_of(count: int, seed: int, scale: float) -> np.ndarray:
    """With some that most tables have no symbol for."""
    values = np.random.default_rng(seed).standard_t(3, count) * scale
    return np.clip(np.rint(values), -127, 127).astype(np.int8)


def encode(form: ModuleType, q: np.ndarray, table: int, room: int) -> tuple[list[int], list[int], list[int]]:
    states, words = np.full(32, 1 << 16, np.uint32), np.zeros(room, np.uint16)
    escapes = np.zeros(q.size + 2, np.int8)
    place, escape_place = form.encode_values(q, q.size, all_tables(), table, states, words, room, escapes, escapes.size)
    return states.tolist(), words[place:].tolist(), escapes[escape_place:].tolist()


@pytest.mark.parametrize("count", [1, 31, 64, 65, 128, 1000, 1001])
@pytest.mark.parametrize("table", [10, 20, 30, 55, 110])
def test_encoders_agree_with_the_readable_one(count: int, table: int) -> None:
    q = values_of(count, count, 1.5)
    stream = reference.encode([(q.tolist(), table)])
    expected = (stream.states, stream.words, stream.escapes)
    for form in CODERS:
        assert encode(form, q, table, count + 2) == expected
        # As little room as there must be: a word a symbol.
        assert encode(form, q, table, (count + 1) // 2 if codes_pairs(table) else count) == expected


@pytest.mark.parametrize("pieces", [[1], [64], [640, 360], [100, 300, 2, 598], [62, 1, 937], [999, 64]])
@pytest.mark.parametrize("table", [10, 20, 30, 110])
def test_decoders_read_a_run_in_pieces(pieces: list[int], table: int) -> None:
    tables, count = all_tables(), sum(pieces)
    if codes_pairs(table) and any(piece % 2 for piece in pieces[:-1]):
        pieces = [count]
    q = values_of(count, 7, 1.5)
    stream = reference.encode([(q.tolist(), table)])
    words = np.array(stream.words + [0xFFFF] * SPARE_WORDS, np.uint16)
    escapes = np.array(stream.escapes, np.int8)
    for form in CODERS:
        states, place, escape_place, at = np.array(stream.states, np.uint32), 0, 0, 0
        symbols, read = 0, []
        for piece in pieces:
            out = np.full(piece + 2 + piece % 2, 99, np.int8)
            place, escape_place = form.decode_run(
                states, words, place, len(stream.words), tables.slots[table], tables.values[table],
                tables.pairs[table], escapes, escape_place, escapes.size, symbols, out, out.view(np.uint16), piece,
            )  # fmt: skip
            assert place >= 0
            assert (out[piece + piece % 2 :] == 99).all(), "nothing is written behind a piece"
            symbols += piece // 2 if codes_pairs(table) else piece
            read += out[:piece].tolist()
            at += piece
        assert read == q.tolist()
        assert (place, escape_place) == (len(stream.words), len(stream.escapes))
        assert (states == 1 << 16).all()


@pytest.mark.parametrize("table", [20, 30])
def test_decoders_stop_at_the_end_of_words_and_escapes(table: int) -> None:
    tables = all_tables()
    q = values_of(2000, 8, 4.0)
    stream = reference.encode([(q.tolist(), table)])
    words, escapes = np.array(stream.words + [0] * SPARE_WORDS, np.uint16), np.array(stream.escapes, np.int8)
    assert len(escapes)
    out = np.empty(2002, np.int8)
    for form in CODERS:
        for end, escape_end in ((len(stream.words) // 2, escapes.size), (len(stream.words), escapes.size - 1), (0, 0)):
            kept = np.concatenate((words[:end], words[-SPARE_WORDS:]))
            answer = form.decode_run(
                np.array(stream.states, np.uint32), kept, 0, end, tables.slots[table], tables.values[table],
                tables.pairs[table], escapes[:escape_end].copy(), 0, escape_end, 0, out, out.view(np.uint16), 2000,
            )  # fmt: skip
            assert answer[0] == -1


@pytest.mark.parametrize("channels", [16, 32, 64, 80, 96, 128, 192, 576, 256, 24])
@pytest.mark.parametrize("kv_dtype", sorted(FORMS))
def test_tiles_agree(channels: int, kv_dtype: str) -> None:
    rng, form = np.random.default_rng(channels), FORMS[kv_dtype]
    heads, vectors, first, block = 3, 10, 2, block_of(channels)
    strides = np.array([0, 0, (heads + 1) * (channels + 5), channels + 5], np.int64)
    flat = from_float32(rng.standard_normal(6 * strides[2]).astype(np.float32), kv_dtype)
    flat = flat.view(f"u{flat.itemsize}")
    q = rng.integers(-127, 128, vectors * channels).astype(np.int8)
    steps = rng.random(max(heads * channels, first + vectors)).astype(np.float32) + np.float32(0.1)
    halves = rng.integers(-9, 9, heads * channels).astype(np.float32)
    answers = []
    for tiles in (cachegen_tiles_scalar, cachegen_tiles_wide):
        space, rounded = np.empty(vectors * channels, np.float32), np.empty(vectors * channels, np.uint16)
        y = np.empty((vectors, channels), np.float32)
        tiles.coefficients(flat, form, 7, strides, heads, block, first, y, space)
        answers.append([y.tobytes()])
        for per_token in (False, True):
            out = np.zeros_like(flat)
            tiles.restore(
                q, first, vectors, heads, channels, block, per_token, steps, halves, space, rounded, out, form, 7,
                strides,
            )  # fmt: skip
            answers[-1].append(out.tobytes())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("columns", [1, 31, 32, 70, 192])
def test_coders_of_columns_agree(columns: int) -> None:
    rng = np.random.default_rng(columns)
    frequencies = column_rans.normalised(rng.integers(0, 2, (5, 65)) * rng.integers(1, 9999, (5, 65)))
    chosen = rng.integers(0, 5, columns)
    symbols = np.stack([rng.choice(np.flatnonzero(frequencies[table]), 40) for table in chosen], axis=1)
    symbols = symbols.astype(np.uint8)
    encoding, decoding = column_rans.encoding_tables(frequencies), column_rans.decoding_tables(frequencies)
    offsets = np.resize((chosen * 65).astype(np.uint32), columns + 64)
    starts = np.resize((chosen << 12).astype(np.uint32), columns + 64)
    flat = symbols.reshape(-1)
    answers: list[list[object]] = []
    for form in (column_rans_scalar, column_rans_wide):
        states, words = np.full(64, 1 << 16, np.uint32), np.zeros(symbols.size + 128, np.uint16)
        end = words.size - 64  # what is behind is a decoder's spare
        place = form.encode(flat, 0, columns, offsets, encoding.slots, encoding.inverses, states, words[:end], end)
        answers.append([states.tobytes(), words[place:end].tobytes()])
        out = np.empty_like(flat)
        assert form.decode(states.copy(), words, place, starts, decoding, out, 0, columns) == end
        assert (out == flat).all()
        # Of what is no stream both say the same, too.
        answers[-1].append(form.decode(states, words[: end + 59], place + 100, starts, decoding, out, 0, columns))
    assert answers[0] == answers[1]


def test_columns_choose_alike() -> None:
    rng = np.random.default_rng(3)
    for tables in (1, 15, 32):
        counts = rng.poisson(np.exp(3 * rng.standard_normal((100, 65)))).astype(np.uint32)
        cost = rng.integers(1, 3073, (65, tables)).astype(np.int32)
        cost[:, tables // 2] = cost[:, 0]  # of equals the first
        ours, theirs = np.zeros((tables, 65), np.int64), np.zeros((tables, 65), np.int64)
        chosen, expected = np.empty(100, np.uint8), np.empty(100, np.uint8)
        column_tables_wide.assign(counts, cost, ours, chosen)
        column_tables.assign_reference(counts, cost, theirs, expected)
        assert (chosen == expected).all()
        assert (ours == theirs).all()


@pytest.mark.parametrize("scale", [0.3, 2.0, 40.0])
def test_magnitudes_are_counted_alike(scale: float) -> None:
    q = values_of(1000, 3, scale)
    counted = np.zeros((2, 128), np.int64)
    rans_scalar.count_magnitudes(q, counted[0])
    rans_wide.count_magnitudes(q, counted[1])
    assert (counted[0] == counted[1]).all()
    assert counted[0].sum() == 1000


@pytest.mark.parametrize("width", [16, 64, 80, 24, 5])
def test_token_steps_agree(width: int) -> None:
    y = np.random.default_rng(width).standard_normal((9, width)).astype(np.float32)
    steps = np.empty((2, 9), np.float64)
    quantise.token_steps(y, 1.2, steps[0])
    quantise_wide.token_steps(y, 1.2, steps[1])
    assert steps[0].tobytes() == steps[1].tobytes()
