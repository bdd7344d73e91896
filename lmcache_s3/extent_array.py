"""Read an extent with its true data types: `open_extent(url)`.

Reads through zarr, so it needs no index and no space. zarr itself answers a missing shard with zeros; here it is an
error, because an extent without all its shards is damaged. Raises `Missing`, `Unusable`, `Unavailable`, `Invalid`.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lmcache_s3.errors import Invalid, LMCacheS3Error, Missing, Unavailable, Unusable
from lmcache_s3.types import STORAGE_DTYPE

if TYPE_CHECKING:
    import zarr


_MAX_SHARDS = 4096
_IN_CACHE = re.compile(r"(?P<root>.+)/spaces/[0-9a-f]{64}/extents/[0-9a-f]{2}/[^/]+")


class ExtentArray:
    """An extent, axes [kv, layer, token, head, channel], indexed as NumPy arrays are; reads on each access.

    `array[...]` gives a new array of the true dtype (bfloat16, fp8: of `ml_dtypes`). Blocks; safe from many threads.
    """

    def __init__(self, array: zarr.Array, kv_dtype: str) -> None:
        from lmcache_s3.codecs.dtypes import TRUE_DTYPE  # ml_dtypes only where it is needed

        self.zarr = array
        self.kv_dtype = kv_dtype
        self.dtype = TRUE_DTYPE[kv_dtype]
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.attributes: Mapping[str, Any] = cast(Mapping[str, Any], array.attrs["lmcache_s3"])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes once read."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, selection: Any) -> np.ndarray:
        with _our_errors(str(self.zarr.store_path)):
            bits = np.asarray(self.zarr[selection])
        return bits.view(self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise Invalid("an extent is read from its store: it cannot be had without a copy", kind="argument")
        values = self[...]
        return values if dtype is None else values.astype(dtype)

    def __repr__(self) -> str:
        return f"<ExtentArray {self.zarr.store_path} shape={self.shape} dtype={self.dtype}>"


def open_extent(url: str, *, storage_options: Mapping[str, Any] | None = None) -> ExtentArray:
    """Open an extent by the URL of its array: `file://`, `s3://` (extra `s3`), `memory://` or a plain path.

    storage_options: fsspec's; None: what the settings in environment and file say, as `Cache.open` has them. Reads
    zarr.json and asks once per shard whether it is there. Extents of codec `transform` find their calibrations in the
    cache that they lie in.
    """
    import zarr
    from zarr.core.sync import sync

    from lmcache_s3.config import load_settings  # as much as zarr: only where it is needed

    with _our_errors(url):
        if storage_options is None:
            storage_options = load_settings(url=url).store_options().for_fsspec(url)
        options = dict(storage_options) or None
        array = zarr.open_array(url, mode="r", zarr_format=3, storage_options=options)
        attributes = array.attrs.get("lmcache_s3")
        kv_dtype = attributes.get("kv_dtype") if isinstance(attributes, dict) else None
        if kv_dtype not in STORAGE_DTYPE or array.dtype != np.dtype(STORAGE_DTYPE[cast(str, kv_dtype)]):
            raise Unusable(f"{url} is a Zarr array, but no extent", kind="format", key=url)
        for key in _shard_keys(array):
            if not sync((array.store_path / key).exists()):
                raise Missing(f"{url} lacks its shard {key}", key=url)
        _attach_calibrations(url, options)
    return ExtentArray(array, cast(str, kv_dtype))


def _attach_calibrations(url: str, options: dict[str, Any] | None) -> None:
    """Cells that name a calibration find it in the cache that the extent lies in, if it does lie in one."""
    match = _IN_CACHE.fullmatch(url.rstrip("/"))
    if match is None:
        return
    from lmcache_s3.codecs import calibrations
    from lmcache_s3.codecs.calibration import MAX_FILE_BYTES
    from lmcache_s3.tiers.stores.fsspec_ import FsspecStore

    root = match["root"]

    def fetch(digest: str) -> bytes:
        return FsspecStore.from_url(root, options).get(calibrations.key_of(digest), limit_bytes=MAX_FILE_BYTES)

    calibrations.attach(("extents", root), fetch)


def _shard_keys(array: zarr.Array) -> Iterator[str]:
    shards = array.shards or array.chunks
    counts = [range(-(-length // shard)) for length, shard in zip(array.shape, shards, strict=True)]
    if math.prod(map(len, counts)) > _MAX_SHARDS:
        raise Unusable(f"an extent of {math.prod(map(len, counts))} shards", kind="shape")
    for place in itertools.product(*counts):
        yield "/".join(("c", *map(str, place)))


def _s3_errors() -> tuple[type[Exception], ...]:
    """What s3fs lets through of botocore's, which has been imported if that is what failed."""
    if "botocore" not in sys.modules:
        return ()
    from lmcache_s3.tiers.stores.s3_errors import CLIENT_ERRORS

    return CLIENT_ERRORS


@contextmanager
def _our_errors(url: str) -> Iterator[None]:
    """zarr's and fsspec's errors as ours, by type."""
    try:
        yield
    except LMCacheS3Error:
        raise
    except FileNotFoundError as error:
        raise Missing(f"nothing at {url}", key=url) from error
    except IndexError:
        raise
    except ImportError as error:
        mend = "pip install 'lmcache-s3[s3]'" if url.startswith("s3://") else error.name or error
        raise Invalid(f"{url} cannot be read by fsspec: a package is missing: {mend}", kind="url", key=url) from error
    except _s3_errors() as error:
        from lmcache_s3.tiers.stores.s3_errors import mapped

        bucket = url.removeprefix("s3://").partition("/")[0]
        raise mapped(error, where=url, bucket=bucket, endpoint="the store", key=url) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable(f"{url} cannot be read as an extent: {error}", kind="payload", key=url) from error
    except PermissionError as error:
        raise Invalid(f"{url} may not be read: {error}", kind="permission", key=url) from error
    except OSError as error:
        raise Unavailable(f"{url}: {error}", kind="network", key=url) from error
