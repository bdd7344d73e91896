"""Encoding `cachegen` rows on a GPU: transform, steps, rounding, choice of tables, coding. FORMAT.md §7.1.

The same bytes as `cachegen_rows.py`: the same float32 and float64 operations in the same order (callers must launch all
of this with `enable_fp_fusion=False`), sums of integers in any. What cannot be quantised shows in `failed`; everything
else about such a row is undefined, and nothing is written outside it.
"""

import triton
import triton.language as tl

from lmcache_s3.kernels.triton_cachegen import hadamard
from lmcache_s3.kernels.triton_rans import IDLE, LANES, PAIR_WIDTHS, WIDTHS, count_bits, vote

_MIN_CODE = tl.constexpr(108)
_REACH = tl.constexpr(127)
_TOP = tl.constexpr(127.0)
_CODE_SHIFT = tl.constexpr(21)
_HALF_CODE = tl.constexpr(1 << 20)
_MOST = tl.constexpr(110.0)
_LARGEST_STEP = tl.constexpr(2.0**90)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it leaves no place for a fraction
_TABLES = tl.constexpr(111)
_SAMPLED = tl.constexpr(4)


@triton.jit
def widen(x, bits: tl.constexpr, mantissa: tl.constexpr, bias: tl.constexpr, infinite: tl.constexpr):
    """The format's bits → float32; what is no finite number there is none here."""
    x = x.to(tl.uint32)
    if bits == 32:
        y = x
    elif bias == 127:
        y = x << 16
    else:
        magnitude = x & ((1 << (bits - 1)) - 1)
        scale: tl.constexpr = 2.0 ** (127 - bias)
        y = ((magnitude << (23 - mantissa)).to(tl.float32, bitcast=True) * scale).to(tl.uint32, bitcast=True)
        y = tl.where(magnitude >= infinite, 0x7F800000, y) | ((x >> (bits - 1)) << 31)
    return y.to(tl.float32, bitcast=True)


