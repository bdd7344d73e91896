"""What is cached, as pandas tables: one row per space, per extent, per chunk.

Reads indexes and listings, no KV. `settings` are the store's, as keyword arguments (`endpoint_url=…`); the environment
counts as everywhere. Raises `Invalid` (pandas missing among others) and `Unavailable`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lmcache_s3.analysis.catalog import find_space, list_spaces, reading
from lmcache_s3.config import load_settings
from lmcache_s3.errors import Invalid
from lmcache_s3.identity import Space
from lmcache_s3.index.manifest import LiveExtent, log_key
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import extent_prefix, space_prefix

if TYPE_CHECKING:
    import pandas as pd


def spaces(url: str | None = None, **settings: Any) -> pd.DataFrame:
    """One row per space: id, model, how KV is stored, and how much of it: extents, chunks, tokens, bytes."""
    rows = []
    with _opened(url, settings) as store:
        for space, live in _live(store, None):
            rows.append(
                {
                    "space": space.id,
                    "model": space.model,
                    "kv_dtype": space.kv_dtype,
                    "chunk_tokens": space.chunk_tokens,
                    "fidelity": space.fidelity,
                    "extents": len(live),
                    "chunks": sum(e.record.n_chunks for e in live),
                    "tokens": sum(e.record.n_chunks for e in live) * space.chunk_tokens,
                    "raw_bytes": sum(e.record.raw_bytes for e in live),
                    "encoded_bytes": sum(e.record.encoded_bytes for e in live),
                }
            )
    return _frame(rows, ["space", "model", "kv_dtype", "chunk_tokens", "fidelity", "extents", "chunks", "tokens",
                         "raw_bytes", "encoded_bytes"])  # fmt: skip


def extents(url: str | None = None, space_id: str | None = None, **settings: Any) -> pd.DataFrame:
    """One row per live extent, oldest first. created, last_access: versions; created_at: the store's time, if its
    version is still there. url: for `lmcache_s3.open_extent` or, codec permitting, `zarr.open_array`."""
    pd = _pandas()
    rows = []
    with _opened(url, settings) as store:
        for space, live in _live(store, space_id):
            times = _version_times(store, space)
            for entry in live:
                record = entry.record
                rows.append(
                    {
                        "space": space.id,
                        "extent": str(record.name),
                        "url": f"{store.url.rstrip('/')}/{extent_prefix(space.id, record.name)}",
                        "chunks": record.n_chunks,
                        "tokens": record.n_chunks * space.chunk_tokens,
                        "first_token": record.first_token,
                        "parent": record.parent.hex(),
                        "codec": record.name.codec,
                        "stages": record.grid.stages,
                        "head_groups": record.grid.head_groups,
                        "raw_bytes": record.raw_bytes,
                        "encoded_bytes": record.encoded_bytes,
                        "ratio": record.raw_bytes / record.encoded_bytes,
                        "created": entry.created,
                        "last_access": entry.last_access,
                        "created_at": times.get(entry.created),
                    }
                )
    frame = _frame(rows, ["space", "extent", "url", "chunks", "tokens", "first_token", "parent", "codec", "stages",
                          "head_groups", "raw_bytes", "encoded_bytes", "ratio", "created", "last_access",
                          "created_at"])  # fmt: skip
    frame["created_at"] = pd.to_datetime(frame["created_at"].astype("float64"), unit="s", utc=True)
    return frame


def chunks(url: str | None = None, space_id: str | None = None, **settings: Any) -> pd.DataFrame:
    """One row per stored chunk: its prefix hash, extent and position there, first token, size in tokens and bytes."""
    rows = []
    with _opened(url, settings) as store:
        for space, live in _live(store, space_id):
            for entry in live:
                record = entry.record
                sizes = [[cell.length for cell in record.cells(shard)] for shard in range(record.grid.shards)]
                for position, prefix_hash in enumerate(record.chunk_hashes()):
                    rows.append(
                        {
                            "space": space.id,
                            "prefix_hash": prefix_hash.hex(),
                            "extent": str(record.name),
                            "position": position,
                            "first_token": record.first_token + position * space.chunk_tokens,
                            "tokens": space.chunk_tokens,
                            "encoded_bytes": sum(shard[position] for shard in sizes),
                        }
                    )
    return _frame(rows, ["space", "prefix_hash", "extent", "position", "first_token", "tokens", "encoded_bytes"])


def _pandas() -> Any:
    try:
        import pandas
    except ModuleNotFoundError as e:
        raise Invalid("pandas is missing: pip install 'lmcache-s3[analysis]'", kind="argument") from e
    return pandas


def _frame(rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    return _pandas().DataFrame(rows, columns=columns)


@contextmanager
def _opened(url: str | None, arguments: dict[str, Any]) -> Iterator[ObjectStore]:
    settings = load_settings(**({} if url is None else {"url": url}), **arguments)
    store = open_store(settings.url, options=settings.store_options())
    try:
        yield store
    finally:
        store.close()


def _live(store: ObjectStore, space_id: str | None) -> Iterator[tuple[Space, list[LiveExtent]]]:
    wanted = [find_space(store, space_id)] if space_id else [e.space for e in list_spaces(store) if e.space is not None]
    for space in wanted:
        with reading(store, space) as index:
            yield space, sorted(index.extents(), key=lambda live: live.order)


def _version_times(store: ObjectStore, space: Space) -> dict[int, float]:
    """Version → Unix seconds of the store's clock, for the versions that still lie in the log."""
    prefix = log_key(space.id, 0).rpartition("/")[0] + "/"
    assert prefix.startswith(space_prefix(space.id))
    return {int(info.key.rpartition("/")[2]): info.modified_s for info in store.list(prefix)}
