"""Opening the cache beside a starting engine: what must be right is checked at once, what takes time runs behind.

At start-up, before the engine serves: the store answers, the bucket and our rights are there, creates are exclusive.
`Invalid` and `Unsafe` stop the start. A store that does not answer does not: the engine serves without a cache and we
try again. In the background: the digest of the weights, then the index. Adapters' digests likewise.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache_s3.calibration_store import calibrated_codec
from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.damage import DamageControl
from lmcache_s3.errors import Invalid, LMCacheS3Error, Unavailable, Unsafe
from lmcache_s3.fidelity import measured_codec
from lmcache_s3.identity import Space
from lmcache_s3.index.service import Index
from lmcache_s3.integrations.vllm.model import ModelFacts
from lmcache_s3.publish import Publisher
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import Grid
from lmcache_s3.weights import adapter_digest, weights_digest

if TYPE_CHECKING:
    from lmcache_s3.config import Settings

logger = logging.getLogger("lmcache_s3.vllm")

_START_WAIT_S = 20.0
"""How long the engine's start waits for digest and index; longer, and the cache comes up behind a serving engine."""
_RETRY_S = 10.0


@dataclass
class OpenCache:
    """What the scheduler role works with once all is known."""

    space: Space
    store: CountingStore
    index: Index
    publisher: Publisher
    damage: DamageControl
    before: Mapping[str, int]
    calibration: str | None = None

    def facts(self) -> Mapping[str, Any]:
        """For the stats file; requests are counted from the opened index on (the start-up probe is not among them)."""
        counts = Counter(self.store.counts)
        counts.subtract(self.before)
        stats = self.index.stats()
        return {
            "index_version": stats.version,
            "index_extents": stats.extents,
            "index_polls": stats.polls,
            "index_gets": counts["get"],
            "index_puts": counts["create"],
            "store_puts": counts["put"],
            "index_lists": counts["list"],
        }

    def close(self, timeout_s: float) -> None:
        self.publisher.close()
        self.damage.close()
        self.index.close(timeout_s)


class Opening:
    """Opens once, retries while the store is away. `poll` never blocks."""

    def __init__(self, facts: ModelFacts, settings: Settings, codec: KVCodec) -> None:
        self._facts, self._settings, self._codec = facts, settings, codec
        self._lock = threading.Lock()
        self._opened: OpenCache | None = None
        self._stopped = threading.Event()
        self._adapters: dict[tuple[int, str], str | None] = {}
        self._fatal: LMCacheS3Error | None = None
        self._known = threading.Event()

    def start(self) -> None:
        """Begin; waits a while for the outcome. Raises `Invalid` or `Unsafe` if what was found must be mended."""
        self._known.clear()
        threading.Thread(target=self._run, name="lmcache-s3-open", daemon=True).start()
        self._known.wait(_START_WAIT_S)
        if self._fatal is not None:
            raise self._fatal
        if not self._known.is_set():
            logger.info("still reading the model's weights for their digest: the cache is off until it is known")

    def poll(self) -> OpenCache | None:
        with self._lock:
            return self._opened

    def adapter_digest(self, number: int, path: str) -> str | None:
        """Digest of a LoRA adapter's files; None until a background thread has read them.

        number: the engine's, new each time it loads an adapter, so that files changed and loaded again are read again.
        """
        key = (number, path)
        with self._lock:
            if key in self._adapters:
                return self._adapters[key]
            self._adapters[key] = None
        threading.Thread(target=self._read_adapter, args=key, name="lmcache-s3-adapter", daemon=True).start()
        return None

    def _read_adapter(self, number: int, path: str) -> None:
        try:
            digest = adapter_digest(path)
        except LMCacheS3Error as error:
            logger.warning("adapter %s is not cached: %s", path, error)
            return
        with self._lock:
            self._adapters[number, path] = digest

    def _run(self) -> None:
        warned = False
        while not self._stopped.is_set():
            try:
                opened = self._open()
            except (Invalid, Unsafe) as error:
                self._fatal = error
                if self._known.is_set():
                    logger.error("the cache stays off: %s", error)  # noqa: TRY400 - one line that says all, no traceback
                self._known.set()
                return
            except LMCacheS3Error as error:
                if not warned:
                    logger.warning("the cache is off for now, trying again each %.0f s: %s", _RETRY_S, error)
                warned = True
                self._known.set()
                self._stopped.wait(_RETRY_S)
                continue
            with self._lock:
                if not self._stopped.is_set():
                    self._opened = opened
            self._known.set()
            logger.info("space %s at version %d: %s", opened.space.id[:16], opened.index.version, self._settings.url)
            return

    def _open(self) -> OpenCache:
        settings = self._settings
        raw = open_store(settings.url, options=settings.store_options())
        store = CountingStore(raw)
        try:
            raw.check()
            return self._open_in(store)
        except BaseException:
            store.close()
            raise

    def _open_in(self, store: CountingStore) -> OpenCache:
        settings = self._settings
        weights = settings.weights_digest or _digest_of(self._facts)
        grid = self._facts.grid(settings)
        codec = calibrated_codec(
            store,
            self._codec,
            weights=weights,
            kv_dtype=self._facts.kv_dtype,
            geometry=None if grid is None else self._facts.space(weights, settings, "exact").geometry,
            grid=grid or Grid(),
        )
        codec, fidelity = measured_codec(
            store,
            codec,
            settings.max_kl,
            weights=weights,
            kv_dtype=self._facts.kv_dtype,
            chunk_tokens=settings.chunk_tokens,
        )
        space = self._facts.space(weights, settings, fidelity)
        index = Index.open(store, space, settings=settings.index_settings())
        damage = DamageControl(index, store, space.id, space.geometry)
        return OpenCache(
            space,
            store,
            index,
            # what replaces a damaged extent is committed after its removal, else it would count as covered
            Publisher(store, index, space, codec, before_commit=damage.settled_soon),
            damage,
            before=dict(store.counts),
            calibration=str(codec.config["calibration"]) if "calibration" in codec.config else None,
        )

    def close(self) -> None:
        self._stopped.set()


def _digest_of(facts: ModelFacts) -> str:
    return weights_digest(facts.path, revision=facts.revision, every_format=facts.every_format)


def check_start(settings: Settings) -> None:
    """For a worker's start: a wrong URL, bucket, credential or directory is said before the engine serves. An
    unreachable store is not an error here."""
    if settings.disk_path is not None:
        try:
            settings.disk_path.mkdir(parents=True, exist_ok=True)
            writable = os.access(settings.disk_path, os.W_OK | os.X_OK)
        except OSError:
            writable = False
        if not writable:
            raise Invalid(
                f"disk_path: {settings.disk_path} is no directory that can be written; give another",
                kind="setting",
                key="disk_path",
            )
    store = open_store(settings.url, options=settings.store_options())
    try:
        store.check()
    except Unavailable as error:
        logger.warning("the store does not answer yet: %s", error)
    finally:
        store.close()