@triton.jit
def transform(
    addresses, places, exact, y, first_row, layers, cell_rows, tokens, head_stride, channel_stride, y_stride,
    heads: tl.constexpr, channels: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, INFINITE: tl.constexpr,
):  # fmt: skip
    """K or V → coefficients, y float32 [row, y_stride] (token, head, channel); programs, places as in `dequantise`."""
    width: tl.constexpr = heads * channels
    cell = tl.program_id(1) // layers
    row = cell.to(tl.int64) * cell_rows + first_row + tl.program_id(1) % layers
    uncoded = tl.load(exact + cell).to(tl.int32)
    start = (tl.program_id(0) * TILE + tl.arange(0, TILE)) * BLOCK
    inside = start < (tokens - uncoded) * width
    vector = start // channels
    within = tl.arange(0, BLOCK)[None, :]
    places += cell.to(tl.int64) * tokens + uncoded
    place = tl.load(places + vector // heads, mask=inside, other=0) + (vector % heads).to(tl.int64) * head_stride
    channel = (start % channels)[:, None] + within
    element: tl.constexpr = tl.uint32 if BITS == 32 else (tl.uint16 if BITS == 16 else tl.uint8)
    source = tl.load(addresses + row).to(tl.pointer_type(element))
    x = tl.load(source + place[:, None] + channel.to(tl.int64) * channel_stride, mask=inside[:, None], other=0)
    scale: tl.constexpr = 1.0 / BLOCK
    x = hadamard(widen(x, BITS, MANTISSA, BIAS, INFINITE), TILE, BLOCK, LEVELS) * scale
    tl.store(y + row * y_stride + start[:, None] + within, x, mask=inside[:, None])


@triton.jit
def channel_steps(
    y, exact, wanted, steps, means, layers, cell_rows, tokens, y_stride, side_stride, width: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Wanted steps and means of K's coefficients, float64 [row, side_stride]. Program = (tile, layer of a cell).

    wanted: float64 [row of a cell], in standard deviations.
    """
    cell = tl.program_id(1) // layers
    row = cell.to(tl.int64) * cell_rows + tl.program_id(1) % layers
    coded = tokens - tl.load(exact + cell).to(tl.int32)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = column < width
    y += row * y_stride + column
    total = tl.full([TILE], 0.0, tl.float64)
    squares = tl.full([TILE], 0.0, tl.float64)
    low = tl.load(y, mask=column < tl.where(coded > 0, width, 0), other=0.0)
    high = low
    for token in range(coded):
        x = tl.load(y + token * width, mask=inside, other=0.0)
        total += x.to(tl.float64)
        squares += x.to(tl.float64) * x.to(tl.float64)
        low = tl.where(x < low, x, low)
        high = tl.where(x > high, x, high)
    count = coded.to(tl.float64)
    mean = total / count
    variance = squares / count - mean * mean
    above = high.to(tl.float64) - mean
    below = mean - low.to(tl.float64)
    most = tl.where(above > below, above, below)
    doubled = 2.0 * tl.abs(mean)
    most = tl.where(most > doubled, most, doubled) / _MOST
    step = tl.load(wanted + row % cell_rows) * tl.sqrt(tl.where(variance > 0.0, variance, 0.0))
    step = tl.where(step > most, step, most)
    step = tl.where(tl.abs(variance) < float("inf"), step, float("inf"))
    tl.store(steps + row * side_stride + column, step, mask=inside)
    tl.store(means + row * side_stride + column, mean, mask=inside)


@triton.jit
def token_steps(
    y, exact, wanted, steps, layers, cell_rows, tokens, y_stride, side_stride,
    heads: tl.constexpr, channels: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Wanted steps of V's vectors, float64 [row, side_stride]. Program = (tile of vectors, layer of a cell).

    wanted: as in `channel_steps`, in root mean squares, and no less than √channels ÷ 110.
    """
    cell = tl.program_id(1) // layers
    row = cell.to(tl.int64) * cell_rows + layers + tl.program_id(1) % layers
    vectors = (tokens - tl.load(exact + cell).to(tl.int32)) * heads
    vector = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = vector < vectors
    place = y + row * y_stride + vector[:, None] * channels
    eight = tl.arange(0, 8)[None, :]
    sums = tl.full([TILE, 8], 0.0, tl.float64)
    for first in range(0, channels, 8):
        x = tl.load(place + first + eight, mask=inside[:, None] & (first + eight < channels), other=0.0)
        sums += x.to(tl.float64) * x.to(tl.float64)
    a, b = tl.split(tl.reshape(sums, (TILE, 4, 2)))
    a, b = tl.split(tl.reshape(a + b, (TILE, 2, 2)))
    a, b = tl.split(a + b)
    size: tl.constexpr = channels
    mean_square = (a + b) / tl.full([TILE], size, tl.float64)
    tl.store(steps + row * side_stride + vector, tl.load(wanted + row % cell_rows) * tl.sqrt(mean_square), mask=inside)


@triton.jit
def _code(steps, inside):
    """(codes of wanted steps, whether each can be coded): the nearest steps' that have two bits of mantissa."""
    bits = steps.to(tl.float32).to(tl.int32, bitcast=True)
    code = tl.maximum((bits + _HALF_CODE) >> _CODE_SHIFT, _MIN_CODE)
    fine = steps <= _LARGEST_STEP
    return tl.where(inside & fine, code, 0), fine | (inside == 0)


@triton.jit
def code_steps(
    steps, means, exact, codes, mean_codes, bases, failed, layers, cell_rows, tokens, heads, width, side_stride,
    TILE: tl.constexpr,
):  # fmt: skip
    """Wanted steps and means → codes, mean_codes i8 [row, side_stride], bases, failed i32 [row]: program = row."""
    row = tl.program_id(0).to(tl.int64)
    coded = tokens - tl.load(exact + row // cell_rows).to(tl.int32)
    per_token = row % cell_rows >= layers
    count = tl.where(per_token, coded * heads, width)
    n_means = tl.where(per_token, 0, width)
    steps += row * side_stride
    means += row * side_stride
    total = tl.full([], 0, tl.int64)
    largest = tl.full([], 0, tl.int32)
    wrong = tl.full([], 0, tl.int32)
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE)
        inside = index < count
        code, fine = _code(tl.load(steps + index, mask=inside, other=1.0), inside)
        total += tl.sum(code.to(tl.int64), axis=0)
        largest = tl.maximum(largest, tl.max(code, axis=0))
        wrong = tl.maximum(wrong, tl.max((fine == 0).to(tl.int32), axis=0))
    base = tl.maximum((total // tl.maximum(count, 1)).to(tl.int32), largest - _REACH)
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE)
        inside = index < count
        code, _ = _code(tl.load(steps + index, mask=inside, other=1.0), inside)
        code = tl.maximum(code, base - _REACH)
        tl.store(codes + row * side_stride + index, (code - base).to(tl.int8), mask=inside)
        step = (code << _CODE_SHIFT).to(tl.float32, bitcast=True)
        with_mean = index < n_means
        m = tl.load(means + index, mask=with_mean, other=0.0).to(tl.float32)
        m = tl.div_rn(m, step * 0.5)
        m = tl.where(m > _TOP, _TOP, tl.where(m < -_TOP, -_TOP, m))
        m = (m + _MAGIC) - _MAGIC
        tl.store(mean_codes + row * side_stride + index, m.to(tl.int32).to(tl.int8), mask=with_mean)
    tl.store(bases + row, base)
    tl.store(failed + row, tl.where(count > 0, wrong, 1))


@triton.jit
def quantise(
    y, codes, mean_codes, bases, exact, q, first_row, layers, cell_rows, tokens, y_stride, side_stride, q_stride,
    heads: tl.constexpr, channels: tl.constexpr, PER_TOKEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Coefficients → q i8 [row, q_stride]. Program = (tile of values, layer of a cell)."""
    width: tl.constexpr = heads * channels
    cell = tl.program_id(1) // layers
    row = cell.to(tl.int64) * cell_rows + first_row + tl.program_id(1) % layers
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = index < (tokens - tl.load(exact + cell).to(tl.int32)) * width
    at = row * side_stride + (index // channels if PER_TOKEN else index % width)
    code = tl.load(bases + row) + tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    step = (code << _CODE_SHIFT).to(tl.float32, bitcast=True)
    t = tl.load(y + row * y_stride + index, mask=inside, other=0.0) * tl.div_rn(tl.full([TILE], 1.0, tl.float32), step)
    if not PER_TOKEN:
        t = t - tl.load(mean_codes + at, mask=inside, other=0).to(tl.float32) * 0.5
    t = tl.where(t > _TOP, _TOP, t)
    t = tl.where(t < -_TOP, -_TOP, t)
    t = (t + _MAGIC) - _MAGIC
    tl.store(q + row * q_stride + index, t.to(tl.int32).to(tl.int8), mask=inside)


@triton.jit
def choose_tables(
    codes, mean_codes, q, exact, costs, chosen, layers, cell_rows, tokens, heads, width, side_stride, q_stride,
    TILE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The cheapest table of each run, chosen u8 [row, 3]: program = (row, run). costs: u32 [table, 128].

    Magnitudes are counted; of the values only one token in four.
    """
    row = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1)
    coded = tokens - tl.load(exact + row // cell_rows).to(tl.int32)
    per_token = row % cell_rows >= layers
    of_codes = tl.where(per_token, coded * heads, width)
    of_means = tl.where(per_token, 0, width)
    of_values = (coded + _SAMPLED - 1) // _SAMPLED * width
    count = tl.where(run == 0, of_codes, tl.where(run == 1, of_means, of_values))
    counted = tl.full([128], 0, tl.int32)
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE)
        inside = index < count
        if run == 0:
            v = tl.load(codes + row * side_stride + index, mask=inside, other=0)
        elif run == 1:
            v = tl.load(mean_codes + row * side_stride + index, mask=inside, other=0)
        else:
            sampled = index // width * (_SAMPLED * width) + index % width
            v = tl.load(q + row * q_stride + sampled, mask=inside, other=0)
        counted += tl.histogram(tl.abs(v.to(tl.int32)) & 127, 128)
    # Where a tile reached beyond the end it counted zeros.
    magnitude = tl.arange(0, 128)
    beyond = (count + TILE - 1) // TILE * TILE - count
    counts = (counted - tl.where(magnitude == 0, beyond, 0)).to(tl.int64)
    best = tl.full([], 2**62, tl.int64)
    for first in range(0, _TABLES, TOGETHER):
        table = first + tl.arange(0, TOGETHER)
        inside = table < _TABLES
        cost = tl.load(costs + table[:, None] * 128 + magnitude[None, :], mask=inside[:, None], other=0).to(tl.int64)
        total = tl.sum(cost * counts[None, :], axis=1) * 128 + table
        best = tl.minimum(best, tl.min(tl.where(inside, total, 2**62), axis=0))
    tl.store(chosen + row * 3 + run, (best & 127).to(tl.uint8))


@triton.jit
def encode_run(
    states, words, place, escapes, escape_place, symbols, frequencies, starts, table, values, count
):  # fmt: skip
    """Encode `count` values of a run, i8, last first; (states, place, escape_place), which go down."""
    lanes = tl.arange(0, LANES).to(tl.uint32)
    bit = tl.full([LANES], 1, tl.uint32) << lanes
    up_to = bit | (bit - 1)
    pairs = table % WIDTHS < PAIR_WIDTHS
    width = tl.where(pairs, 2, 1)
    reach = tl.where(pairs, 16, 128)
    paired = tl.full([LANES], 0, tl.int32) + width == 2
    n = tl.where(pairs, (count + 1) // 2, count)
    symbols += table * (33 * 33)
    steps = (n + LANES - 1) // LANES
    for done in range(steps):
        index = (steps - 1 - done) * LANES + lanes.to(tl.int32)
        active = index < n
        a = tl.load(values + index * width, mask=active, other=0).to(tl.int32)
        b = tl.load(values + index * width + 1, mask=active & (index * width + 1 < count), other=0).to(tl.int32)
        b = tl.where(paired, b, 0)
        at = tl.where(pairs, (a + 16) * 33 + b + 16, a + 128)
        narrow = (a <= reach) & (a >= -reach) & (b <= reach) & (b >= -reach)
        symbol = tl.load(symbols + at, mask=active & narrow, other=0).to(tl.int32)
        f = tl.load(frequencies + table * 256 + symbol)
        high = active & (states >= (f << 20))
        leaving = vote(high, lanes)
        total = count_bits(leaving).to(tl.int32)
        at = place - 1 - total + count_bits(leaving & up_to).to(tl.int32)
        tl.store(words + at, (states & 0xFFFF).to(tl.uint16), mask=high)
        place -= total
        x = tl.where(high, states >> 16, states)
        quotient = x // f
        x = (quotient << 12) + (x - quotient * f) + tl.load(starts + table * 256 + symbol)
        states = tl.where(active, x, states)
        escaped = active & (symbol == 0)
        escaping = vote(escaped, lanes)
        if escaping != 0:
            total = count_bits(escaping).to(tl.int32)
            at = escape_place - width * (1 + total - count_bits(escaping & up_to).to(tl.int32))
            tl.store(escapes + at, a.to(tl.int8), mask=escaped)
            tl.store(escapes + at + 1, b.to(tl.int8), mask=escaped & paired)
            escape_place -= width * total
    return states, place, escape_place


@triton.jit
def encode_rows(
    codes, mean_codes, q, chosen, exact, symbols, frequencies, starts, states, words, escapes, n_words, n_escapes,
    layers, cell_rows, tokens, heads, width, side_stride, q_stride, room,
):  # fmt: skip
    """Encode a row's runs, the last first: program = row; one warp. As in `decode_rows`, the other way round.

    symbols, frequencies, starts: `rans_tables.Tables`. Out: states u32 [row, 32]; words u16 [row, room] and escapes i8
    [row, room], of which the last n_words, n_escapes i32 [row] are the stream's. room: a place for each value.
    """
    row = tl.program_id(0).to(tl.int64)
    coded = tokens - tl.load(exact + row // cell_rows).to(tl.int32)
    per_token = row % cell_rows >= layers
    words += row * room
    escapes += row * room
    x = tl.full([LANES], IDLE, tl.uint32)
    place = room + tl.full([], 0, tl.int32)
    escape_place = place
    table = tl.load(chosen + row * 3 + 2).to(tl.int32)
    x, place, escape_place = encode_run(
        x, words, place, escapes, escape_place, symbols, frequencies, starts, table,
        q + row * q_stride, coded * width,
    )  # fmt: skip
    table = tl.load(chosen + row * 3 + 1).to(tl.int32)
    x, place, escape_place = encode_run(
        x, words, place, escapes, escape_place, symbols, frequencies, starts, table,
        mean_codes + row * side_stride, tl.where(per_token, 0, width),
    )  # fmt: skip
    table = tl.load(chosen + row * 3).to(tl.int32)
    x, place, escape_place = encode_run(
        x, words, place, escapes, escape_place, symbols, frequencies, starts, table,
        codes + row * side_stride, tl.where(per_token, coded * heads, width),
    )  # fmt: skip
    tl.store(states + row * LANES + tl.arange(0, LANES), x)
    tl.store(n_words + row, room - place)
    tl.store(n_escapes + row, room - escape_place)


@triton.jit
def pack(source, source_ends, ends, packed, TILE: tl.constexpr):
    """The last values of each stream's room in source → packed, one stream after another: program = stream.

    source_ends: int64 [stream], where the rooms end. ends: int64 [stream + 1], where a stream's values lie in packed.
    """
    stream = tl.program_id(0)
    first = tl.load(ends + stream)
    count = (tl.load(ends + stream + 1) - first).to(tl.int32)
    source += tl.load(source_ends + stream) - count
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        value = tl.load(source + index, mask=index < count, other=0)
        tl.store(packed + first + index, value, mask=index < count)


@triton.jit
def take_tokens(
    addresses, places, target, first_row, first, count, heads, channels, head_stride, channel_stride,
    TILE: tl.constexpr,
):  # fmt: skip
    """`place_tokens`, the other way round: into target, unsigned [row, count, head, channel]."""
    row = (first_row + tl.program_id(1)).to(tl.int64)
    size = count * heads * channels
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = index < size
    vector = index // channels
    place = tl.load(places + first + vector // heads, mask=inside, other=0)
    place += (vector % heads).to(tl.int64) * head_stride + (index % channels).to(tl.int64) * channel_stride
    source = tl.load(addresses + row).to(tl.pointer_type(target.dtype.element_ty))
    tl.store(target + row * size + index, tl.load(source + place, mask=inside, other=0), mask=inside)
