"""What `Cache.store` does in the background: cut a prompt's new chunks into extents, upload, publish, one by one.

An extent takes about `extent_bytes` of expected encoded bytes. Extents follow one another along the prompt: each is
uploaded, and its commit asked for, before the next begins, so whatever goes wrong leaves a usable prefix. Nobody waits
for a commit here: with a leader that takes seconds, in which many extents are uploaded and ride in one version.
Raises nothing of its own; what goes wrong ends the handle.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcache_s3.behind import Behind
from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.errors import Invalid, LMCacheS3Error, Unavailable
from lmcache_s3.handle import Handle, Work
from lmcache_s3.index.service import Index, Verdict
from lmcache_s3.publish import Publisher, make_record
from lmcache_s3.transfer import Transfer
from lmcache_s3.types import ExtentName, Geometry, Grid
from lmcache_s3.uploading import StoredShard

_MOST_CHUNKS = 65_535
"""Of an extent: positions are u16 in the index."""
_LOSSY_RATIO = 0.5
"""Expected encoded ÷ raw bytes of a lossy codec: a cautious guess; it decides only how long an extent gets."""


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What a store did. stored_chunks: new ones, uploaded and judged; known_chunks: were there already.

    extents: as uploaded, or as laid to rest (write-behind: uploaded together with others, under another name).
    verdicts: the index's answer to each extent: LIVE; COVERED: somebody stored the same meanwhile; VOID: came too late.
    n_bytes: of the shard objects.
    """

    stored_chunks: int
    known_chunks: int
    extents: tuple[ExtentName, ...]
    verdicts: tuple[Verdict, ...]
    n_bytes: int


def expected_chunk_bytes(geometry: Geometry, codec: KVCodec) -> int:
    """Encoded bytes of a chunk, about."""
    return max(1, int(geometry.chunk_bytes * (1.0 if codec.exact else _LOSSY_RATIO)))


