"""The cell header's bytes, and every field's check."""

from __future__ import annotations

import struct

import google_crc32c
import pytest

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.header import HEADER_BYTES, unwrap, wrap
from lmcache_s3.errors import Invalid, Unusable

SPEC = CellSpec((2, 3, 16, 2, 8), "bfloat16")
POSITION = CellPosition(bytes(range(16)), 512, 6, 4)
PAYLOAD = b"payload"
LIMIT = 1000


def closed(fields: bytes, payload: bytes = PAYLOAD) -> bytes:
    """Header fields and payload with a right crc."""
    return fields + struct.pack("<I", google_crc32c.value(fields + payload)) + payload


def test_the_bytes_are_as_documented() -> None:
    fields = b"LMS3CELL" + struct.pack("<HH", 1, 56) + bytes(range(16)) + struct.pack("<QHHHHQ", 512, 6, 3, 4, 2, 7)
    assert wrap(PAYLOAD, SPEC, POSITION) == closed(fields)
    assert len(closed(fields)) == HEADER_BYTES + 7 == 63


def test_an_empty_payload_is_a_payload() -> None:
    assert bytes(unwrap(wrap(b"", SPEC, POSITION), SPEC, POSITION, max_bytes=LIMIT)) == b""


def test_the_payload_is_a_view_not_a_copy() -> None:
    data = bytearray(wrap(PAYLOAD, SPEC, POSITION))
    payload = unwrap(data, SPEC, POSITION, max_bytes=LIMIT)
    data[-1:] = b"D"
    assert bytes(payload) == b"payloaD"


@pytest.mark.parametrize(
    ("at", "value", "kind"),
    [
        (0, b"LMS3CELM", "header"),
        (8, b"\2\0", "header"),
        (10, b"\x37\0", "header"),
        (10, b"\0\0", "header"),
        (12, b"\xff", "position"),
        (28, b"\1", "position"),
        (36, b"\0", "position"),
        (38, b"\4", "shape"),
        (38, b"\xff\xff", "shape"),
        (40, b"\0", "position"),
        (42, b"\0", "shape"),
        (44, b"\x08", "truncated"),
        (44, b"\x06", "oversized"),
        (44, b"\xff" * 8, "truncated"),
    ],
)
def test_a_lying_field_is_refused_although_the_crc_is_right(at: int, value: bytes, kind: str) -> None:
    fields = bytearray(wrap(PAYLOAD, SPEC, POSITION)[:52])
    fields[at : at + len(value)] = value
    with pytest.raises(Unusable) as caught:
        unwrap(closed(bytes(fields)), SPEC, POSITION, max_bytes=LIMIT)
    assert caught.value.kind == kind


def test_longer_than_possible_is_refused_before_it_is_read() -> None:
    data = wrap(PAYLOAD, SPEC, POSITION)
    with pytest.raises(Unusable) as caught:
        unwrap(data, SPEC, POSITION, max_bytes=len(data) - 1)
    assert caught.value.kind == "oversized"


@pytest.mark.parametrize(
    "position",
    [
        CellPosition(b"short", 0, 0, 0),
        CellPosition(bytes(16), -1, 0, 0),
        CellPosition(bytes(16), 2**64, 0, 0),
        CellPosition(bytes(16), 0, 65534, 0),
        CellPosition(bytes(16), 0, 0, 65535),
        CellPosition(bytes(16), 0, -1, 0),
    ],
    ids=str,
)
def test_positions_that_cannot_be_are_refused(position: CellPosition) -> None:
    with pytest.raises(Invalid):
        wrap(PAYLOAD, SPEC, position)


def test_the_vector_of_the_format() -> None:
    """FORMAT.md, "Test vectors"."""
    position = CellPosition(bytes.fromhex("b098794899605172f5df0077b32a6a43"), 512, 6, 4)
    assert wrap(PAYLOAD, SPEC, position).hex() == (
        "4c4d533343454c4c01003800b098794899605172f5df0077b32a6a43000200000000000006000300040002000700000000000000"
        "d2fc47bb7061796c6f6164"
    )
