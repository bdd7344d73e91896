"""Decoding `transform` cells on a GPU: streams of runs, then one product with all that follows it. FORMAT.md §7.3.

The same bits as `transform_values.py`: the product is of integers whose sums stay below 2²⁴, exact in float32 in any
order, so tensor cores give them; behind it comes one float32 operation a step, which callers must keep apart
(`enable_fp_fusion=False`). Streams are read as `triton_rans.py` says, and as safely.
"""

import triton
import triton.language as tl

from lmcache_s3.kernels.triton_cachegen import narrow_bits
from lmcache_s3.kernels.triton_rans import IDLE, LANES, NOT_WHOLE, WHOLE, decode_run


@triton.jit
def decode_streams(
    states, words, word_ends, escapes, escape_ends, run_starts, run_tables, run_rows, run_units, counts, slots, values,
    q, status, streams, units, coefficients, q_stride,
):  # fmt: skip
    """Decode a stream's runs: program = stream, of all cells one after another; one warp.

    states u32 [stream, 32], word_ends, escape_ends int64 [stream + 1]. A cell's stream s has the runs run_starts[s] …
    (int32 [streams + 1]): tables u8, coefficients (rows of q) int32, units int32 [run]; a run is as long as its unit's
    counts int32 [cell, unit]. Out: q i8 [cell, coefficient, q_stride], status int32 [stream].
    """
    program = tl.program_id(0).to(tl.int64)
    cell = program // streams
    stream = program % streams
    first_word = tl.load(word_ends + program)
    n_words = (tl.load(word_ends + program + 1) - first_word).to(tl.int32)
    first_escape = tl.load(escape_ends + program)
    n_escapes = (tl.load(escape_ends + program + 1) - first_escape).to(tl.int32)
    words += first_word
    escapes += first_escape
    x = tl.load(states + program * LANES + tl.arange(0, LANES))
    place = tl.full([], 0, tl.int32)
    escape_place = tl.full([], 0, tl.int32)
    for run in range(tl.load(run_starts + stream), tl.load(run_starts + stream + 1)):
        table = tl.load(run_tables + run).to(tl.int32)
        out = q + (cell * coefficients + tl.load(run_rows + run)) * q_stride
        count = tl.load(counts + cell * units + tl.load(run_units + run))
        x, place, escape_place = decode_run(
            x, words, place, n_words, escapes, escape_place, n_escapes, slots, values, table, out, count
        )
    busy = tl.sum((x != IDLE).to(tl.int32), axis=0)
    whole = (place == n_words) & (escape_place == n_escapes) & (busy == 0)
    tl.store(status + program, tl.where(whole, WHOLE, NOT_WHOLE))