def chunks_per_extent(geometry: Geometry, codec: KVCodec, extent_bytes: int) -> int:
    """How many chunks an extent takes at most, by expected encoded bytes; at least one."""
    return max(1, min(_MOST_CHUNKS, extent_bytes // expected_chunk_bytes(geometry, codec)))


def as_stored(kv: Any, geometry: Geometry) -> np.ndarray:
    """KV as a numpy array of the storage dtype, a view where possible. Torch tensors are copied to the host.

    Raises `Invalid` for another shape or data type.
    """
    if not isinstance(kv, np.ndarray) and hasattr(kv, "detach"):
        kv = _from_torch(kv, geometry)
    if not isinstance(kv, np.ndarray):
        raise Invalid(f"KV is a {type(kv).__name__}, neither a numpy array nor a tensor", kind="argument", key="kv")
    if kv.dtype.name == geometry.kv_dtype and kv.dtype != geometry.storage_dtype:  # ml_dtypes' bfloat16, float8
        kv = kv.view(geometry.storage_dtype)
    shape = (geometry.kv, geometry.layers, geometry.heads, geometry.head_dim)
    if kv.dtype != geometry.storage_dtype or kv.ndim != 5 or (*kv.shape[:2], *kv.shape[3:]) != shape:
        raise Invalid(
            f"KV is {kv.dtype}{list(kv.shape)}; it must be {geometry.kv_dtype} (as {geometry.storage_dtype}) "
            f"[{geometry.kv}, {geometry.layers}, tokens, {geometry.heads}, {geometry.head_dim}]",
            kind="argument",
            key="kv",
        )
    array: np.ndarray = kv
    return array


def _from_torch(kv: Any, geometry: Geometry) -> object:
    # Whoever has a tensor has torch; we do not import it.
    torch = sys.modules[type(kv).__module__.partition(".")[0]]
    kv = kv.detach().cpu()
    if kv.dtype == getattr(torch, geometry.kv_dtype):
        kv = kv.view(getattr(torch, geometry.storage_dtype))
    return kv.numpy()


@dataclass(frozen=True, slots=True)
class _Part:
    """One extent to be: chunks first … first + n − 1 of the prompt."""

    first: int
    hashes: bytes
    last_hash: bytes
    parent: bytes
    n_chunks: int


class _Stored:
    """What became of a prompt's extents; ends the work when the last of them is judged, or one has failed."""

    def __init__(self, work: Work[StoreReport], known: int) -> None:
        self._work, self._known = work, known
        self._added: list[tuple[ExtentName, Future[Verdict]]] = []
        self._n_bytes = 0
        self._left = 1
        """Not judged yet; one more until all are added."""
        self._lock = threading.Lock()

    def add(self, name: ExtentName, verdict: Future[Verdict], raw_bytes: int, n_bytes: int) -> None:
        self._n_bytes += n_bytes
        self._added.append((name, verdict))
        self.wait_for(verdict, raw_bytes)

    def wait_for(self, verdict: Future[Verdict], raw_bytes: int = 0) -> None:
        """Without this the work is not done."""
        with self._lock:
            self._left += 1

        def judged(done: Future[Verdict]) -> None:
            error = done.exception()
            if error is not None:
                self._work.fail(error)
            else:
                self._work.advance(raw_bytes)
                self._one_less()

        verdict.add_done_callback(judged)

    def all_added(self) -> None:
        self._one_less()

    def _one_less(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        names = tuple(name for name, _ in self._added)
        verdicts = tuple(verdict.result() for _, verdict in self._added)
        stored = sum(name.n_chunks for name in names)
        self._work.finish(StoreReport(stored, self._known, names, verdicts, self._n_bytes))


class Storer:
    """Stores prompts; uploads of two at a time. Thread-safe."""

    def __init__(
        self,
        transfer: Transfer,
        publisher: Publisher,
        index: Index,
        grid: Grid,
        extent_chunks: int,
        behind: Behind | None = None,
    ) -> None:
        """behind: lays to rest what does not fill an extent; None: everything is uploaded at once."""
        self._transfer = transfer
        self._publisher = publisher
        self._index = index
        self._grid = grid
        self._chunks_per_extent = extent_chunks
        self._behind = behind
        self._flushes = 0
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="lmcache-s3-storer")

    def store(
        self, root: bytes, hashes: Sequence[bytes], known: int, kv: np.ndarray, *, deadline_s: float
    ) -> Handle[StoreReport]:
        """Store chunks known … of a prompt; done when these and those before them are acknowledged. kv: all of the
        prompt's, storage dtype. Never blocks."""
        work: Work[StoreReport] = Work(
            kv.nbytes // kv.shape[2] * self._transfer.geometry.chunk_tokens * (len(hashes) - known)
        )
        self._transfer.watch(work, deadline_s)
        flushes = self._flushes

        def run() -> None:
            try:
                self._run(work, root, hashes, known, kv)
            except LMCacheS3Error as e:
                work.fail(e)
            finally:
                if self._behind is not None and self._flushes != flushes:  # asked for before all of it had come to rest
                    self._behind.flush()

        if not work.over:
            try:
                future = self._threads.submit(run)
            except RuntimeError:  # the pool is shut down
                work.fail(Unavailable("the cache is closed", kind="closed"))
            else:
                future.add_done_callback(lambda done: _end(work, done))
        return work.handle

    def _run(self, work: Work[StoreReport], root: bytes, hashes: Sequence[bytes], known: int, kv: np.ndarray) -> None:
        store = _Stored(work, known)
        if self._behind is not None:  # what is known may rest still
            for verdict in self._behind.verdicts(hashes[:known]):
                store.wait_for(verdict)
        for part in self._parts(root, hashes, known):
            behind = self._behind if part.n_chunks < self._chunks_per_extent else None
            name, shards = self._upload(work, part, kv, to_rest=behind is not None)
            if work.over:  # the caller may have changed its array since: what was uploaded is nobody's
                if behind is not None:
                    self._transfer.forget_rested([name])
                return
            geometry = self._transfer.geometry
            first_token = part.first * geometry.chunk_tokens
            raw_bytes = geometry.chunk_bytes * part.n_chunks
            parts = (name, self._grid, part.parent, first_token, part.hashes, raw_bytes, shards)
            verdict = self._publisher.publish(*parts) if behind is None else behind.rest(make_record(*parts))
            store.add(name, verdict, raw_bytes, sum(shard.n_bytes for shard in shards))
        store.all_added()

    def _parts(self, root: bytes, hashes: Sequence[bytes], known: int) -> Iterator[_Part]:
        for first in range(known, len(hashes), self._chunks_per_extent):
            some = hashes[first : first + self._chunks_per_extent]
            parent = hashes[first - 1] if first else root
            yield _Part(first, b"".join(some), some[-1], parent, len(some))

    def _upload(
        self, work: Work[Any], part: _Part, kv: np.ndarray, *, to_rest: bool
    ) -> tuple[ExtentName, list[StoredShard]]:
        """All shards of one extent, side by side. Raises what the first failed one says."""
        geometry, grid = self._transfer.geometry, self._grid
        name = ExtentName.fresh(part.last_hash, part.n_chunks, self._transfer.codec.id, self._index.version)
        n = geometry.chunk_tokens
        uploads: list[Handle[StoredShard]] = []
        for shard in range(grid.shards):
            layers, heads = geometry.cell_layers(grid, shard), geometry.cell_heads(grid, shard)
            mine = kv[:, layers.start : layers.stop, :, heads.start : heads.stop]
            cells = [mine[:, :, i * n : (i + 1) * n] for i in range(part.first, part.first + part.n_chunks)]
            upload = self._transfer.upload_shard(
                name, grid, shard, part.first * n, part.hashes, cells, parent=part.parent, rest=to_rest
            )
            uploads.append(upload)
        work.handle.add_done_callback(lambda _: _cancel(uploads))
        try:
            return name, [upload.result() for upload in uploads]
        except LMCacheS3Error:
            if to_rest:
                _cancel(uploads)
                self._transfer.forget_rested([name])
            raise

    def flush(self) -> None:
        """Have go up what rests, and what the stores asked for until now will lay to rest."""
        if self._behind is not None:
            self._flushes += 1
            self._behind.flush()

    def close(self) -> None:
        """Stores not begun fail with `Unavailable(closed)`."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _cancel(uploads: Sequence[Handle[StoredShard]]) -> None:
    for upload in uploads:
        upload.cancel()


def _end(work: Work[Any], done: Future[None]) -> None:
    """For a thread that never began, and for what nobody foresaw."""
    if done.cancelled():
        work.fail(Unavailable("the cache is closed", kind="closed"))
    elif (error := done.exception()) is not None:
        work.fail(error)
