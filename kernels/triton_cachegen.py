"""Quantising `cachegen` rows on a GPU: transform, steps and rounding, from and to wherever K and V lie. FORMAT.md §7.1.

The same results as `quantise.py` and `cachegen_rows.py`, bit for bit: the same float32 operations in the same order, so
callers must launch all of this with `enable_fp_fusion=False`. Rows are found by their addresses, a token's place in
them by a table, so that an engine's paged blocks are read and written as they are (`device_cachegen.Places`).

A kv dtype is given by its bits, its mantissa's bits, its exponent's bias and its largest number (as float32 bits).
"""

import triton
import triton.language as tl

STEP_OUT_OF_RANGE = tl.constexpr(2)
_MIN_CODE = tl.constexpr(108)
_MAX_CODE = tl.constexpr(871)


@triton.jit
def hadamard(y, tile: tl.constexpr, block: tl.constexpr, levels: tl.constexpr):
    """y: float32 [tile, block], block = 2^levels. Sums and differences of (i, i + h), h = block ÷ 2 down to 1.

    Each pass takes the index's highest bit out and puts it back as the lowest: after all of them, they stand as before.
    """
    for _ in tl.static_range(levels):
        a, b = tl.split(tl.permute(tl.reshape(y, (tile, 2, block // 2)), (0, 2, 1)))
        y = tl.reshape(tl.join(a + b, a - b), (tile, block))
    return y


@triton.jit
def narrow_bits(y, bits: tl.constexpr, mantissa: tl.constexpr, bias: tl.constexpr, largest: tl.constexpr):
    """float32 → the bits of the format, clipped to its largest number (given as float32 bits), to nearest even."""
    x = y.to(tl.uint32, bitcast=True)
    if bits == 32:
        narrow = x
    else:
        shift: tl.constexpr = 23 - mantissa
        a = tl.minimum(x & 0x7FFFFFFF, largest)
        narrow = (a + ((1 << (shift - 1)) - 1) + ((a >> shift) & 1)) >> shift
        if bias != 127:
            # The number added leaves no place for what is below the format's smallest: the sum's low bits count those.
            magic: tl.constexpr = (127 + 1 - bias - mantissa + 23) << 23
            counted = a.to(tl.float32, bitcast=True) + tl.full([], magic, tl.uint32).to(tl.float32, bitcast=True)
            small = counted.to(tl.uint32, bitcast=True) - magic
            narrow = tl.where(a < ((128 - bias) << 23), small, narrow - ((127 - bias) << mantissa))
        narrow |= (x >> 31) << (bits - 1)
    return narrow.to(tl.uint32 if bits == 32 else (tl.uint16 if bits == 16 else tl.uint8))


@triton.jit
def dequantise(
    codes, means, q, bases, exact, status, addresses, places, first_row,
    layers, cell_rows, tokens, head_stride, channel_stride, side_stride, q_stride,
    heads: tl.constexpr, channels: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """q, codes, means (as `decode_rows` leaves them) → K or V where they belong.

    Program = (tile of TILE blocks of BLOCK channels, layer of a cell); PER_TOKEN says which plane, first_row where its
    rows begin in a cell. bases u16 [row]; addresses int64 [cell, row]; places int64 [cell, token], in elements; status
    i32 [row] becomes `STEP_OUT_OF_RANGE` where a step is.
    """
    width: tl.constexpr = heads * channels
    cell = tl.program_id(1) // layers
    row = cell.to(tl.int64) * cell_rows + first_row + tl.program_id(1) % layers
    uncoded = tl.load(exact + cell).to(tl.int32)
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    start = block * BLOCK
    inside = (start < (tokens - uncoded) * width)[:, None]
    within = tl.arange(0, BLOCK)[None, :]
    vector = start // channels
    base = tl.load(bases + row).to(tl.int32)
    if PER_TOKEN:
        code = tl.load(codes + row * side_stride + vector[:, None], mask=inside, other=0).to(tl.int32) + base
        known = inside
        y = tl.load(q + row * q_stride + start[:, None] + within, mask=inside, other=0).to(tl.float32)
    else:
        column = (start % width)[:, None] + within
        code = tl.load(codes + row * side_stride + column, mask=inside, other=0).to(tl.int32) + base
        known = inside & (within >= 0)
        m = tl.load(means + row * side_stride + column, mask=inside, other=0).to(tl.float32)
        y = tl.load(q + row * q_stride + start[:, None] + within, mask=inside, other=0).to(tl.float32) + m * 0.5
    wrong = known & ((code < _MIN_CODE) | (code > _MAX_CODE))
    tl.store(status + row + tl.zeros_like(code), STEP_OUT_OF_RANGE, mask=wrong)
    y = y * ((code & 0x3FF) << 21).to(tl.float32, bitcast=True)
    narrow = narrow_bits(hadamard(y, TILE, BLOCK, LEVELS), BITS, MANTISSA, BIAS, LARGEST)
    place = tl.load(
        places + cell.to(tl.int64) * tokens + uncoded + vector // heads,
        mask=start < (tokens - uncoded) * width,
        other=0,
    )
    place += (vector % heads).to(tl.int64) * head_stride
    channel = (start % channels)[:, None] + within
    element: tl.constexpr = tl.uint32 if BITS == 32 else (tl.uint16 if BITS == 16 else tl.uint8)
    target = tl.load(addresses + row).to(tl.pointer_type(element))
    tl.store(target + place[:, None] + channel.to(tl.int64) * channel_stride, narrow, mask=inside)


@triton.jit
def place_tokens(
    source, addresses, places, first_row, first, count, heads, channels, head_stride, channel_stride,
    TILE: tl.constexpr,
):  # fmt: skip
    """Copy tokens first … first + count − 1 that are stored as they are: program = (tile of values, layer of one cell).

    source: unsigned [row, count, head, channel]; addresses int64 [row], places int64 [token], of this cell and plane.
    """
    row = (first_row + tl.program_id(1)).to(tl.int64)
    size = count * heads * channels
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = index < size
    vector = index // channels
    value = tl.load(source + row * size + index, mask=inside, other=0)
    place = tl.load(places + first + vector // heads, mask=inside, other=0)
    place += (vector % heads).to(tl.int64) * head_stride + (index % channels).to(tl.int64) * channel_stride
    target = tl.load(addresses + row).to(tl.pointer_type(source.dtype.element_ty))
    tl.store(target + place, value, mask=inside)
