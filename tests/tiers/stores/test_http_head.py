"""Heads of answers: what is understood, what is refused, and that nothing else happens whatever comes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_s3.tiers.stores.http_head import Garbled, Head, parse_chunk_size, parse_head


def test_a_whole_head() -> None:
    head = parse_head(b"HTTP/1.1 206 Partial Content\r\nContent-Length:  12 \r\nX-A: 1\r\nx-a:2")
    assert head == Head(206, {"content-length": "12", "x-a": "1, 2"}, 12, chunked=False, reusable=True)


@pytest.mark.parametrize(
    ("data", "length", "chunked", "reusable"),
    [
        (b"HTTP/1.1 200 OK", None, False, False),  # ends with the connection
        (b"HTTP/1.1 200", None, False, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0", 0, False, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5", 5, False, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: Close", 5, False, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5", 5, False, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive", 5, False, True),
        (b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked", None, True, True),
        (b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\nContent-Length: 7", None, True, True),
        (b"HTTP/1.1 204 None", 0, False, True),
        (b"HTTP/1.1 100 Continue", 0, False, True),
    ],
)
def test_where_the_body_ends(data: bytes, length: int | None, chunked: bool, reusable: bool) -> None:
    head = parse_head(data)
    assert (head.length, head.chunked, head.reusable) == (length, chunked, reusable)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/2 200 OK",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1 20 OK",
        b"ICY 200 OK",
        b"HTTP/1.1 200 OK\r\nno colon",
        b"HTTP/1.1 200 OK\r\n folded: line",
        b"HTTP/1.1 200 OK\r\nname : x",
        b"HTTP/1.1 200 OK\r\n: x",
        b"HTTP/1.1 200 OK\r\na: b\nc: d",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1",
        b"HTTP/1.1 200 OK\r\nContent-Length: +1",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1_0",
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2",
        b"HTTP/1.1 200 OK\r\nContent-Length:",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked",
    ],
)
def test_what_leaves_doubt_is_refused(data: bytes) -> None:
    with pytest.raises(Garbled):
        parse_head(data)


@pytest.mark.parametrize(("line", "size"), [(b"0", 0), (b"1F", 31), (b"a;name=value", 10), (b"00000005", 5)])
def test_sizes_of_chunks(line: bytes, size: int) -> None:
    assert parse_chunk_size(line) == size


@pytest.mark.parametrize("line", [b"", b"-1", b"0x5", b"5 6", b"123456789", b" 5", b"\xb2"])
def test_chunks_without_a_size(line: bytes) -> None:
    with pytest.raises(Garbled):
        parse_chunk_size(line)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_head_or_garbled(data: bytes) -> None:
    with contextlib.suppress(Garbled):
        parse_head(data)
    with contextlib.suppress(Garbled):
        assert parse_chunk_size(data) >= 0


@given(st.binary(max_size=80))
def test_any_header_after_a_good_start(data: bytes) -> None:
    with contextlib.suppress(Garbled):
        head = parse_head(b"HTTP/1.1 200 OK\r\n" + data)
        assert head.status == 200
        assert not any("\n" in value for value in head.headers.values())
