"""From a URL to a store. Raises `Invalid(url)` for what cannot be one, `Invalid` of other kinds for bad options."""

from __future__ import annotations

import difflib
import re
from urllib.parse import unquote, urlsplit

import fsspec

from lmcache_s3.errors import Invalid
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.fsspec_ import FsspecStore
from lmcache_s3.tiers.stores.local import LocalStore
from lmcache_s3.tiers.stores.options import StoreOptions
from lmcache_s3.tiers.stores.s3 import S3Store

__all__ = ["StoreOptions", "open_store"]

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", re.ASCII)
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,254}", re.ASCII)
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
_KNOWN = ("s3", "gs", "az", "abfs", "file", "memory")
_FORM = "it looks like s3://bucket/prefix, file:///path or gs://bucket/prefix"


def open_store(url: str, *, options: StoreOptions = StoreOptions()) -> ObjectStore:  # noqa: B008
    """The store of `s3://bucket/prefix`, `file:///path` or `/path`, `memory://name`, or any installed fsspec scheme.

    Talks to nobody yet: `check()` of what is returned does.
    """
    if url.startswith("/"):
        return LocalStore(url)
    match = _SCHEME.match(url)
    if match is None:
        raise Invalid(f"url {url[:200]!r} has no scheme; {_FORM}", kind="url", key="url")
    scheme = match[1].lower()
    if scheme == "s3":
        return _open_s3(url, options)
    if scheme == "file":
        return _open_file(url)
    return _open_fsspec(url, scheme, options)


def _open_s3(url: str, options: StoreOptions) -> S3Store:
    bucket, _, prefix = url[len("s3://") :].partition("/")
    if not _BUCKET.fullmatch(bucket):
        problem = "credentials in it; give them by environment or profile" if "@" in bucket else "no valid bucket name"
        shown = "s3://…@" + bucket.rpartition("@")[2] if "@" in bucket else url[:200]
        raise Invalid(f"url {shown!r} has {problem}; {_FORM}", kind="url", key="url")
    if "?" in prefix or "#" in prefix:
        raise Invalid(f"url {url[:200]!r}: '?' and '#' mean nothing here; use settings instead", kind="url", key="url")
    return S3Store(bucket, prefix, options=options)


def _open_file(url: str) -> LocalStore:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise Invalid(f"url {url[:200]!r}: a file url has three slashes: file:///path", kind="url", key="url")
    return LocalStore(unquote(parts.path))


def _open_fsspec(url: str, scheme: str, options: StoreOptions) -> FsspecStore:
    if scheme not in fsspec.available_protocols() and scheme not in fsspec.registry:
        near = difflib.get_close_matches(scheme, _KNOWN, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}://? " if near else ""
        raise Invalid(
            f"url {url[:200]!r}: unknown scheme {scheme!r}; {hint}known are {', '.join(_KNOWN)} and fsspec's others",
            kind="url",
            key="url",
        )
    try:
        return FsspecStore.from_url(url, options.storage_options)
    except ImportError as e:
        extra = _EXTRAS.get(scheme)
        mend = f"pip install lmcache-s3[{extra}]" if extra else f"install the fsspec file system for it ({e})"
        raise Invalid(f"url {url[:200]!r}: no support for {scheme}:// installed; {mend}", kind="url", key="url") from e
    except (TypeError, ValueError, OSError) as e:
        raise Invalid(
            f"url {url[:200]!r} or its storage_options are refused by fsspec ({e})", kind="url", key="url"
        ) from e
