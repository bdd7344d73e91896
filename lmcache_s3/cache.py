"""`Cache`: a space's KV cache without an engine, for scripts, notebooks and services of one's own.

    with Cache.open("s3://bucket/prefix", space) as cache:
        match = cache.lookup(tokens)                    # microseconds, no I/O
        with cache.pin(match):
            kv = cache.retrieve(match).result().array   # [kv, layer, token, head, channel]
        cache.store(tokens, kv_of_all_tokens).result()

Every handle can also be awaited. Whatever fails about stored bytes is a miss: `retrieve` returns fewer tokens, never
wrong ones, and what was found damaged is hidden at once and removed from the index when a second read confirms it.
Raises from `open`: `Invalid`, `Unsafe`, `Unavailable`, `Unusable`; else `Invalid` for arguments, and what handles say.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcache_s3.behind import Behind
from lmcache_s3.calibration_store import calibrated_codec
from lmcache_s3.config import Settings, load_settings
from lmcache_s3.config_sizes import check_sizes
from lmcache_s3.damage import DamageControl
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.fidelity import measured_codec
from lmcache_s3.handle import Handle
from lmcache_s3.identity import ExtraKey, Space, prefix_hashes, root_hash
from lmcache_s3.index.service import Index, IndexStats
from lmcache_s3.loading import LoadReport
from lmcache_s3.metrics import Metrics
from lmcache_s3.publish import Publisher
from lmcache_s3.storing import Storer, StoreReport, as_stored, chunks_per_extent
from lmcache_s3.tiers.base import TierStats
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.transfer import Transfer
from lmcache_s3.types import HASH_BYTES, ChunkRef, Grid
from lmcache_s3.write_behind import PRESSURE, WriteBehind

if TYPE_CHECKING:
    from lmcache_s3.identity import Tokens

_log = logging.getLogger("lmcache_s3.cache")

__all__ = ["Cache", "CacheStats", "Match", "Retrieved", "StoreReport"]


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix of a prompt. tokens: how many are matched, in whole chunks."""

    tokens: int
    chunks: tuple[ChunkRef, ...]


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What was loaded. array: axes `[kv, layer, token, head, channel]`, storage dtype, `tokens` long.

    tokens: whole chunks from the match's beginning; fewer than were matched if something failed (see `report`).
    """

    array: np.ndarray
    tokens: int
    report: LoadReport


@dataclass(frozen=True, slots=True)
class CacheStats:
    """index: the replica's. tiers: by name. requests: to the store, by verb, since start. counters: see `Metrics`."""

    index: IndexStats
    tiers: Mapping[str, TierStats]
    requests: Mapping[str, int] = field(default_factory=dict)
    counters: Mapping[str, int | float] = field(default_factory=dict)


