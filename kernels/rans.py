"""Entropy coding of quantised values: rANS with 32 interleaved lanes and static tables, one run after another.

A *run* is values that share a table; its symbol i (two values or one) belongs to lane i mod 32. A *stream* is the runs
of one row of a cell, 32 states of u32 ≥ 2¹⁶, u16 words that all lanes share, read forwards, and escaped values, i8.
Encoding goes backwards from state 2¹⁶ in every lane, so a decoder that ends with every lane at 2¹⁶ and nothing left has
read a whole stream: a cheap proof that nothing was cut or changed in length. So a GPU's warp decodes a stream, 32
symbols a step, and words go to the lanes that need one in the lanes' order.

These are the parts that the fused passes of `cachegen_rows.py` are made of: `rans_wide.py`, sixteen lanes an
instruction, where the processor has them, else `rans_scalar.py`. `rans_reference.py` is the same, written to be read;
all give the same bits. Threads: safe, no GIL. Raises nothing; `decode_run` answers for streams that are not whole.
After Duda (arXiv 1311.2540) and Giesen (arXiv 1402.3392).
"""

from __future__ import annotations

import numpy as np

from lmcache_s3.kernels import rans_scalar, rans_wide
from lmcache_s3.kernels.jit import kernel
from lmcache_s3.kernels.vectors import WIDE

LANES = 32
IDLE = 1 << 16
SPARE_WORDS = LANES
"""What must be readable behind a stream's words: a step is checked when it is done."""

decode_run = rans_wide.decode_run if WIDE else rans_scalar.decode_run
encode_run = rans_scalar.encode_run
encode_values = rans_wide.encode_values if WIDE else rans_scalar.encode_values
count_magnitudes = rans_wide.count_magnitudes if WIDE else rans_scalar.count_magnitudes


@kernel
def is_idle(states: np.ndarray) -> bool:
    for lane in range(states.size):  # noqa: SIM110 - Numba compiles no generator expression here
        if states[lane] != np.uint32(0x10000):
            return False
    return True


@kernel
def choose_table(histogram: np.ndarray, costs: np.ndarray) -> int:
    """The cheapest table for values of which `histogram`, int64 [128], has the magnitudes; of equals the first."""
    last = 0
    for k in range(histogram.size):
        if histogram[k]:
            last = k
    best = 0
    cheapest = np.int64(2**62)
    for table in range(costs.shape[0]):
        total = np.int64(0)
        for k in range(last + 1):
            total += histogram[k] * np.int64(costs[table, k])
        if total < cheapest:
            best = table
            cheapest = total
    return best
