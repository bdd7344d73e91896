"""How near `cachegen`'s cells come to what their own tables promise: stored bytes ÷ cross-entropy.

The cross-entropy of a symbol is log₂(4096 ÷ its table's frequency), of an escaped value 8 bits more. Stored bytes are
all of a cell but its header and the first tokens that are stored as they are: lanes' states, lengths, bases and tables
too. Raises `Unusable` for cells that are none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmcache_s3.codecs.base import CellSpec
from lmcache_s3.codecs.cachegen import read_cell
from lmcache_s3.codecs.header import HEADER_BYTES
from lmcache_s3.kernels.cachegen_rows import CODES, MEANS, VALUES, Rows
from lmcache_s3.kernels.rans import decode_run
from lmcache_s3.kernels.rans_tables import all_tables

_ESCAPED_BITS = 8


def shannon_gap(stored: Sequence[bytes], spec: CellSpec) -> float:
    """Of cells of one spec together; 1 is perfect."""
    held = bits = 0.0
    for cell in stored:
        exact, rows = read_cell(cell, spec, None)
        if rows is None:
            continue
        held += len(cell) - HEADER_BYTES - exact.nbytes
        tokens = spec.shape[2] - exact.shape[2]
        bits += sum(_row_bits(rows, row, spec, tokens) for row in range(len(rows.bases)))
    return held / (bits / 8)


def _row_bits(rows: Rows, row: int, spec: CellSpec, tokens: int) -> float:
    """Cross-entropy of a row's runs."""
    _, layers, _, heads, channels = spec.shape
    per_token, width = row >= layers, heads * channels
    runs = [(CODES, tokens * heads if per_token else width), (VALUES, tokens * width)]
    if not per_token:
        runs.insert(1, (MEANS, width))
    tables, states = all_tables(), rows.states[row].copy()
    place, end = int(rows.word_ends[row]), int(rows.word_ends[row + 1])
    escape_place, escape_end = int(rows.escape_ends[row]), int(rows.escape_ends[row + 1])
    total = _ESCAPED_BITS * float(escape_end - escape_place)
    for run, count in runs:
        t = int(rows.chosen[row, run])
        out = np.zeros(count + 2 + count % 2, np.int8)
        place, escape_place = decode_run(
            states, rows.words, place, end, tables.slots[t], tables.values[t], bool(tables.pairs[t]), rows.escapes,
            escape_place, escape_end, 0, out, out.view(np.uint16), count,
        )  # fmt: skip
        total += _run_bits(out[:count].astype(np.int64), t)
    return total


def _run_bits(q: np.ndarray, table: int) -> float:
    tables = all_tables()
    if tables.pairs[table]:
        a, b = np.append(q, np.zeros(len(q) % 2, np.int64)).reshape(-1, 2).T
        inside = (abs(a) <= 16) & (abs(b) <= 16)
        symbols = np.where(inside, tables.symbols[table][np.where(inside, (a + 16) * 33 + b + 16, 0)], 0)
    else:
        symbols = tables.symbols[table][q + 128]
    return float(np.log2(4096 / tables.frequencies[table][symbols]).sum())
