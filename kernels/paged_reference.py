"""Gather and scatter written to be read: what `paged.py` must do, element by element. For tests."""

from __future__ import annotations

import numpy as np


def gather(view: np.ndarray, index: np.ndarray, block_ids: list[int], first_head: int, out: np.ndarray) -> None:
    """view: [block, head, slot, content]; index: [kv, slot, channel] → flat place in a plane; out: [kv, token, head,
    channel]."""
    content = view.shape[3]
    for (s, t, h, d), _ in np.ndenumerate(out):
        block, slot = divmod(t, view.shape[2])
        place = index[s, slot, d]
        out[s, t, h, d] = view[block_ids[block], first_head + h, place // content, place % content]


def scatter(view: np.ndarray, index: np.ndarray, block_ids: list[int], first_head: int, cell: np.ndarray) -> None:
    """The same, the other way."""
    content = view.shape[3]
    for (s, t, h, d), value in np.ndenumerate(cell):
        block, slot = divmod(t, view.shape[2])
        place = index[s, slot, d]
        view[block_ids[block], first_head + h, place // content, place % content] = value
