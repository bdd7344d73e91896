"""Calibrations of codec `transform` in a bucket: the files under their digests, and which of them a model's cells use.

    calibrations/<digest>.safetensors            FORMAT.md §7.3; never changed
    calibrations/<weights>.<kv_dtype>.json       {"format": 1, "digest": …}: the one to store with; MAY be replaced

Cells and extents name the digest they were coded with, so replacing the second only changes what is stored from then
on. Raises `Invalid` (setting) with the command that mends it, `Unusable` for what cannot be read, the store's errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.codecs.calibration import MAX_FILE_BYTES, Calibration
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.codecs.transform_layout import misfit
from lmcache_s3.errors import Invalid, Missing, Unusable
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import FORMAT_VERSION, Geometry, Grid

MAX_NAME_BYTES = 1 << 12
_CALIBRATED = "transform"
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


def name_key(weights: str, kv_dtype: str) -> str:
    return f"calibrations/{weights}.{kv_dtype}.json"


def publish(store: ObjectStore, calibration: Calibration, weights: str) -> str:
    """Put the file, then make it the one that this model's cells are stored with; returns its URL."""
    digest = calibrations.register(calibration)
    store.put(calibrations.key_of(digest), calibration.to_bytes())
    name = {"format": FORMAT_VERSION, "digest": digest}
    store.put(name_key(weights, calibration.kv_dtype), json.dumps(name).encode() + b"\n")
    return f"{store.url.rstrip('/')}/{calibrations.key_of(digest)}"


def read_name(store: ObjectStore, weights: str, kv_dtype: str) -> str:
    """Digest of the calibration to store with. Raises `Missing`, `Unusable` (format)."""
    key = name_key(weights, kv_dtype)
    try:
        document: Any = json.loads(store.get(key, limit_bytes=MAX_NAME_BYTES))
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{key} is not JSON ({error})", kind="format", key=key) from error
    digest = document.get("digest") if isinstance(document, dict) else None
    if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None or document.get("format") != FORMAT_VERSION:
        raise Unusable(f"{key} names no calibration", kind="format", key=key)
    return digest


@contextmanager
def attached(store: ObjectStore) -> Iterator[None]:
    """While it lasts, cells find their calibrations in this store."""

    def fetch(digest: str) -> bytes:
        return store.get(calibrations.key_of(digest), limit_bytes=MAX_FILE_BYTES)

    # A key of its own: several caches of one process may lie under one URL, and each closes its own store.
    key = object()
    calibrations.attach(key, fetch)
    try:
        yield
    finally:
        calibrations.detach(key)


def calibrated_codec(
    store: ObjectStore, codec: KVCodec, *, weights: str, kv_dtype: str, geometry: Geometry | None, grid: Grid
) -> KVCodec:
    """The codec with the calibration that it is to store with, loaded and shown to fit; others as they are.

    geometry: of the model; None: not compared. Raises `Invalid` (setting) where there is none or it does not fit.
    """
    if codec.id != _CALIBRATED:
        return codec
    mend = f"run lmcache-s3 calibrate MODEL --url {store.url} --kv-dtype {kv_dtype}"
    digest = str(codec.config["calibration"])
    with attached(store):
        try:
            digest = digest or read_name(store, weights, kv_dtype)
            calibration = calibrations.find(digest)
        except Missing as error:
            raise _unfit(f"{store.url} has no calibration for this model ({kv_dtype}): {mend}") from error
        except Unusable as error:
            raise _unfit(f"{error}; or {mend}") from error
    level = str(codec.config["level"])
    if calibration.level(level) is None:
        names = ", ".join(one.name for one in calibration.levels)
        raise Invalid(
            f"codec_level={level!r}: calibration {digest[:12]}… has {names}", kind="setting", key="codec_level"
        )
    if geometry is not None:
        problem = misfit(calibration, geometry, grid)
        if problem is not None:
            raise _unfit(f"{problem}: {mend} for {grid.stages} stages and {grid.head_groups} head groups")
    return with_calibration(codec, digest)


def with_calibration(codec: KVCodec, digest: str) -> KVCodec:
    """The same codec and level, with this calibration. No I/O."""
    return make_codec(codec.id, {**codec.config, "calibration": digest})


def _unfit(text: str) -> Invalid:
    return Invalid(f"codec=transform: {text}", kind="setting", key="codec_calibration")
