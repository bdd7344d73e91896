"""Numbers taken apart and put together: the fast form against the readable one, every dtype, every bit pattern."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_s3.kernels import float_planes as fast
from lmcache_s3.kernels import float_planes_reference as reference
from lmcache_s3.kernels.float_planes import LAYOUTS


@settings(max_examples=60, deadline=None)
@given(
    kv_dtype=st.sampled_from(sorted(LAYOUTS)),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_both_forms_give_the_same(kv_dtype: str, rows: int, columns: int, seed: int) -> None:
    layout, rng = LAYOUTS[kv_dtype], np.random.default_rng(seed)
    items = rng.integers(0, 1 << layout.width, (rows, columns), np.uint64).astype(f"u{layout.width // 8}")
    bases = rng.integers(0, layout.max_base + 1, columns).astype(np.uint8)
    symbols, counts = np.empty((rows, columns), np.uint8), np.zeros((columns, layout.escape + 1), np.uint32)
    fast.split(items, bases, layout, symbols, counts)
    raw = np.empty(layout.raw_bytes(items.size), np.uint8)
    fast.pack(items, layout, raw)
    expected = [
        [reference.symbol_of(x, b, layout) for x, b in zip(row, bases.tolist(), strict=True)] for row in items.tolist()
    ]
    assert symbols.tolist() == expected
    for column in range(columns):
        assert (counts[column] == np.bincount(symbols[:, column], minlength=layout.escape + 1)).all()
    assert raw.tobytes() == reference.pack(items.reshape(-1).tolist(), layout)
    escapes = fast.escapes_of(items, symbols, int(counts[:, layout.escape].sum()), layout)
    raw.flags.writeable = False
    out = np.empty_like(items)
    assert fast.merge(symbols, bases, raw, escapes, layout, out) == len(escapes)
    assert (out == items).all()
    if len(escapes):
        assert fast.merge(symbols, bases, raw, escapes[:-1], layout, out) == len(escapes)
    unread, lower = iter(escapes.tolist()), reference.unpack(raw.tobytes(), items.size, layout)
    flat = [
        reference.bits_of(symbol, int(bases[i % columns]), lower[i], unread, layout)
        for i, symbol in enumerate(symbols.reshape(-1).tolist())
    ]
    assert flat == items.reshape(-1).tolist()


@pytest.mark.parametrize("kv_dtype", sorted(LAYOUTS))
def test_bases_put_normal_values_into_the_window(kv_dtype: str) -> None:
    layout = LAYOUTS[kv_dtype]
    values = np.random.default_rng(0).standard_normal((256, 3)).astype(np.float32) * np.array(
        [0.01, 1, 100], np.float32
    )
    if kv_dtype not in ("bfloat16", "float32"):
        return
    items = (values.view(np.uint32) >> (32 - layout.width)).astype(f"u{layout.width // 8}")
    symbols, counts = np.empty(items.shape, np.uint8), np.zeros((3, layout.escape + 1), np.uint32)
    fast.split(items, fast.mean_bases(items[None], layout)[0], layout, symbols, counts)
    assert counts[:, layout.escape].sum() <= 2
