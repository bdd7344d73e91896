"""Which live extents should go: budgets, age, and never a chunk that nobody can reach.

Pure: NumPy over the columns of one state, no I/O, clock or randomness; the same in, the same out. An engine matches a
prompt from its first chunk on, so an extent whose parent is gone is dead weight. Therefore an extent counts as used
when any of its descendants was (*effective* access), and a descendant always goes before its ancestors: removing any
first part of what `choose` returns takes no kept extent's parent away.
A *tenant* is the root of the prefix chain (`root_hash(space_id, salt)`, first 16 bytes): whole trees belong to one.

Columns are untrusted: a parent that does not lie before its child in the prompt is no parent, so there are no cycles.
Raises nothing. Cost: O(n log n) and some dozen arrays of n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np

from lmcache_s3.types import HASH_BYTES

__all__ = ["Columns", "Limits", "Victims", "Why", "choose"]

Ints = np.ndarray
"""int64, one row a live extent."""


class Columns(Protocol):
    """Live extents as arrays, one row each, in the order of first add (`columns.columns_of`).

    parent_row: row of the extent that holds the chunk before the first; −1 at token 0; −2 if nobody live holds it.
    root: 16 bytes, the chain's root where first_token is 0, else zero. created, last_access: versions. covered: bool,
    every chunk of it is in live extents added before.
    """

    @property
    def encoded_bytes(self) -> Ints: ...
    @property
    def first_token(self) -> Ints: ...
    @property
    def created(self) -> Ints: ...
    @property
    def last_access(self) -> Ints: ...
    @property
    def parent_row(self) -> Ints: ...
    @property
    def root(self) -> np.ndarray: ...
    @property
    def covered(self) -> np.ndarray: ...


class Why(IntEnum):
    """Why an extent should go; of several reasons the first."""

    DAMAGED = 1
    COVERED = 2
    """Every chunk of it is in live extents added before."""
    UNREACHABLE = 3
    """Nobody live holds the chunk before it, or before an ancestor of it."""
    UNUSED = 4
    """Neither it nor a descendant was used within the time to live."""
    TENANT_BUDGET = 5
    BUDGET = 6


@dataclass(frozen=True, slots=True)
class Limits:
    """None: no such limit. Bytes are encoded bytes of live extents (a shard's index and zarr.json are not counted).

    unused_since: extents last used at or before this version go. tenant_bytes: budgets by root (16 bytes);
    default_tenant_bytes: of every other tenant. unreachable_since: extents that nobody can reach go if they and all
    their descendants were added at or before this version (their parent may be on its way).
    """

    max_bytes: int | None = None
    tenant_bytes: Mapping[bytes, int] = field(default_factory=dict)
    default_tenant_bytes: int | None = None
    unused_since: int = 0
    unreachable_since: int = 0


@dataclass(frozen=True, slots=True)
class Victims:
    """rows: int64, in the order of removal, descendants first. why: uint8 of `Why`, as long. freed_bytes: of them."""

    rows: Ints
    why: np.ndarray
    freed_bytes: int

    def __len__(self) -> int:
        return len(self.rows)


def choose(columns: Columns, limits: Limits, *, damaged: np.ndarray | None = None) -> Victims:
    """What to remove. damaged: bool, one a row; None: none is."""
    n = len(columns.first_token)
    why = np.zeros(n, np.uint8)
    if n == 0:
        return Victims(np.zeros(0, np.int64), why, 0)
    parent = _true_parents(columns, damaged)
    access = _over_descendants(columns.last_access, parent)
    order = _removal_order(access, columns.first_token)
    if damaged is not None:
        why[damaged] = Why.DAMAGED
    has_children = np.zeros(n, bool)
    has_children[parent[parent >= 0]] = True
    _mark(why, columns.covered & ~has_children, Why.COVERED)
    top = _tops(parent)
    stranded = parent[top] == -2
    youngest = _over_descendants(columns.created, parent)
    _mark(why, stranded & (youngest <= limits.unreachable_since), Why.UNREACHABLE)
    _mark(why, access <= limits.unused_since, Why.UNUSED)
    over = _over_tenant_budgets(columns, limits, order, top, stranded, kept=why == 0)
    _mark(why, over, Why.TENANT_BUDGET)
    if limits.max_bytes is not None:
        kept = order[why[order] == 0]
        rest_bytes = columns.encoded_bytes[kept][::-1].cumsum()[::-1]
        why[kept[rest_bytes > limits.max_bytes]] = Why.BUDGET
    rows = order[why[order] != 0]
    return Victims(rows, why[rows], int(columns.encoded_bytes[rows].sum()))


def _mark(why: np.ndarray, which: np.ndarray, reason: Why) -> None:
    why[which & (why == 0)] = reason


def _true_parents(columns: Columns, damaged: np.ndarray | None) -> Ints:
    """parent_row, −2 where that is no parent: not before its child in the prompt, or about to go as damaged."""
    n = len(columns.first_token)
    parent = np.where((columns.parent_row >= n) | (columns.parent_row < -2), -2, columns.parent_row).astype(np.int64)
    parent[(parent == -1) & (columns.first_token != 0)] = -2
    linked = np.flatnonzero(parent >= 0)
    above = parent[linked]
    bad = columns.first_token[above] >= columns.first_token[linked]
    if damaged is not None:
        bad |= damaged[above]
    parent[linked[bad]] = -2
    return parent


def _over_descendants(values: Ints, parent: Ints) -> Ints:
    """The largest value among each row and its descendants. Doubling: after step k, among those nearer than 2^k."""
    out = values.astype(np.int64, copy=True)
    ancestor = parent.copy()
    while True:
        rows = np.flatnonzero(ancestor >= 0)
        if len(rows) == 0:
            return out
        np.maximum.at(out, ancestor[rows], out[rows])
        ancestor[rows] = _twice_as_far(ancestor, rows)


def _twice_as_far(ancestor: Ints, rows: Ints) -> Ints:
    """The ancestors of `rows`, twice as far away; negative beyond the top."""
    out: Ints = ancestor[ancestor[rows]]
    return out


def _tops(parent: Ints) -> Ints:
    """The row at the top of each row's chain."""
    top: Ints = np.where(parent >= 0, parent, np.arange(len(parent)))
    while True:
        further = top[top]
        if np.array_equal(further, top):
            return top
        top = further


def _removal_order(access: Ints, first_token: Ints) -> Ints:
    """Rows, first to go first: least recently used; of those the latest in its prompt; of those the youngest."""
    order: Ints = np.lexsort((-np.arange(len(access)), -first_token, access))
    return order


def _over_tenant_budgets(
    columns: Columns, limits: Limits, order: Ints, top: Ints, stranded: np.ndarray, kept: np.ndarray
) -> np.ndarray:
    """Rows that their tenant has no room for. Extents that nobody can reach belong to no tenant."""
    over = np.zeros(len(order), bool)
    if limits.default_tenant_bytes is None and not limits.tenant_bytes:
        return over
    rows = order[kept[order] & ~stranded[order]]
    roots, tenant = np.unique(_halves(columns.root[top[rows]]), axis=0, return_inverse=True)
    budgets = _budgets(limits, roots)
    by_tenant = np.argsort(tenant, kind="stable")
    rows, tenant = rows[by_tenant], tenant[by_tenant]
    upto_bytes = columns.encoded_bytes[rows].cumsum()
    ends = np.searchsorted(tenant, np.arange(len(roots)), side="right") - 1
    rest_bytes = upto_bytes[ends][tenant] - upto_bytes + columns.encoded_bytes[rows]
    over[rows[rest_bytes > budgets[tenant]]] = True
    return over


def _halves(roots: np.ndarray) -> np.ndarray:
    """16-byte roots as [row, 2] big-endian u64."""
    return np.ascontiguousarray(roots).view(">u8").reshape(-1, 2)


def _budgets(limits: Limits, roots: np.ndarray) -> Ints:
    """Budget of each root [root, 2]."""
    unlimited = np.iinfo(np.int64).max
    default = unlimited if limits.default_tenant_bytes is None else limits.default_tenant_bytes
    budgets = np.full(len(roots), default, np.int64)
    for i in range(len(roots)) if limits.tenant_bytes else ():
        root = roots[i].tobytes()
        assert len(root) == HASH_BYTES
        budgets[i] = limits.tenant_bytes.get(root, default)
    return budgets
