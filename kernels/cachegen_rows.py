"""Rows of a `cachegen` cell, coded and decoded in one streaming pass each. FORMAT.md §7.1.

A *row* is one plane (K or V) of one layer. Decoding goes in tiles of a few kilobytes: symbols, steps, transform,
rounding, and straight into the caller's array, whatever its strides but for the channels, which lie side by side. Rows
depend on nothing but themselves, so that threads (or a GPU's warps) may share a cell's rows among them.

`cachegen_reference.py` is the same, written to be read; both give the same bits. Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmcache_s3.kernels import cachegen_tiles_scalar, cachegen_tiles_wide, quantise, quantise_wide
from lmcache_s3.kernels.float_forms import FORMS, FloatForm
from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.quantise import (
    block_of,
    channel_steps,
    code_means,
    code_steps,
    decode_steps,
    quantise_scaled,
    quantise_span,
)
from lmcache_s3.kernels.rans import (
    LANES,
    SPARE_WORDS,
    choose_table,
    count_magnitudes,
    decode_run,
    encode_values,
    is_idle,
)
from lmcache_s3.kernels.rans_tables import Tables, all_tables
from lmcache_s3.kernels.strided import flat_view
from lmcache_s3.kernels.vectors import WIDE

CODES, MEANS, VALUES = 0, 1, 2
"""A row's runs, in the stream's order; means are K's only."""
WHOLE, NOT_WHOLE, STEP_OUT_OF_RANGE = 0, 1, 2
_TILE_VALUES = 4096
_SAMPLED = 4
"""One token in so many is counted when a table is chosen."""
_tiles = cachegen_tiles_wide if WIDE else cachegen_tiles_scalar
restore = _tiles.restore
coefficients = _tiles.coefficients
token_steps = quantise_wide.token_steps if WIDE else quantise.token_steps


class Rows(NamedTuple):
    """What rows are stored as; row = plane · layers + layer.

    bases: u16 [row]. chosen: u8 [row, 3], tables of codes, means and values. states: u32 [row, 32]. word_ends,
    escape_ends: int64 [row + 1], where each row's lie, from 0. words: u16, `SPARE_WORDS` more than there are.
    escapes: i8.
    """

    bases: np.ndarray
    chosen: np.ndarray
    states: np.ndarray
    word_ends: np.ndarray
    escape_ends: np.ndarray
    words: np.ndarray
    escapes: np.ndarray


