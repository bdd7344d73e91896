"""Many extents' names at once, from text to numbers: what `types.ExtentName.parse` does for one.

Threads: safe, no GIL. Raises nothing; `parse` says which name is none.
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels.jit import kernel

_HASH_DIGITS = 32


_DIGITS = np.full(256, 16, np.uint8)
"""Value of each lower-case hex digit; 16 for any other character."""
_DIGITS[48:58] = np.arange(10)
_DIGITS[97:103] = np.arange(10, 16)


@kernel
def _hash(text: np.ndarray, at: np.int64, out: np.ndarray) -> bool:
    """32 hex digits to 16 bytes."""
    wrong = np.uint8(0)
    for i in range(out.size):
        high, low = _DIGITS[text[at + 2 * i]], _DIGITS[text[at + 2 * i + 1]]
        wrong |= high | low
        out[i] = 16 * high + low
    return bool(wrong < 16)


@kernel
def _number(text: np.ndarray, at: np.int64, end: np.int64, most: int) -> np.int64:
    """A decimal number without leading zeros, at most `most`; else −1."""
    if at >= end or end - at > 19 or (text[at] == 48 and end - at > 1):
        return np.int64(-1)
    value = np.uint64(0)
    for i in range(at, end):
        if not 48 <= text[i] <= 57:
            return np.int64(-1)
        value = value * np.uint64(10) + np.uint64(text[i] - 48)
    return np.int64(value) if value <= np.uint64(most) else np.int64(-1)


@kernel
def parse(
    text: np.ndarray,
    offsets: np.ndarray,
    codec_text: np.ndarray,
    codec_offsets: np.ndarray,
    most_chunks: int,
    most_born: int,
    last: np.ndarray,
    chunks: np.ndarray,
    born: np.ndarray,
    nonce: np.ndarray,
) -> np.int64:
    """Parse `<32 hex>.<chunks>.<codec>.<born>-<32 hex>`. Returns −1, or the first that is none or has another codec.

    text, codec_text: u8; offsets, codec_offsets: i32 [n + 1] into them, as in an Arrow string column. last, nonce: u8
    [n, 16]; chunks (1 … most_chunks), born (0 … most_born): i64 [n]. Whether a codec's text is one is not judged here.
    """
    for i in range(chunks.size):
        at, end = np.int64(offsets[i]), np.int64(offsets[i + 1])
        dot = at + _HASH_DIGITS
        dash = end - _HASH_DIGITS - 1
        if dash <= dot or text[dot] != 46 or text[dash] != 45:
            return np.int64(i)
        if not _hash(text, at, last[i]) or not _hash(text, dash + 1, nonce[i]):
            return np.int64(i)
        second = dot + 1
        while second < dash and text[second] != 46:
            second += 1
        first_of_codec = np.int64(codec_offsets[i])
        n_codec = np.int64(codec_offsets[i + 1]) - first_of_codec
        third = second + 1 + n_codec
        if third >= dash or text[third] != 46:
            return np.int64(i)
        for j in range(n_codec):
            if text[second + 1 + j] != codec_text[first_of_codec + j]:
                return np.int64(i)
        chunks[i] = _number(text, dot + 1, second, most_chunks)
        born[i] = _number(text, third + 1, dash, most_born)
        if chunks[i] < 1 or born[i] < 0:
            return np.int64(i)
    return np.int64(-1)