class Cache:
    """One space in one bucket. Thread-safe; made by `open` or `on_store`, and to be closed."""

    def __init__(
        self, store: CountingStore, space: Space, settings: Settings, index: Index, transfer: Transfer
    ) -> None:
        self.space = space
        self.settings = settings
        self.index = index
        self.transfer = transfer
        self.metrics: Metrics = transfer.metrics
        self.damage = DamageControl(index, store, space.id, space.geometry, metrics=self.metrics)
        self._store = store
        self._publisher = Publisher(store, index, space, transfer.codec, before_commit=self.damage.settled_soon)
        grid = Grid(1, settings.head_groups or 1)
        extent_chunks = chunks_per_extent(space.geometry, transfer.codec, settings.extent_bytes)
        self._admission, self._admission_lock = settings.make_admission(), threading.Lock()
        self._behind: Behind | None = None
        if settings.write_behind_s > 0 and not settings.read_only:
            plan = WriteBehind(
                extent_bytes=settings.extent_bytes,
                age_s=settings.write_behind_s,
                max_bytes=int(settings.write_behind_bytes * PRESSURE),
            )
            self._behind = Behind(transfer, self._publisher, index, grid, plan)
        self._storer = Storer(transfer, self._publisher, index, grid, extent_chunks, self._behind)
        self._closed = False

    # --- opening

    @classmethod
    def open(cls, url: str, space: Space, settings: Settings | None = None, **overrides: Any) -> Cache:
        """Open (and create, if need be) a space's cache under a URL. Blocks: the index is read.

        settings: as loaded; None: from the environment and defaults. overrides: single settings, by name.
        """
        given = {} if settings is None else settings.model_dump(exclude_unset=True)
        known = load_settings(**(given | overrides | {"url": url}))
        store = open_store(url, options=known.store_options())
        try:
            return cls.on_store(store, space, known)
        except BaseException:
            store.close()
            raise

    @classmethod
    async def open_async(cls, url: str, space: Space, settings: Settings | None = None, **overrides: Any) -> Cache:
        """`open` in a thread."""
        return await asyncio.to_thread(cls.open, url, space, settings, **overrides)

    @classmethod
    def on_store(cls, store: ObjectStore, space: Space, settings: Settings) -> Cache:
        """Open on a store of one's own; it is closed with the cache."""
        geometry = space.geometry
        codec = settings.make_codec()
        if not settings.read_only or settings.max_kl is not None:
            codec = calibrated_codec(
                store,
                codec,
                weights=space.weights,
                kv_dtype=space.kv_dtype,
                geometry=geometry,
                grid=Grid(1, settings.head_groups or 1),
            )
        codec, fidelity = measured_codec(
            store,
            codec,
            settings.max_kl,
            weights=space.weights,
            kv_dtype=space.kv_dtype,
            chunk_tokens=space.chunk_tokens,
        )
        if not settings.read_only and fidelity != space.fidelity:
            raise Invalid(
                f"codec={settings.codec} writes spaces of fidelity {fidelity!r}, this one is {space.fidelity!r}: "
                f"choose another codec, or Space(…, fidelity={fidelity!r})",
                kind="setting",
                key="codec",
            )
        if settings.head_groups is not None and geometry.heads % settings.head_groups:
            raise Invalid(
                f"head_groups={settings.head_groups} does not divide this model's {geometry.heads} heads",
                kind="setting",
                key="head_groups",
            )
        for warning in check_sizes(settings, geometry, codec, Grid(1, settings.head_groups or 1)):
            _log.warning("%s", warning)
        counting = CountingStore(store)
        index = Index.open(counting, space, settings=settings.index_settings())
        try:
            tiers = settings.make_tiers(space.id, "cache")
            transfer = Transfer(
                counting,
                space.id,
                geometry,
                codec,
                tiers,
                settings=settings.transfer_settings(),
                resting=settings.make_resting(),
            )
        except BaseException:
            index.close()
            raise
        return cls(counting, space, settings, index, transfer)

    # --- looking up: no I/O

    def lookup(self, tokens: Tokens, *, salt: str = "", extra: Sequence[ExtraKey] = ()) -> Match:
        """The longest known prefix. No I/O: hashing is what it takes. No promise: loads may still miss."""
        hashes = prefix_hashes(self.space.id, tokens, self.space.chunk_tokens, salt=salt, extra=extra)
        chunks = tuple(self._match(hashes))
        self.metrics.add("lookups")
        self.metrics.add("lookup_chunks", len(hashes))
        self.metrics.add("matched_chunks", len(chunks))
        return Match(len(chunks) * self.space.chunk_tokens, chunks)

    def _match(self, hashes: Sequence[bytes]) -> Sequence[ChunkRef]:
        return self.index.match(hashes) if self._behind is None else self._behind.match(hashes)

    def pin(self, match: Match) -> AbstractContextManager[None]:
        """Keeps the match's extents from being collected by this process while the context lasts."""
        return self.index.pin([chunk.extent.name for chunk in match.chunks])

    # --- moving data

    def retrieve(
        self, match: Match, *, out: np.ndarray | None = None, deadline_s: float | None = None
    ) -> Handle[Retrieved]:
        """Load a match. The handle fails only if cancelled; everything else is fewer tokens.

        out: `[kv, layer, ≥ tokens, head, channel]`, storage dtype, any strides; the caller's until the handle is done,
        and undefined behind the tokens loaded. None: a new array.
        """
        geometry, n = self.space.geometry, self.space.chunk_tokens
        shape = (geometry.kv, geometry.layers, match.tokens, geometry.heads, geometry.head_dim)
        if out is None:
            out = np.empty(shape, geometry.storage_dtype)
        elif not isinstance(out, np.ndarray):
            raise Invalid(f"out is a {type(out).__name__}, not a numpy array", kind="argument", key="out")
        elif out.ndim != 5 or (*out.shape[:2], *out.shape[3:]) != (*shape[:2], *shape[3:]) or out.shape[2] < shape[2]:
            raise Invalid(f"out is {list(out.shape)}, the match is {list(shape)}", kind="argument", key="out")
        elif out.dtype != geometry.storage_dtype or not out.flags.writeable:
            raise Invalid(f"out must be a writeable array of {geometry.storage_dtype}", kind="argument", key="out")
        array = out

        def sink(chunk: int, layers: range, heads: range, cell: np.ndarray) -> None:
            array[:, layers.start : layers.stop, chunk * n : (chunk + 1) * n, heads.start : heads.stop] = cell

        def done(report: LoadReport) -> Retrieved:
            self._note(match, report)
            tokens = report.loaded_chunks * n
            return Retrieved(array[:, :, :tokens], tokens, report)

        if self._behind is None:
            return self.transfer.load(match.chunks, sink, deadline_s=deadline_s).then(done)
        release = self._behind.hold(match.chunks)  # before it is looked where they are now
        match = Match(match.tokens, self._behind.current(match.chunks))
        loading = self.transfer.load(match.chunks, sink, deadline_s=deadline_s)
        loading.add_done_callback(lambda _: release())
        return loading.then(done)

    def prefetch(self, match: Match, tier: str = "host", *, deadline_s: float | None = None) -> Handle[LoadReport]:
        """Bring a match into a tier; done when it is there."""
        if self._behind is not None:
            match = Match(match.tokens, self._behind.current(match.chunks))

        def done(report: LoadReport) -> LoadReport:
            self._note(match, report)
            return report

        return self.transfer.prefetch(match.chunks, tier, deadline_s=deadline_s).then(done)

    def store(
        self,
        tokens: Tokens,
        kv: Any,
        *,
        salt: str = "",
        extra: Sequence[ExtraKey] = (),
        deadline_s: float | None = None,
    ) -> Handle[StoreReport]:
        """Store the full chunks of a prompt that nobody has stored yet; done when they are acknowledged. With
        `admission: second_touch` only those that were offered before.

        kv: `[kv, layer, token, head, channel]`, numpy or torch (copied to the host), in the space's kv_dtype or its
        storage dtype; as many tokens as `tokens` or fewer (the last may have no KV yet). Not to be changed until done.
        The handle ends with `Unavailable` (full, timeout, network …) if not all of it could be stored. With
        `write_behind_s` what does not fill an extent rests first, so `done` may take that long; see `flush`.
        """
        if self.settings.read_only:
            raise Invalid("the cache was opened read_only: nothing can be stored", kind="setting", key="read_only")
        array = as_stored(kv, self.space.geometry)
        hashes = prefix_hashes(self.space.id, tokens, self.space.chunk_tokens, salt=salt, extra=extra)
        if array.shape[2] > len(tokens):
            raise Invalid(f"KV of {array.shape[2]} tokens for a prompt of {len(tokens)}", kind="argument", key="kv")
        del hashes[array.shape[2] // self.space.chunk_tokens :]
        known = len(self._match(hashes))
        if self._admission is not None:
            with self._admission_lock:
                del hashes[known + self._admission.admit(hashes[known:]) :]
        if (len(hashes) - known) * self.space.chunk_tokens < self.settings.store_min_tokens:
            del hashes[known:]
        rests = self._behind is not None and self._behind.verdicts(hashes)
        if len(hashes) == known and not rests:
            return Handle.completed(StoreReport(0, known, (), (), 0))
        root = root_hash(self.space.id, salt)[:HASH_BYTES]
        seconds = self.settings.store_deadline_s if deadline_s is None else deadline_s
        return self._storer.store(root, hashes, known, array, deadline_s=seconds + self.settings.write_behind_s)

    def flush(self) -> None:
        """Upload now what rests (`write_behind_s`) of all stores until now; their handles tell when that is done."""
        self._storer.flush()

    def _note(self, match: Match, report: LoadReport) -> None:
        """What was loaded was hit. Unusable bytes are an extent's fault; an unavailable store is not."""
        self.index.touch({chunk.extent.name for chunk in match.chunks[: report.loaded_chunks]})
        for name, why in {name: str(error) for _, name, error in report.failed if isinstance(error, Unusable)}.items():
            self.damage.report(name, why)

    # --- life

    def sync(self) -> int:
        """Catch up with what others committed, now; returns the version. Blocks; raises what the store says."""
        return self.index.sync()

    def stats(self) -> CacheStats:
        return CacheStats(self.index.stats(), self.transfer.stats(), dict(self._store.counts), self.metrics.snapshot())

    def close(self, timeout_s: float = 5.0) -> None:
        """End loads and stores under way with `Unavailable(closed)`, upload what rests, commit what is ready, let go of
        everything."""
        if self._closed:
            return
        self._closed = True
        self._storer.close()
        if self._behind is not None:
            self._behind.close(timeout_s)
        self.transfer.close(timeout_s)
        self._publisher.close()
        self.damage.close()
        self.index.close(timeout_s)
        self._store.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Cache:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)
