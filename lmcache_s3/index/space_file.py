"""`spaces/<space_id>/space.json`: says in the bucket what a space id stands for (FORMAT.md §2).

Invariant: an index is opened only on a space whose file, if there, has this very identity.
Raises `Unsafe(foreign_space)`, and the store's errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache_s3.errors import Missing, Unavailable, Unsafe, Unusable
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import Outcome, space_prefix

if TYPE_CHECKING:
    from lmcache_s3.identity import Space

MAX_SPACE_BYTES = 2**20


def space_key(space_id: str) -> str:
    return f"{space_prefix(space_id)}space.json"


def ensure_space(store: ObjectStore, space: Space, *, read_only: bool = False) -> None:
    """Create the space's file, or check the one that is there. Read-only: a missing file is an empty space."""
    if _check(store, space) or read_only:
        return
    if store.create(space_key(space.id), space.to_json()) is Outcome.WON:
        return
    if not _check(store, space):
        key = space_key(space.id)
        raise Unavailable(f"{store.url}: {key} could neither be created nor read", key=key)


def _check(store: ObjectStore, space: Space) -> bool:
    """Whether the file is there; raises if it is not of this space."""
    key = space_key(space.id)
    try:
        found = type(space).from_json(store.get(key, limit_bytes=MAX_SPACE_BYTES))
    except Missing:
        return False
    except Unusable as e:
        raise Unsafe(
            f"{store.url}: {key} is not readable as a space ({e}); restore it, or use another root",
            kind="foreign_space",
            key=key,
        ) from e
    if found.id != space.id:
        raise Unsafe(
            f"{store.url}: {key} describes another space ({found.id[:12]}…, model {found.model!r}); "
            f"somebody copied or edited it: restore it, or use another root",
            kind="foreign_space",
            key=key,
        )
    return True
