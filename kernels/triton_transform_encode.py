"""Encoding `transform` cells on a GPU: what is multiplied, and the streams of what came out. FORMAT.md §7.3.

The product between the two is torch's (`device_transform_encode`). Values that it gets are those of
`transform_reference.centred`, bit for bit (callers must launch with `enable_fp_fusion=False`); streams are coded as
`triton_encode.py` codes rows. Nothing is written outside the rooms the callers give.
"""

import triton
import triton.language as tl

from lmcache_s3.kernels.triton_encode import encode_run, widen
from lmcache_s3.kernels.triton_rans import IDLE, LANES


@triton.jit
def centre(
    addresses, places, cosine, sine, mean, x, of_row, of_head, of_turned, of_start, of_width, of_within,
    cells, tokens, cell_rows, layers, pairs, head_stride, channel_strides,
    channels: tl.constexpr, PARTS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, INFINITE: tl.constexpr,
):  # fmt: skip
    """Values, turned back, less their mean. Program = (tile of tokens · PARTS + part, vector, cell).

    x: float32, unit after unit [cell, token, value of the unit]: a vector's unit begins at its value of_start times
    cells · tokens, is of_width wide, and the vector lies of_within it; int64 [vector]. Others as in `write_values`.
    """
    vector = tl.program_id(1)
    cell = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) // PARTS * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(0) % PARTS * HALF + tl.arange(0, HALF)
    low = tl.where(k < pairs, k, 2 * k)
    high = tl.where(k < pairs, k + pairs, 2 * k + 1)
    inside = (token < tokens)[:, None]
    row = tl.load(of_row + vector)
    element: tl.constexpr = tl.uint32 if BITS == 32 else (tl.uint16 if BITS == 16 else tl.uint8)
    source = tl.load(addresses + cell * cell_rows + row).to(tl.pointer_type(element))
    place = tl.load(places + (row // layers * cells + cell) * tokens + token, mask=token < tokens, other=0)
    place += tl.load(of_head + vector).to(tl.int64) * head_stride
    step = tl.load(channel_strides + row // layers)
    with_low, with_high = inside & (low < channels)[None, :], inside & (high < channels)[None, :]
    a = tl.load(source + place[:, None] + low[None, :] * step, mask=with_low, other=0)
    b = tl.load(source + place[:, None] + high[None, :] * step, mask=with_high, other=0)
    a = widen(a, BITS, MANTISSA, BIAS, INFINITE)
    b = widen(b, BITS, MANTISSA, BIAS, INFINITE)
    angle = (cell * tokens + token)[:, None] * pairs + k[None, :]
    turning = inside & (k < tl.load(of_turned + vector))[None, :]
    c = tl.load(cosine + angle, mask=turning, other=1.0)
    s = tl.load(sine + angle, mask=turning, other=0.0)
    first = tl.where(turning, a * c + b * s, a)
    second = tl.where(turning, b * c - a * s, b)
    at = vector * channels
    first = first - tl.load(mean + at + low, mask=low < channels, other=0.0)[None, :]
    second = second - tl.load(mean + at + high, mask=high < channels, other=0.0)[None, :]
    width = tl.load(of_width + vector)
    target = x + tl.load(of_start + vector) * cells * tokens + tl.load(of_within + vector)
    target += (cell * tokens + token)[:, None] * width
    tl.store(target + low[None, :], first, mask=with_low)
    tl.store(target + high[None, :], second, mask=with_high)


@triton.jit
def encode_streams(
    q, counts, run_starts, run_tables, run_rows, run_units, rooms, symbols, frequencies, starts,
    states, words, escapes, n_words, n_escapes, streams, units, coefficients, q_stride,
):  # fmt: skip
    """Encode a stream's runs, the last first: program = stream, of all cells one after another; one warp.

    q, counts, runs as in `triton_transform.decode_streams`; symbols, frequencies, starts: `rans_tables.Tables`. rooms:
    int64 [streams + 1], where each of a cell's has its places for words and escapes; the last, a cell's in all. Out:
    states u32 [stream, 32]; words u16, escapes i8, of each room the last n_words, n_escapes i32 [stream].
    """
    program = tl.program_id(0).to(tl.int64)
    cell = program // streams
    stream = program % streams
    first = tl.load(rooms + stream)
    room = (tl.load(rooms + stream + 1) - first).to(tl.int32)
    first += cell * tl.load(rooms + streams)
    words += first
    escapes += first
    x = tl.full([LANES], IDLE, tl.uint32)
    place = room + tl.full([], 0, tl.int32)
    escape_place = place
    begin = tl.load(run_starts + stream)
    end = tl.load(run_starts + stream + 1)
    for done in range(end - begin):
        run = end - 1 - done
        table = tl.load(run_tables + run).to(tl.int32)
        count = tl.load(counts + cell * units + tl.load(run_units + run))
        values = q + (cell * coefficients + tl.load(run_rows + run)) * q_stride
        x, place, escape_place = encode_run(
            x, words, place, escapes, escape_place, symbols, frequencies, starts, table, values, count
        )
    tl.store(states + program * LANES + tl.arange(0, LANES), x)
    tl.store(n_words + program, room - place)
    tl.store(n_escapes + program, room - escape_place)


@triton.jit
def take_vectors(
    target, of_cell, of_row, of_head, of_token, addresses, places, count, channels, cells, tokens, cell_rows, layers,
    head_stride, channel_strides, TILE: tl.constexpr,
):  # fmt: skip
    """`triton_transform.place_vectors`, the other way round: into target, unsigned [vector, channel]."""
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    vector = index // channels
    inside = vector < count
    cell = tl.load(of_cell + vector, mask=inside, other=0).to(tl.int64)
    row = tl.load(of_row + vector, mask=inside, other=0)
    plane = row // layers
    token = tl.load(of_token + vector, mask=inside, other=0)
    place = tl.load(places + (plane * cells + cell) * tokens + token, mask=inside, other=0)
    place += tl.load(of_head + vector, mask=inside, other=0).to(tl.int64) * head_stride
    place += (index % channels).to(tl.int64) * tl.load(channel_strides + plane, mask=inside, other=0)
    source = tl.load(addresses + cell * cell_rows + row, mask=inside, other=0)
    source = source.to(tl.pointer_type(target.dtype.element_ty))
    tl.store(target + index, tl.load(source + place, mask=inside, other=0), mask=inside)