@kernel
def _decode_rows(
    rows: Rows,
    tables: Tables,
    first_row: int,
    last_row: int,
    layers: int,
    block: int,
    flat: np.ndarray,
    form: FloatForm,
    strides: np.ndarray,
    shape: np.ndarray,
) -> int:
    """Decode rows first_row … last_row − 1 into `flat`, bits of this form.

    Value [plane, layer, token, head, channel] goes to strides · (plane, layer, token, head) + channel; strides:
    int64 [4], in elements; shape: int64 [3], coded tokens, heads, channels. Returns `WHOLE` or what is wrong.
    """
    tokens = shape[0]
    heads = shape[1]
    channels = shape[2]
    width = heads * channels
    tile = max(4, _TILE_VALUES // width // 4 * 4)
    buffer = np.empty(max(tile * width, tokens * heads) + 2 + (max(tile * width, tokens * heads) & 1), np.int8)
    buffer_pairs = buffer.view(np.uint16)
    steps = np.empty(max(width, tokens * heads), np.float32)
    halves = np.zeros(width, np.float32)
    together = max(4, _TILE_VALUES // channels)
    space = np.empty(together * channels, np.float32)
    rounded = np.empty(together * channels, np.uint16)
    for row in range(first_row, last_row):
        per_token = row >= layers
        states = rows.states[row].copy()
        place = rows.word_ends[row]
        end = rows.word_ends[row + 1]
        escape_place = rows.escape_ends[row]
        escape_end = rows.escape_ends[row + 1]
        n_codes = tokens * heads if per_token else width
        for run in range(1 if per_token else 2):
            t = rows.chosen[row, run]
            place, escape_place = decode_run(
                states, rows.words, place, end, tables.slots[t], tables.values[t], tables.pairs[t],
                rows.escapes, escape_place, escape_end, 0, buffer, buffer_pairs, n_codes,
            )  # fmt: skip
            if place < 0:
                return NOT_WHOLE
            if run == MEANS:
                for j in range(width):
                    halves[j] = np.float32(buffer[j]) * np.float32(0.5)
            elif not decode_steps(int(np.int64(rows.bases[row])), buffer, n_codes, steps):
                return STEP_OUT_OF_RANGE
        t = rows.chosen[row, VALUES]
        slots = tables.slots[t]
        values = tables.values[t]
        pairs = tables.pairs[t]
        symbols = 0
        start = (row // layers) * strides[0] + (row % layers) * strides[1]
        for token in range(0, tokens, tile):
            n = min(tile, tokens - token)
            place, escape_place = decode_run(
                states, rows.words, place, end, slots, values, pairs,
                rows.escapes, escape_place, escape_end, symbols, buffer, buffer_pairs, n * width,
            )  # fmt: skip
            if place < 0:
                return NOT_WHOLE
            symbols += n * width // 2 if pairs else n * width
            for group in range(0, n * heads, together):
                vectors = min(together, n * heads - group)
                restore(
                    buffer[group * channels :], token * heads + group, vectors, heads, channels, block, per_token,
                    steps, halves, space, rounded, flat, form, start, strides,
                )  # fmt: skip
        if place != end or escape_place != escape_end or not is_idle(states):
            return NOT_WHOLE
    return WHOLE


@kernel
def _encode_rows(
    rows: Rows,
    tables: Tables,
    wanted: np.ndarray,
    layers: int,
    block: int,
    flat: np.ndarray,
    form: FloatForm,
    strides: np.ndarray,
    shape: np.ndarray,
) -> bool:
    """Encode all rows of `flat` (as in `_decode_rows`) into the arrays of `rows`, `words` and `escapes` being room.

    wanted: float64 [row], steps in standard deviations. False: something is not finite or too large, or does not fit.
    """
    tokens = shape[0]
    heads = shape[1]
    channels = shape[2]
    width = heads * channels
    count = tokens * width
    n_most = max(width, tokens * heads)
    y = np.empty((tokens, width), np.float32)
    vectors = y.reshape(tokens * heads, channels)
    q = np.empty(count, np.int8)
    steps = np.empty(n_most, np.float64)
    coded = np.empty(n_most, np.float32)
    codes = np.empty(n_most, np.int8)
    means = np.empty(width, np.float64)
    mean_codes = np.empty(width, np.int8)
    shift = np.empty(width, np.float32)
    inverse = np.empty(n_most, np.float32)
    words = np.empty(count + 2 * n_most, np.uint16)
    escapes = np.empty(count + 2 * n_most + 3, np.int8)
    together = max(4, _TILE_VALUES // channels)
    space = np.empty(together * channels, np.float32)
    counted = np.empty(128, np.int64)
    rows.word_ends[0] = 0
    rows.escape_ends[0] = 0
    for row in range(rows.bases.size):
        per_token = row >= layers
        start = (row // layers) * strides[0] + (row % layers) * strides[1]
        for group in range(0, tokens * heads, together):
            coefficients(flat, form, start, strides, heads, block, group, vectors[group : group + together], space)
        n_codes = tokens * heads if per_token else width
        if per_token:
            token_steps(vectors, wanted[row], steps)
        else:
            channel_steps(y, wanted[row], steps, means)
        base = code_steps(steps[:n_codes], codes[:n_codes], coded[:n_codes])
        if base < 0:
            return False
        rows.bases[row] = base
        for i in range(n_codes):
            inverse[i] = np.float32(1.0) / coded[i]
        if per_token:
            for vector in range(tokens * heads):
                quantise_scaled(vectors[vector], inverse[vector], q[vector * channels : (vector + 1) * channels])
        else:
            code_means(means, coded, mean_codes)
            for j in range(width):
                shift[j] = np.float32(mean_codes[j]) * np.float32(0.5)
            for token in range(tokens):
                quantise_span(y[token], inverse, shift, q[token * width : (token + 1) * width])
        place = words.size
        escape_place = escapes.size
        states = rows.states[row]
        states[:] = np.uint32(0x10000)
        for run in (VALUES, MEANS, CODES):
            if run == MEANS and per_token:
                rows.chosen[row, run] = 0
                continue
            these = q if run == VALUES else (mean_codes if run == MEANS else codes)
            n = count if run == VALUES else n_codes
            counted[:] = 0
            if run == VALUES:
                for token in range(0, tokens, _SAMPLED):
                    count_magnitudes(q[token * width : (token + 1) * width], counted)
            else:
                count_magnitudes(these[:n], counted)
            t = choose_table(counted, tables.costs)
            rows.chosen[row, run] = t
            place, escape_place = encode_values(these, n, tables, t, states, words, place, escapes, escape_place)
        n_words = words.size - place
        n_escapes = escapes.size - escape_place
        at = rows.word_ends[row]
        escape_at = rows.escape_ends[row]
        if at + n_words > rows.words.size - SPARE_WORDS or escape_at + n_escapes > rows.escapes.size:
            return False
        rows.words[at : at + n_words] = words[place:]
        rows.escapes[escape_at : escape_at + n_escapes] = escapes[escape_place:]
        rows.word_ends[row + 1] = at + n_words
        rows.escape_ends[row + 1] = escape_at + n_escapes
    return True


def room_for_rows(count: int, words: int, escapes: int) -> Rows:
    """Empty arrays for `count` rows with as many words and escapes in all."""
    return Rows(
        np.empty(count, np.uint16),
        np.empty((count, 3), np.uint8),
        np.empty((count, LANES), np.uint32),
        np.zeros(count + 1, np.int64),
        np.zeros(count + 1, np.int64),
        np.empty(words + SPARE_WORDS, np.uint16),
        np.empty(escapes, np.int8),
    )


def encode(rows: Rows, wanted: np.ndarray, cell: np.ndarray, kv_dtype: str) -> bool:
    """Encode a cell's coded tokens into `rows`, made by `room_for_rows`.

    cell: [plane, layer, token, head, channel], bits of numbers of this type, at least one token, any strides. wanted:
    float64 [row], steps in standard deviations. False: a value is not finite or too large to be transformed, or the
    words or escapes do not fit.
    """
    layout = flat_view(cell)
    if layout is None:
        layout = flat_view(np.ascontiguousarray(cell))
        assert layout is not None
    flat, strides = layout
    block, shape = block_of(cell.shape[4]), np.array(cell.shape[2:], np.int64)
    return bool(_encode_rows(rows, all_tables(), wanted, cell.shape[1], block, flat, FORMS[kv_dtype], strides, shape))


def decode(rows: Rows, which: range, layers: int, out: np.ndarray, kv_dtype: str) -> int:
    """Decode rows `which` into `out`: `WHOLE`, or what is wrong with them (`out` is then undefined).

    out: a whole cell of `layers` layers as in `encode`, any strides. Never reads past the rows' words and escapes; the
    caller has checked that all tables are below `TABLES` and that ends do not decrease and lie within.
    """
    layout = flat_view(out)
    target = out if layout is not None else np.empty(out.shape, out.dtype)
    flat, strides = layout if layout is not None else flat_view(target) or (target, target)
    block, shape, form = block_of(out.shape[4]), np.array(out.shape[2:], np.int64), FORMS[kv_dtype]
    answer = _decode_rows(rows, all_tables(), which.start, which.stop, layers, block, flat, form, strides, shape)
    if target is not out:
        out[...] = target
    return int(answer)