@triton.jit
def write_values(
    q, matrices, scale, mean, cosine, sine, coded, counts, addresses, places,
    of_unit, of_matrix, of_stride, of_live, of_q, of_row, of_head, of_turned,
    units, coefficients, cells, tokens, cell_rows, layers, pairs, q_stride, head_stride, channel_strides,
    channels: tl.constexpr, PARTS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Values of coded tokens where they belong. Program = (tile of coded tokens · PARTS + part, vector, cell).

    A vector is a layer's head of K or V; its channels are taken as pairs that are turned together, what is not turned
    as neighbours; a program has HALF of the pairs. matrices: float16, a unit's integers from of_matrix (int64 [vector])
    on, in rows of of_stride, a multiple of DEPTH, of which of_live are coefficients and the rest 0; their rows of q
    begin at of_q, and q has DEPTH rows more than there are, of a multiple of TOKENS; of_turned: pairs that are turned;
    all int32 [vector], as unit, row (plane · layers + layer) and head are. scale, mean float32 [vector, channel];
    cosine, sine float32 [cell, token, pair]. coded int32 [cell, unit, token]: which token each coded one is.
    channel_strides int64 [kv].
    """
    vector = tl.program_id(1)
    cell = tl.program_id(2).to(tl.int64)
    unit = cell * units + tl.load(of_unit + vector)
    count = tl.load(counts + unit)
    start = tl.program_id(0) // PARTS * TOKENS
    index = start + tl.arange(0, TOKENS)
    if start < count:
        k = tl.program_id(0) % PARTS * HALF + tl.arange(0, HALF)
        turned = tl.load(of_turned + vector)
        low = tl.where(k < pairs, k, 2 * k)
        high = tl.where(k < pairs, k + pairs, 2 * k + 1)
        live = tl.load(of_live + vector)
        # Multiples of 16, so that rows are read in long words.
        stride = tl.multiple_of(tl.load(of_stride + vector), 16)
        matrix = matrices + tl.multiple_of(tl.load(of_matrix + vector), 16)
        q += (cell * coefficients + tl.load(of_q + vector)) * q_stride
        low_sum = tl.zeros((HALF, TOKENS), tl.float32)
        high_sum = tl.zeros((HALF, TOKENS), tl.float32)
        for first in range(0, live, DEPTH):
            r = first + tl.arange(0, DEPTH)
            # Rows of q behind the unit's may hold anything: the matrix has zeros there. So may tokens behind the coded.
            numbers = tl.load(q + r[:, None].to(tl.int64) * q_stride + index[None, :]).to(tl.float16)
            if channels == 2 * HALF * PARTS:
                a = tl.load(matrix + low[:, None] * stride + r[None, :])
                b = tl.load(matrix + high[:, None] * stride + r[None, :])
            else:
                a = tl.load(matrix + low[:, None] * stride + r[None, :], mask=(low < channels)[:, None], other=0.0)
                b = tl.load(matrix + high[:, None] * stride + r[None, :], mask=(high < channels)[:, None], other=0.0)
            low_sum = tl.dot(a, numbers, low_sum)
            high_sum = tl.dot(b, numbers, high_sum)
        at = vector * channels
        factor = tl.load(scale + at + low, mask=low < channels, other=0.0)[:, None]
        x = low_sum * factor + tl.load(mean + at + low, mask=low < channels, other=0.0)[:, None]
        factor = tl.load(scale + at + high, mask=high < channels, other=0.0)[:, None]
        z = high_sum * factor + tl.load(mean + at + high, mask=high < channels, other=0.0)[:, None]
        token = tl.load(coded + unit * tokens + index, mask=index < count, other=0)
        angle = (cell * tokens + token)[None, :] * pairs + k[:, None]
        turning = (k < turned)[:, None] & (index < count)[None, :]
        c = tl.load(cosine + angle, mask=turning, other=1.0)
        s = tl.load(sine + angle, mask=turning, other=0.0)
        first_value = tl.where(turning, x * c - z * s, x)
        second_value = tl.where(turning, z * c + x * s, z)
        row = tl.load(of_row + vector)
        element: tl.constexpr = tl.uint32 if BITS == 32 else (tl.uint16 if BITS == 16 else tl.uint8)
        target = tl.load(addresses + cell * cell_rows + row).to(tl.pointer_type(element))
        place = tl.load(places + (row // layers * cells + cell) * tokens + token, mask=index < count, other=0)
        place += tl.load(of_head + vector).to(tl.int64) * head_stride
        step = tl.load(channel_strides + row // layers)
        tl.store(
            target + place[None, :] + low[:, None] * step,
            narrow_bits(first_value, BITS, MANTISSA, BIAS, LARGEST),
            mask=(low < channels)[:, None] & (index < count)[None, :],
        )
        tl.store(
            target + place[None, :] + high[:, None] * step,
            narrow_bits(second_value, BITS, MANTISSA, BIAS, LARGEST),
            mask=(high < channels)[:, None] & (index < count)[None, :],
        )


@triton.jit
def place_vectors(
    source, of_cell, of_row, of_head, of_token, addresses, places, count, channels, cells, tokens, cell_rows, layers,
    head_stride, channel_strides, TILE: tl.constexpr,
):  # fmt: skip
    """Copy vectors that are stored as they are: program = tile of values. source: unsigned [vector, channel]."""
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    vector = index // channels
    inside = vector < count
    value = tl.load(source + index, mask=inside, other=0)
    cell = tl.load(of_cell + vector, mask=inside, other=0).to(tl.int64)
    row = tl.load(of_row + vector, mask=inside, other=0)
    plane = row // layers
    token = tl.load(of_token + vector, mask=inside, other=0)
    place = tl.load(places + (plane * cells + cell) * tokens + token, mask=inside, other=0)
    place += tl.load(of_head + vector, mask=inside, other=0).to(tl.int64) * head_stride
    place += (index % channels).to(tl.int64) * tl.load(channel_strides + plane, mask=inside, other=0)
    target = tl.load(addresses + cell * cell_rows + row, mask=inside, other=0)
    target = target.to(tl.pointer_type(source.dtype.element_ty))
    tl.store(target + place, value, mask=inside)
