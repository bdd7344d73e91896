"""Entropy coding of `cachegen` rows on a GPU: one warp a row's stream, one lane of the coder a thread. FORMAT.md §7.1.

The same streams as `rans.py`, bit for bit. A step decodes 32 symbols: each lane looks its slot up, and those whose
state fell below 2¹⁶ take words in the lanes' order; which word is a lane's is the number of lower lanes that want one,
counted in a mask. A step waits for two look-ups and one vote: some 200 cycles by the latencies of its instructions (an
estimate), so 0.6 (single values) to 1.1 GB/s (pairs) of bfloat16 a stream on an H100. 100 GB/s want one to two hundred
streams in flight, two to four cells of 64 rows: batch cells.

Reads never leave a row's own words and escaped values: what a broken stream asks for beyond them is read as 0, and the
row's status says so. Loops are as long as the shape says, whatever the stream holds.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(32)
IDLE = tl.constexpr(0x10000)
WHOLE = tl.constexpr(0)
NOT_WHOLE = tl.constexpr(1)
WIDTHS = tl.constexpr(37)
PAIR_WIDTHS = tl.constexpr(24)


@triton.jit
def count_bits(x):
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def vote(flags, lanes):
    """uint32: bit l is set where lane l's flag is."""
    return tl.sum(tl.where(flags, tl.full([LANES], 1, tl.uint32) << lanes, 0), axis=0)


@triton.jit
def decode_run(
    states, words, place, n_words, escapes, escape_place, n_escapes, slots, values, table, out, count
):  # fmt: skip
    """Decode `count` values of a run into `out` (i8, even address, a spare byte); (states, place, escape_place)."""
    lanes = tl.arange(0, LANES).to(tl.uint32)
    below = (tl.full([LANES], 1, tl.uint32) << lanes) - 1
    pairs = table % WIDTHS < PAIR_WIDTHS
    width = tl.where(pairs, 2, 1)
    symbols = tl.where(pairs, (count + 1) // 2, count)
    slots += table * 4096
    values += table * 256
    out_pairs = out.to(tl.pointer_type(tl.uint16))
    out_singles = out.to(tl.pointer_type(tl.uint8))
    for first in range(0, symbols, LANES):
        index = first + lanes.to(tl.int32)
        active = index < symbols
        entry = tl.load(slots + (states & 0xFFF))
        state = ((entry >> 12) & 0xFFF) * (states >> 12) + (entry & 0xFFF)
        low = active & (state < IDLE)
        wanting = vote(low, lanes)
        at = place + count_bits(wanting & below).to(tl.int32)
        word = tl.load(words + at, mask=low & (at < n_words), other=0).to(tl.uint32)
        states = tl.where(active, tl.where(low, (state << 16) | word, state), states)
        place += count_bits(wanting).to(tl.int32)
        symbol = entry >> 24
        value = tl.load(values + symbol)
        escaped = active & (symbol == 0)
        escaping = vote(escaped, lanes)
        if escaping != 0:
            at = escape_place + width * count_bits(escaping & below).to(tl.int32)
            a = tl.load(escapes + at, mask=escaped & (at < n_escapes), other=0).to(tl.uint16)
            b = tl.load(escapes + at + 1, mask=escaped & (at + 1 < n_escapes), other=0).to(tl.uint16)
            value = tl.where(escaped, a | (b << 8), value)
            escape_place += width * count_bits(escaping).to(tl.int32)
        if pairs:
            tl.store(out_pairs + index, value, mask=active)
        else:
            tl.store(out_singles + index, value.to(tl.uint8), mask=active)
    return states, place, escape_place


@triton.jit
def decode_rows(
    states, words, word_ends, escapes, escape_ends, chosen, exact, slots, values,
    codes, means, q, status, layers, cell_rows, tokens, heads, width, side_stride, q_stride,
):  # fmt: skip
    """Decode a row's runs: program = row, of all cells one after another; one warp.

    states u32 [row, 32], word_ends and escape_ends int64 [row + 1], chosen u8 [row, 3], exact u8 [cell] (1: one token
    of the cell's `tokens` is not coded), slots u32 [table, 4096], values u16 [table, 256]. Out: codes, means i8 [row,
    side_stride], q i8 [row, q_stride], strides even and with a spare byte; status i32 [row].
    """
    row = tl.program_id(0).to(tl.int64)
    coded = tokens - tl.load(exact + row // cell_rows).to(tl.int32)
    per_token = row % cell_rows >= layers
    first_word = tl.load(word_ends + row)
    n_words = (tl.load(word_ends + row + 1) - first_word).to(tl.int32)
    first_escape = tl.load(escape_ends + row)
    n_escapes = (tl.load(escape_ends + row + 1) - first_escape).to(tl.int32)
    words += first_word
    escapes += first_escape
    x = tl.load(states + row * LANES + tl.arange(0, LANES))
    n_codes = tl.where(per_token, coded * heads, width)
    n_means = tl.where(per_token, 0, width)
    place = tl.full([], 0, tl.int32)
    escape_place = tl.full([], 0, tl.int32)
    table = tl.load(chosen + row * 3).to(tl.int32)
    x, place, escape_place = decode_run(
        x, words, place, n_words, escapes, escape_place, n_escapes, slots, values, table,
        codes + row * side_stride, n_codes,
    )  # fmt: skip
    table = tl.load(chosen + row * 3 + 1).to(tl.int32)
    x, place, escape_place = decode_run(
        x, words, place, n_words, escapes, escape_place, n_escapes, slots, values, table,
        means + row * side_stride, n_means,
    )  # fmt: skip
    table = tl.load(chosen + row * 3 + 2).to(tl.int32)
    x, place, escape_place = decode_run(
        x, words, place, n_words, escapes, escape_place, n_escapes, slots, values, table,
        q + row * q_stride, coded * width,
    )  # fmt: skip
    busy = tl.sum((x != IDLE).to(tl.int32), axis=0)
    whole = (place == n_words) & (escape_place == n_escapes) & (busy == 0)
    tl.store(status + row, tl.where(whole, WHOLE, NOT_WHOLE))
