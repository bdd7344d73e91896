"""A writer that stores extents until it is killed, and says of each acknowledged one so through a pipe.

A process of its own, forked from a warm one (`multiprocessing`'s fork server with this module preloaded), so that it
stores within a fraction of a second. Raises what the store and the index raise.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection

from lmcache_s3.identity import PrefixHasher
from lmcache_s3.index.replica import Replica
from lmcache_s3.index.service import Index, IndexSettings, Verdict
from lmcache_s3.testing.filling import upload
from lmcache_s3.testing.small import small_space
from lmcache_s3.tiers.stores.open import open_store

SPACE = small_space()
SETTINGS = IndexSettings(poll_s=0.3, hand_over_s=0.2, merge_s=0.3, single_writer=True)
"""The probe was made before: it need not be made two hundred times."""
OPEN = "open"
Replica()  # loads the kernels, once before all forks: on a busy machine two thirds of a writer's start


def write(url: str, environment: Mapping[str, str], seed: int, pause_s: float, told: Connection) -> None:
    """For ever. pause_s: between two extents, at most. told: gets `OPEN`, then the name of each extent that was
    acknowledged as live."""
    os.environ.update(environment)
    rng = random.Random(seed)
    store = open_store(url)
    with Index.open(store, SPACE, settings=SETTINGS) as index:
        told.send(OPEN)
        while True:
            hasher = PrefixHasher(SPACE.id, SPACE.chunk_tokens)
            hasher.extend([rng.randrange(50_000) for _ in range(SPACE.chunk_tokens * rng.randrange(1, 4))])
            record = upload(store, SPACE, hasher.hashes, hasher.root, 0, born=index.version, seed=seed)
            if index.commit([record]).result(60) == [Verdict.LIVE]:
                told.send(str(record.name))
            time.sleep(rng.uniform(0.0, pause_s))
