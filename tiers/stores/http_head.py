"""The head of an HTTP/1.1 answer, from bytes to values. Pure; written for bytes that nobody vouches for.

Raises `Garbled` for anything that RFC 9112 does not allow or that leaves the end of the body in doubt, nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_HEAD_BYTES = 1 << 16
MAX_CHUNK_LINE_BYTES = 1 << 10

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?")


class Garbled(Exception):
    """What came is no HTTP/1.1 answer."""


@dataclass(frozen=True, slots=True)
class Head:
    """Status line and headers. headers: names in lower case; equal names are joined by ", ".

    length: bytes of the body, None where it is chunked or ends with the connection. chunked: the body comes in chunks.
    reusable: the connection may carry another request once the body is read.
    """

    status: int
    headers: dict[str, str]
    length: int | None
    chunked: bool
    reusable: bool


def parse_head(data: bytes) -> Head:
    """data: everything before the empty line."""
    first, *lines = data.split(b"\r\n")
    match = _STATUS.fullmatch(first)
    if match is None:
        raise Garbled("no status line")
    status = int(match[2])
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon or _NAME.fullmatch(name) is None or "\n" in value or "\r" in value or "\0" in value:
            raise Garbled("a header line that is none")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    bodiless = status < 200 or status in (204, 304)
    coding = headers.get("transfer-encoding", "").lower()
    if coding not in ("", "identity", "chunked"):
        raise Garbled("a transfer coding nobody asked for")
    chunked = coding == "chunked" and not bodiless
    length = 0 if bodiless else None if chunked else _length(headers.get("content-length"))
    options = headers.get("connection", "").lower()
    keep = "close" not in options if match[1] == b"1" else "keep-alive" in options
    return Head(status, headers, length, chunked, keep and (chunked or length is not None))


def parse_chunk_size(line: bytes) -> int:
    """Bytes of the chunk that `line` (without its end) announces."""
    match = _CHUNK.fullmatch(line)
    if match is None:
        raise Garbled("a chunk without a size")
    return int(match[1], 16)


def _length(text: str | None) -> int | None:
    if text is None:
        return None
    said = {part.strip() for part in text.split(",")}
    if len(said) != 1 or _LENGTH.fullmatch(value := said.pop()) is None:
        raise Garbled("a body of no clear length")
    return int(value)
