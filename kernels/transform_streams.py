"""Streams of a `transform` cell: a unit's quantised coefficients, entropy-coded and back. FORMAT.md §7.3.

A coefficient is one run over the unit's coded tokens; coefficient r of a unit with n streams is coded in stream r mod n
of the unit, after those before it. The runs' states and places are the caller's, so that a stream can go on in the next
unit. `rans.py` codes the runs. Threads: safe, no GIL. Raises nothing; `decode_unit` answers for streams that are not
whole.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.rans import IDLE, LANES, SPARE_WORDS, decode_run, encode_values
from lmcache_s3.kernels.rans_tables import Tables


class Streams(NamedTuple):
    """Streams being decoded, in the order of their units.

    states: u32 [stream, 32]. words: u16, `SPARE_WORDS` more than there are; a stream is read from `places` to
    `word_ends`, int64 [stream]. escapes: i8, from `escape_places` to `escape_ends`. States and places are updated.
    """

    states: np.ndarray
    words: np.ndarray
    places: np.ndarray
    word_ends: np.ndarray
    escapes: np.ndarray
    escape_places: np.ndarray
    escape_ends: np.ndarray


def streams_of(states: np.ndarray, words: np.ndarray, counts: np.ndarray, escapes: np.ndarray) -> Streams:
    """Streams from what is stored; counts: int64 [stream, 2], words and escapes of each, adding up to the arrays'."""
    padded = np.zeros(words.size + SPARE_WORDS, np.uint16)
    padded[: words.size] = words
    ends = np.cumsum(counts, axis=0)
    starts = ends - counts
    return Streams(
        states.astype(np.uint32),
        padded,
        starts[:, 0].copy(),
        ends[:, 0].copy(),
        escapes.astype(np.int8),
        starts[:, 1].copy(),
        ends[:, 1].copy(),
    )


def whole(streams: Streams) -> bool:
    """Whether all streams were read to their very ends."""
    return (
        bool((streams.states == IDLE).all())
        and bool((streams.places == streams.word_ends).all())
        and bool((streams.escape_places == streams.escape_ends).all())
    )


@kernel
def decode_unit(
    streams: Streams,
    tables: Tables,
    chosen: np.ndarray,
    first: int,
    first_pairs: np.ndarray,
    count: int,
    entries: np.ndarray,
    filled: np.ndarray,
) -> bool:
    """Decode a unit's coefficients of `count` coded tokens; False: a stream is not whole, or ends too early.

    chosen: u8 [coefficient], tables below `TABLES`. first: the first of the unit's streams. first_pairs: of
    `transform_products.Packed`. entries: int64 [≥ count, ≥ pairs + 1], for each token its pairs of coefficients that
    are not both 0, as pair · 2³² + their two int16; filled: int64 [≥ count], how many.
    """
    length = count + 2 + (count & 1)
    low = np.empty(length, np.int8)
    high = np.empty(length, np.int8)
    low_pairs = low.view(np.uint16)
    high_pairs = high.view(np.uint16)
    filled[:count] = 0
    n = first_pairs.size
    for of_unit in range(n):
        stream = first + of_unit
        states = streams.states[stream].copy()
        place = streams.places[stream]
        end = streams.word_ends[stream]
        escape_place = streams.escape_places[stream]
        escape_end = streams.escape_ends[stream]
        pair = first_pairs[of_unit] << 32
        for r in range(of_unit, chosen.size, 2 * n):
            t = chosen[r]
            place, escape_place = decode_run(
                states, streams.words, place, end, tables.slots[t], tables.values[t], tables.pairs[t],
                streams.escapes, escape_place, escape_end, 0, low, low_pairs, count,
            )  # fmt: skip
            if place < 0:
                return False
            if r + n < chosen.size:
                t = chosen[r + n]
                place, escape_place = decode_run(
                    states, streams.words, place, end, tables.slots[t], tables.values[t], tables.pairs[t],
                    streams.escapes, escape_place, escape_end, 0, high, high_pairs, count,
                )  # fmt: skip
                if place < 0:
                    return False
            else:
                high[:] = 0
            for token in range(count):
                both = (np.int64(high[token]) << 16 & 0xFFFF0000) | (np.int64(low[token]) & 0xFFFF)
                at = filled[token]
                entries[token, at] = pair | both
                filled[token] = at + np.int64(both != 0)
            pair += 1 << 32
        streams.states[stream] = states
        streams.places[stream] = place
        streams.escape_places[stream] = escape_place
    return True


@kernel
def encode_unit(
    q: np.ndarray,
    count: int,
    tables: Tables,
    chosen: np.ndarray,
    first: int,
    n: int,
    states: np.ndarray,
    words: np.ndarray,
    starts: np.ndarray,
    place: int,
    escapes: np.ndarray,
    escape_starts: np.ndarray,
    escape_place: int,
) -> tuple[int, int]:
    """Encode q[:, :count], i8 [coefficient, ≥ count tokens], after all later units; returns the new places.

    chosen, first, n: as in `decode_unit`. states: u32 [stream, 32], updated. starts, escape_starts: int64 [stream],
    where each of these streams now begins in `words` and `escapes`, which fill from their ends. Places of −1: one of
    the two has less room left than a run may take; among the escapes, a last value's missing partner takes a place.
    """
    for stream in range(first + n - 1, first - 1, -1):
        coefficients = (chosen.size - (stream - first) + n - 1) // n
        for i in range(coefficients - 1, -1, -1):
            r = stream - first + i * n
            if place < count or escape_place < count + (count & 1):
                return -1, -1
            place, escape_place = encode_values(
                q[r], count, tables, int(chosen[r]), states[stream], words, place, escapes, escape_place
            )
        starts[stream] = place
        escape_starts[stream] = escape_place
    return place, escape_place


def idle_states(n: int) -> np.ndarray:
    """u32 [stream, 32], as encoding begins."""
    return np.full((n, LANES), IDLE, np.uint32)
