"""Which keys a store accepts: one rule for all, so that what one store holds any other can hold.

A key is `/`-separated and relative: no empty segment, no `.` or `..`, no control character, at most 255 bytes of UTF-8
a segment and 900 in all (S3 allows 1,024 including the root's prefix). Pure. Raises `Invalid(argument)`, nothing else.
"""

from __future__ import annotations

from lmcache_s3.errors import Invalid

MAX_KEY_BYTES = 900
MAX_SEGMENT_BYTES = 255
RESERVED_SEGMENT = ".lmcache-s3-tmp."
"""Beginning of the names of `LocalStore`'s temporary files; no key may contain such a segment."""


def check_key(key: str) -> str:
    """Return `key`, or raise `Invalid(argument)`."""
    problem = _problem(key)
    if problem:
        raise Invalid(f"key {key[:120]!r} {problem}", kind="argument", key=key[:120])
    return key


def is_key(key: str) -> bool:
    """Could `check_key` have let this one in?"""
    return _problem(key) is None


def check_prefix(prefix: str) -> str:
    """Return a listing's prefix, or raise `Invalid(argument)`: the beginning of a key, up to any character."""
    head, _, last = prefix.rpartition("/")
    problem = _problem(head) if head else ("begins with '/'" if prefix.startswith("/") else None)
    if problem is None and last not in ("", ".", "..") and not last.startswith(RESERVED_SEGMENT):
        problem = _problem(last)
    if problem:
        raise Invalid(f"prefix {prefix[:120]!r} {problem}", kind="argument", key=prefix[:120])
    return prefix


def check_range(key: str, start: int, end: int | None) -> None:
    """Raise `Invalid(argument)` unless 0 ≤ start ≤ end."""
    if start < 0 or (end is not None and end < start):
        raise Invalid(f"key {key!r}: no bytes {start}…{end}: ranges run forward from 0", kind="argument", key=key)


def _problem(key: str) -> str | None:
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode (a lone surrogate)"
    if not 0 < size <= MAX_KEY_BYTES:
        return f"has {size} bytes: 1 to {MAX_KEY_BYTES} are allowed"
    if any(c < " " or c == "\x7f" for c in key):
        return "holds a control character"
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            return f"holds the segment {segment!r}: keys are relative, without empty, '.' and '..' segments"
        if len(segment.encode()) > MAX_SEGMENT_BYTES:
            return f"holds a segment of more than {MAX_SEGMENT_BYTES} bytes"
        if segment.startswith(RESERVED_SEGMENT):
            return f"holds a segment beginning with {RESERVED_SEGMENT!r}, which is reserved"
    return None
