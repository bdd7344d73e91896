"""What lies under a root: its spaces, found without listing their extents, and their indexes opened to read or to tend.

Costs one LIST and one GET a space. Raises the store's `Unavailable` and `Invalid`; a space that cannot be read is
reported in its place, never raised.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

from ulid import ULID

from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.identity import MAX_SPACE_JSON_BYTES, Space
from lmcache_s3.index.log import Log
from lmcache_s3.index.service import Index, IndexSettings
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import space_prefix

_ALL = "spaces/"
_AFTER_SLASH = "0"
"""The character after `/`: `spaces/<id>0` sorts behind everything of a space."""


@dataclass(frozen=True, slots=True)
class FoundSpace:
    """A folder under spaces/. space: None if its space.json cannot be used, and then `problem` says why."""

    id: str
    space: Space | None
    problem: str | None


def list_spaces(store: ObjectStore) -> Iterator[FoundSpace]:
    """Every space, in order of id."""
    after = ""
    while True:
        first = next(iter(store.list(_ALL, start_after=after, limit=1)), None)
        if first is None:
            return
        space_id = first.key.removeprefix(_ALL).partition("/")[0]
        after = f"{_ALL}{space_id}{_AFTER_SLASH}"
        if first.key != _ALL + space_id:
            yield read_space(store, space_id)


def read_space(store: ObjectStore, space_id: str) -> FoundSpace:
    """A space by its id."""
    try:
        data = store.get(f"{space_prefix(space_id)}space.json", limit_bytes=MAX_SPACE_JSON_BYTES)
        space = Space.from_json(data)
    except Unusable as e:
        return FoundSpace(space_id, None, str(e))
    if space.id != space_id:
        return FoundSpace(space_id, None, f"space.json is of another space, {space.id}")
    return FoundSpace(space_id, space, None)


def find_space(store: ObjectStore, start_of_id: str) -> Space:
    """The one space whose id begins so. Raises `Invalid` if there is none, several, or it cannot be read."""
    found = [entry for entry in list_spaces(store) if entry.id.startswith(start_of_id)]
    if len(found) != 1:
        what = "no space" if not found else f"{len(found)} spaces"
        raise Invalid(f"{start_of_id!r}: {what} of that id in {store.url}; see lmcache-s3 ls", kind="argument")
    if found[0].space is None:
        raise Invalid(f"space {found[0].id}: {found[0].problem}", kind="argument")
    return found[0].space


@contextmanager
def reading(store: ObjectStore, space: Space) -> Iterator[Index]:
    """The space's index as of now; reads only, no threads."""
    index = Index.open(store, space, settings=IndexSettings(read_only=True), background=False)
    try:
        yield index
    finally:
        index.close()


def tending(store: ObjectStore, space: Space, executor: Executor | None = None) -> Log:
    """The space's log, caught up, in the caller's thread: for collecting and for checkpoints. executor: reads ahead."""
    log = Log(
        store,
        space.id,
        writer=str(ULID()),
        sleep=time.sleep,
        rng=random.Random(secrets.randbits(64)),
        nonce=lambda: secrets.token_hex(16),
        readers=executor,
    )
    log.open()
    return log


def chosen_spaces(store: ObjectStore, start_of_id: str | None) -> list[Space]:
    """The one space whose id begins so; None: all that can be read. Raises `Invalid` where there is none."""
    if start_of_id is not None:
        return [find_space(store, start_of_id)]
    found = [entry.space for entry in list_spaces(store) if entry.space is not None]
    if not found:
        raise Invalid(f"{store.url}: nothing is cached here yet", kind="argument")
    return found
