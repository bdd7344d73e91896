"""Every error this package raises, grouped by what the caller does next.

    LMCacheS3Error(.kind, .key)
    ├── Unusable      missing, truncated, checksum, position, shape, codec …  → compute; report the entry
    │   └── Missing   nothing under that key                                  → absent is often an expected answer
    ├── Unavailable   timeout, throttled, network, full                       → compute; retry later
    ├── Ambiguous     a create without an answer                              → read back, then decide
    ├── Conflict      a commit lost too often                                 → keep it pending
    ├── Unsafe        the store ignores preconditions, or another model's space → refuse to share
    ├── Invalid       (ValueError) an argument, setting, credential or permission → mend the call
    └── Bug           a broken invariant                                      → compute; count; report

`kind` is a short stable word for programs and metrics, only ever added to; the message is for people: one line that
names the thing and the mend. `key` is the object or setting it is about, where there is one.
"""

from __future__ import annotations


class LMCacheS3Error(Exception):
    """Base of all errors here. `kind`: stable word; `key`: object key or setting name, or None."""

    default_kind = "error"

    def __init__(self, message: str, *, kind: str | None = None, key: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind or self.default_kind
        self.key = key

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), str(self), self.kind, self.key))


def _rebuild(cls: type[LMCacheS3Error], message: str, kind: str, key: str | None) -> LMCacheS3Error:
    return cls(message, kind=kind, key=key)


class Unusable(LMCacheS3Error):
    """Stored bytes that cannot be used: a miss. Kinds: missing, truncated, oversized, checksum, position, shape,
    codec, header, format, payload, calibration."""

    default_kind = "unusable"


class Missing(Unusable):
    """Nothing is stored under `key`."""

    default_kind = "missing"


class Unavailable(LMCacheS3Error):
    """The store or tier did not answer in time, or refused for now. Kinds: timeout, throttled, network, full,
    closed."""

    default_kind = "unavailable"


class Ambiguous(LMCacheS3Error):
    """A create whose answer was lost: it may have taken effect."""

    default_kind = "ambiguous"


class Conflict(LMCacheS3Error):
    """Lost too many races in a row."""

    default_kind = "conflict"


class Unsafe(LMCacheS3Error):
    """Going on could corrupt what others share. Kinds: no_put_if_absent, foreign_space."""

    default_kind = "unsafe"


class Invalid(LMCacheS3Error, ValueError):
    """An argument, setting, credential or permission that only the user can mend. Kinds: setting, url, bucket,
    credentials, permission, argument."""

    default_kind = "invalid"


class Bug(LMCacheS3Error):
    """An invariant of ours is broken."""

    default_kind = "bug"
