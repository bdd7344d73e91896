"""`load_calibration(url)`: for plain readers of Zarr arrays, who have no cache open that would know the bucket."""

from __future__ import annotations

import re

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.calibration import MAX_FILE_BYTES, Calibration
from lmcache_s3.config import load_settings
from lmcache_s3.errors import Unusable
from lmcache_s3.tiers.stores.open import StoreOptions, open_store

_FILE = re.compile(r"(?P<root>.*)/calibrations/(?P<digest>[0-9a-f]{64})\.safetensors", re.ASCII)


def load_calibration(url: str, *, options: StoreOptions | None = None) -> None:
    """Let this process decode cells of codec `transform` whose calibrations lie in a cache.

    url: the cache's root, asked from now on for what is missing, or one file's, read at once. options: None: from the
    settings in environment and file, as `Cache.open` has them. For plain readers of Zarr arrays; `Cache` and
    `open_extent` do so by themselves. Raises `Invalid`, `Missing`, `Unusable`, `Unavailable`.
    """
    match = _FILE.fullmatch(url)
    root = url if match is None else match["root"] or "/"
    chosen = load_settings(url=root).store_options() if options is None else options

    def fetch(digest: str) -> bytes:
        store = open_store(root, options=chosen)
        try:
            return store.get(calibrations.key_of(digest), limit_bytes=MAX_FILE_BYTES)
        finally:
            store.close()

    if match is None:
        open_store(root, options=chosen).close()  # says now if it cannot be one
        calibrations.attach(("root", root), fetch)
        return
    calibration = Calibration.from_bytes(fetch(match["digest"]))
    if calibration.digest != match["digest"]:
        raise Unusable(f"{url} is not the file of its name", kind="checksum", key=url)
    calibrations.register(calibration)
