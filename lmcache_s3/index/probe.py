"""Does put-if-absent hold? Asked of the store itself, by racing creators, before anybody shares it.

Calling create twice in a row proves nothing: stores whose create is "look, then write" pass that and let two racers
win. So several creators with different bodies race for each of a few fresh keys; exactly one may win, and what is read
back must be the winner's. A race without a clear winner (lost answers) proves nothing.
Raises `Unsafe(no_put_if_absent)` naming the store and the mend, and the store's own errors.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Barrier

from lmcache_s3.errors import Unavailable, Unsafe
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import Outcome

KEYS = 3
CREATORS = 3
_BODY_BYTES = 4096


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """races: keys raced for. undecided: races without a clear winner (answers lost), which prove nothing."""

    races: int
    creators: int
    undecided: int


def probe(
    store: ObjectStore,
    prefix: str,
    *,
    keys: int = KEYS,
    creators: int = CREATORS,
    nonce: Callable[[], str] = lambda: secrets.token_hex(16),
) -> ProbeReport:
    """Race `creators` for each of `keys` fresh keys under `<prefix>probe/`, all at once, and delete them again.

    prefix: empty or ending in `/`. About `keys × (creators + 1)` PUTs and two GETs a key.
    """
    names = [f"{prefix}probe/{nonce()}" for _ in range(keys)]
    with ThreadPoolExecutor(keys * (creators + 1), thread_name_prefix="lmcache-s3-probe") as pool:
        races = [pool.submit(_race, store, key, creators, pool) for key in names]
        wait(races)  # all of them, or one that goes on would leave its object behind
        for key in names:
            store.delete(key)
        decided = sum(race.result() for race in races)
    if not decided:
        raise Unavailable(f"{store.url}: no create in {keys} races was answered; try again later", kind="timeout")
    return ProbeReport(keys, creators, keys - decided)


def _race(store: ObjectStore, key: str, creators: int, pool: ThreadPoolExecutor) -> bool:
    """One race; whether it had a clear winner."""
    bodies = [bytes([65 + i]) * _BODY_BYTES for i in range(creators)]
    start = Barrier(creators)

    def create(body: bytes) -> Outcome:
        start.wait()
        try:
            return store.create(key, body)
        except Unavailable:
            return Outcome.UNKNOWN

    outcomes = list(pool.map(create, bodies))
    winners = [body for body, outcome in zip(bodies, outcomes, strict=True) if outcome is Outcome.WON]
    if len(winners) > 1:
        raise _unsafe(store, "lets two creators of one key both win")
    if not winners:
        return False
    if store.get(key, limit_bytes=2 * _BODY_BYTES) != winners[0]:
        raise _unsafe(store, "says that a create won, but holds another creator's bytes")
    again = store.create(key, b"late")
    if again is Outcome.WON or store.get(key, limit_bytes=2 * _BODY_BYTES) != winners[0]:
        raise _unsafe(store, "replaces an object that a create should have left alone")
    return True


def _unsafe(store: ObjectStore, what: str) -> Unsafe:
    return Unsafe(
        f"{store.url} {what}: engines sharing it would lose each other's index; use a store with put-if-absent (S3, "
        f"GCS, Azure, Ceph, a local path), or set single_writer=true if only one engine ever writes here",
        kind="no_put_if_absent",
        key=store.url,
    )
