"""`cachegen_rows.py` written to be read: one row at a time, from the readable quantiser and coder. Slow; for tests.

Raises `ValueError` for a stream that is not whole or a step out of range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmcache_s3.kernels import quantise_reference as quantiser
from lmcache_s3.kernels import rans_reference as rans
from lmcache_s3.kernels.quantise import MAX_CODE, MIN_CODE


@dataclass
class Row:
    """base, tables of codes, means and values (means: 0 for V), stream."""

    base: int
    chosen: tuple[int, int, int]
    stream: rans.Stream


def encode_row(values: np.ndarray, step: float, *, per_token: bool) -> Row | None:
    """values: float32 [token, head, channel]; step: in standard deviations. None: it cannot be quantised."""
    done = quantiser.quantise(values, step, per_token=per_token)
    if done is None:
        return None
    codes, q = done.codes.ravel().tolist(), done.q.ravel().tolist()
    sampled = np.abs(done.q[::4].astype(int)).ravel().tolist()
    code_table, value_table = rans.choose_table([abs(c) for c in codes]), rans.choose_table(sampled)
    if done.means is None:
        stream = rans.encode([(codes, code_table), (q, value_table)])
        return Row(done.base, (code_table, 0, value_table), stream)
    means = done.means.ravel().tolist()
    mean_table = rans.choose_table([abs(m) for m in means])
    stream = rans.encode([(codes, code_table), (means, mean_table), (q, value_table)])
    return Row(done.base, (code_table, mean_table, value_table), stream)


def decode_row(row: Row, shape: tuple[int, int, int], *, per_token: bool) -> np.ndarray:
    """Float32 [token, head, channel] of this shape. Raises `ValueError`."""
    tokens, heads, channels = shape
    of_codes = (tokens, heads) if per_token else (heads, channels)
    stream = rans.Decoder(row.stream)

    def run(table: int, *shape: int) -> np.ndarray:
        return np.array(stream.run(table, int(np.prod(shape))), np.int8).reshape(shape)

    codes = run(row.chosen[0], *of_codes)
    code = codes.astype(int) + row.base
    if code.min() < MIN_CODE or code.max() > MAX_CODE:
        raise ValueError("a step out of range")
    means = None if per_token else run(row.chosen[1], *of_codes)
    q = run(row.chosen[2], *shape)
    stream.finish()
    return quantiser.dequantise(quantiser.Quantised(row.base, codes, means, q))
