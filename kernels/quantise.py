"""One row of a cell (a layer's K or V): Hadamard transform over the channels, uniform quantisation, and back.

The transform turns each token's and head's channels, in blocks of the largest power of two that divides their number,
into coefficients that are spread evenly and nearly normal. A coefficient is `(q + m ÷ 2) · step`, q in ±127. Two ways
to scale: *per channel* (K: step and m of each head and coefficient over the tokens) and *per token* (V: step of each
token and head over the coefficients, m = 0). A step is the float32 whose bits are (base + code) << 21.

All arithmetic is float32 and float64 without contraction, in an order that is said, so that every machine gets the same
bits; `quantise_reference.py` is the same in plain NumPy. Threads: safe, no GIL. Raises nothing.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels.jit import kernel

CODE_SHIFT = 21
MIN_CODE, MAX_CODE = 108, 871
"""Steps of 2⁻¹⁰⁰ … 1.75 · 2⁹⁰: coefficients and their sums are neither infinite nor denormal."""
REACH = 127
MOST = 110.0
"""Steps are at least the largest deviation ÷ this: below 127 by what coding a step may take from it."""


def block_of(channels: int) -> int:
    """Channels that are transformed together: the largest power of two that divides their number."""
    return channels & -channels


@kernel
def _butterflies(low: np.ndarray, high: np.ndarray) -> None:
    for i in range(low.size):
        a = low[i]
        b = high[i]
        low[i] = a + b
        high[i] = a - b


@kernel
def hadamard(y: np.ndarray, block: int, vectors: int) -> None:
    """Transform `vectors` vectors at once, in place: y float32, channel c of vector v at c · vectors + v.

    Sums and differences of the channels (i, i + h) of a block, h = block ÷ 2 first, then its halves down to 1. Vectors
    lie side by side, so that all of it is sums of whole stretches of memory.
    """
    h = block // 2
    while h:
        stretch = h * vectors
        for first in range(0, y.size, 2 * stretch):
            _butterflies(y[first : first + stretch], y[first + stretch : first + 2 * stretch])
        h //= 2


@kernel
def channel_steps(y: np.ndarray, step: float, steps: np.ndarray, means: np.ndarray) -> None:
    """y: float32 [token, coefficient]. steps, means: float64 [coefficient], wanted steps and means over the tokens."""
    tokens, width = y.shape
    squares = np.zeros(width, np.float64)
    low = y[0].copy()
    high = y[0].copy()
    means[:] = 0.0
    for token in range(tokens):
        for j in range(width):
            x = y[token, j]
            wide = np.float64(x)
            means[j] += wide
            squares[j] += wide * wide
            low[j] = x if x < low[j] else low[j]
            high[j] = x if x > high[j] else high[j]
    for j in range(width):
        mean = means[j] / tokens
        variance = squares[j] / tokens - mean * mean
        means[j] = mean
        most = max(np.float64(high[j]) - mean, mean - np.float64(low[j]))
        wanted = step * np.sqrt(max(variance, 0.0))
        steps[j] = max(wanted, max(most, 2.0 * abs(mean)) / MOST) if np.isfinite(variance) else np.inf


@kernel
def token_steps(y: np.ndarray, step: float, steps: np.ndarray) -> None:
    """y: float32 [vector, coefficient]. steps: float64 [vector], `step` root mean squares.

    The sum of squares is of eight partial sums, of the coefficients i, i + 8, …; ((0+1)+(2+3))+((4+5)+(6+7)).
    """
    vectors, width = y.shape
    wanted = max(step, np.sqrt(np.float64(width)) / MOST)
    sums = np.empty(8, np.float64)
    for vector in range(vectors):
        sums[:] = 0.0
        whole = width - width % 8
        for first in range(0, whole, 8):
            for i in range(8):
                x = np.float64(y[vector, first + i])
                sums[i] += x * x
        for i in range(width - whole):
            x = np.float64(y[vector, whole + i])
            sums[i] += x * x
        total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]))
        steps[vector] = wanted * np.sqrt(total / width)


@kernel
def code_steps(steps: np.ndarray, codes: np.ndarray, coded: np.ndarray) -> int:
    """Code wanted steps, float64 [n], into `codes`, i8 [n]; `coded`, float32 [n], becomes what they decode to.

    Returns the base, or −1 where a step is too large or not finite. Codes are those of the nearest steps; the base is
    their mean, rounded down, but at least the largest less 127; what is below base − 127 becomes that.
    """
    bits = coded.view(np.uint32)
    total = np.int64(0)
    largest = np.int64(0)
    for i in range(steps.size):
        if not steps[i] <= 2.0**90:
            return -1
        coded[i] = np.float32(steps[i])
        code = (np.int64(bits[i]) + (1 << (CODE_SHIFT - 1))) >> CODE_SHIFT
        code = max(code, np.int64(MIN_CODE))
        bits[i] = np.uint32(code)
        total += code
        largest = max(largest, code)
    base = int(max(total // steps.size, largest - REACH))
    for i in range(steps.size):
        code = max(np.int64(bits[i]), np.int64(base - REACH))
        codes[i] = np.int8(code - base)
        bits[i] = np.uint32(code << CODE_SHIFT)
    return base


@kernel
def decode_steps(base: int, codes: np.ndarray, count: int, coded: np.ndarray) -> bool:
    """Undo: float32 steps of codes[:count]. False where one is out of range; `coded` is then undefined."""
    bits = coded.view(np.uint32)
    fine = True
    for i in range(count):
        code = np.int64(codes[i]) + base
        if code < MIN_CODE or code > MAX_CODE:
            fine = False
        bits[i] = np.uint32((code & 0x3FF) << CODE_SHIFT)
    return fine


@kernel
def code_means(means: np.ndarray, coded: np.ndarray, codes: np.ndarray) -> None:
    """codes: i8 [coefficient], means in half steps, nearest, ties to even, −127 … 127."""
    for i in range(means.size):
        m = np.rint(np.float32(means[i]) / (np.float32(0.5) * coded[i]))
        codes[i] = np.int8(min(max(m, np.float32(-REACH)), np.float32(REACH)))


@kernel
def quantise_span(y: np.ndarray, inverse: np.ndarray, shift: np.ndarray, q: np.ndarray) -> None:
    """q ← nearest of y · inverse − shift, ties to even, −127 … 127. All [n]: float32, float32, float32, i8."""
    magic = np.float32(12582912.0)  # 1.5 · 2²³: adding it leaves no place for a fraction
    top = np.float32(REACH)
    for i in range(y.size):
        t = y[i] * inverse[i] - shift[i]
        t = top if t > top else t
        t = -top if t < -top else t
        q[i] = np.int8(np.int32((t + magic) - magic))


@kernel
def quantise_scaled(y: np.ndarray, inverse: np.float32, q: np.ndarray) -> None:
    """The same with one step and no mean."""
    magic = np.float32(12582912.0)
    top = np.float32(REACH)
    for i in range(y.size):
        t = y[i] * inverse
        t = top if t > top else t
        t = -top if t < -top else t
        q[i] = np.int8(np.int32((t + magic) - magic))
