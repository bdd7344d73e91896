"""Sizes, spans and moments as people write them on the command line. Raises `Invalid` naming what was meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime

from pydantic import ByteSize, TypeAdapter, ValidationError

from lmcache_s3.errors import Invalid

_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d|w)", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SIZE = TypeAdapter(ByteSize)


def size_bytes(text: str) -> int:
    """`1.5GiB`, `500MB`, `1024`."""
    try:
        size = int(_SIZE.validate_python(text))
    except ValidationError as e:
        raise Invalid(f"{text[:80]!r} is not a size; write for example 1TiB", kind="argument") from e
    if size < 0:
        raise Invalid(f"{text[:80]!r} is not a size; write for example 1TiB", kind="argument")
    return size


def span_s(text: str) -> float:
    """`30d`, `1h`, `90s`, `0s`: seconds."""
    m = _SPAN.fullmatch(text.strip())
    if m is None:
        raise Invalid(f"{text[:80]!r} is not a span of time; write for example 30d, 1h or 90s", kind="argument")
    return float(m[1]) * _SECONDS[m[2]]


def moment_s(text: str, now_s: Callable[[], float]) -> float:
    """`2026-11-24T10:00` (UTC unless it says otherwise), or a span: so long ago. Unix seconds."""
    if _SPAN.fullmatch(text.strip()):
        return now_s() - span_s(text)
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError as e:
        raise Invalid(
            f"{text[:80]!r} is not a time; write for example 2026-11-24T10:00, or 2h for two hours ago", kind="argument"
        ) from e
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def time_text(unix_s: float) -> str:
    """UTC, to the second."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
