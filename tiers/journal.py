"""The disk tier's index: a file of frames, each saying which cells came, were used or went. Read whole at start.

    frame = "LS3J" | u16 version | u16 kind | u32 count | u32 bytes of names | u64 XXH3 of all else | payload
    HELD:   names of codecs, each ended by a newline | count records
    USED:   f64 time, Unix seconds | count u64 ids          GONE: count u64 ids

Little-endian. An id names one keeping of one cell and is not used again. What was appended survives a killed process;
nothing is fsynced. A frame that is torn or damaged is passed over, up to the next one that is whole.
Decoding raises nothing and allocates no more than the file is long; a record that makes no sense is left out.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lmcache_s3.codecs.checksum import xxh3
from lmcache_s3.tiers.places import part
from lmcache_s3.types import CellRef, ExtentName

MAGIC = b"LS3J"
VERSION = 1
HELD, USED, GONE = 1, 2, 3
GRAIN_BYTES = 4096
"""Cells begin at multiples of it."""

_HEADER = struct.Struct("<4sHHIIQ")
_CELL = struct.Struct("<16s16sQ 16s16s QQQQ IIIIII I")
_TIMED = struct.Struct(f"<Qd {_CELL.size}s H2x")
_CODEC = re.compile(r"[a-z0-9_-]{1,64}", re.ASCII)
_FRAME_RECORDS = 1024
RECORD_BYTES = _TIMED.size


class Place(NamedTuple):
    """n_bytes from `start` on in a segment."""

    segment: int
    start: int
    n_bytes: int


class Known(NamedTuple):
    """Of a record, what is asked for at once. first_token: of the prompt, before the cell's extent."""

    extent: ExtentName
    place: bytes
    parent: bytes | None
    first_token: int
    position: int


@dataclass(slots=True, eq=False)
class Held:
    """A cell on disk. used_s: Unix seconds of its last use. record: see `encode_cell`. recorded: the journal has it."""

    id: int
    used_s: float
    codec: str
    record: bytes
    place: Place
    recorded: bool = False


@dataclass(slots=True)
class Contents:
    """What a journal says, ids in the order in which cells came. torn: something in it was not whole."""

    held: dict[int, tuple[Held, Known]] = field(default_factory=dict)
    torn: bool = False
    next_id: int = 0
    n_bytes: int = 0


def can_hold(cell: CellRef) -> bool:
    """Whether the cell's numbers fit a record's fields (all sane ones do)."""
    return (
        cell.extent.born < 1 << 64
        and cell.first_token < 1 << 64
        and cell.offset < 1 << 64
        and max(cell.extent.n_chunks, cell.grid.stages, cell.grid.head_groups, cell.shard, cell.position) < 1 << 32
        and 0 < cell.length < 1 << 32
        and len(cell.prefix_hash) == 16
        and len(cell.parent) in (0, 16)
    )


def encode_held(cells: Sequence[Held]) -> bytes:
    """Frames that say these are held."""
    out = []
    for first in range(0, len(cells), _FRAME_RECORDS):
        some = cells[first : first + _FRAME_RECORDS]
        codecs = {name: i for i, name in enumerate(dict.fromkeys(one.codec for one in some))}
        names = "".join(f"{name}\n" for name in codecs).encode()
        out.append(
            _frame(
                HELD,
                len(some),
                names,
                b"".join(_TIMED.pack(one.id, one.used_s, one.record, codecs[one.codec]) for one in some),
            )
        )
    return b"".join(out)


def encode_used(ids: Iterable[int], used_s: float) -> bytes:
    some = list(ids)
    return _frame(USED, len(some), b"", struct.pack(f"<d{len(some)}Q", used_s, *some))


def encode_gone(ids: Iterable[int]) -> bytes:
    some = list(ids)
    return _frame(GONE, len(some), b"", struct.pack(f"<{len(some)}Q", *some))


def _frame(kind: int, count: int, names: bytes, rest: bytes) -> bytes:
    head = _HEADER.pack(MAGIC, VERSION, kind, count, len(names), 0)[:-8]
    return b"".join([head, xxh3(head + names + rest).to_bytes(8, "little"), names, rest])


def encode_cell(cell: CellRef, place: Place) -> bytes:
    """The part of its record that never changes."""
    name = cell.extent
    return _CELL.pack(
        name.last_hash,
        bytes.fromhex(name.nonce),
        name.born,
        cell.prefix_hash,
        cell.parent,
        cell.first_token,
        cell.offset,
        cell.checksum,
        place.start,
        name.n_chunks,
        cell.grid.stages,
        cell.grid.head_groups,
        cell.shard,
        cell.position,
        cell.length,
        place.segment << 1 | (not cell.parent),
    )


def decode(data: bytes) -> Contents:
    """All that is whole in `data`."""
    contents, at = Contents(n_bytes=len(data)), 0
    view = memoryview(data)
    used: dict[int, float] = {}
    gone: set[int] = set()
    extents: dict[tuple[bytes, bytes, int, int, str], ExtentName] = {}  # one object each
    while at < len(data):
        end = _whole(view, at)
        if end is None:
            contents.torn = True
            at = data.find(MAGIC, at + 1)
            if at < 0:
                break
            continue
        _, _, kind, count, names_bytes, _ = _HEADER.unpack_from(view, at)
        body = view[at + _HEADER.size : end]
        if kind == HELD:
            _decode_held(body, names_bytes, contents.held, extents)
        elif kind == USED:
            time_s, *ids = struct.unpack(f"<d{count}Q", body)
            used.update(dict.fromkeys(ids, time_s))
        else:
            gone.update(struct.unpack(f"<{count}Q", body))
        at = end
    contents.next_id = max(contents.held, default=-1) + 1
    contents.next_id = max(contents.next_id, max(gone, default=-1) + 1)
    for one in gone:
        contents.held.pop(one, None)
    for one, time_s in used.items():
        if one in contents.held:
            contents.held[one][0].used_s = time_s
    return contents


def _whole(view: memoryview, at: int) -> int | None:
    """Where the frame that begins at `at` ends; None if it is not whole."""
    if at + _HEADER.size > len(view):
        return None
    magic, version, kind, count, names_bytes, checksum = _HEADER.unpack_from(view, at)
    if magic != MAGIC or version != VERSION or (names_bytes and kind != HELD):
        return None
    rest_bytes = {HELD: count * RECORD_BYTES, USED: 8 + 8 * count, GONE: 8 * count}.get(kind)
    if rest_bytes is None:
        return None
    end = at + _HEADER.size + names_bytes + rest_bytes
    if end > len(view):
        return None
    head, body = view[at : at + _HEADER.size - 8], view[at + _HEADER.size : end]
    return end if xxh3(b"".join([head, body])) == checksum else None


def _decode_held(
    body: memoryview,
    names_bytes: int,
    into: dict[int, tuple[Held, Known]],
    extents: dict[tuple[bytes, bytes, int, int, str], ExtentName],
) -> None:
    codec_names = bytes(body[:names_bytes]).decode("ascii", "replace").split("\n")
    codecs = [name if _CODEC.fullmatch(name) else None for name in codec_names]
    for id_, used_s, record, codec_number in _TIMED.iter_unpack(body[names_bytes:]):
        (
            last_hash, nonce, born, prefix_hash, parent, first_token, _, _, start,
            n_chunks, stages, head_groups, shard, position, length, segment,
        ) = _CELL.unpack(record)  # fmt: skip
        codec = codecs[codec_number] if codec_number < len(codecs) else None
        if codec is None or position >= n_chunks or shard >= stages * head_groups or not length or start % GRAIN_BYTES:
            continue
        key = (last_hash, nonce, n_chunks, born, codec)
        extent = extents.get(key)
        if extent is None:
            extent = extents[key] = ExtentName(last_hash, n_chunks, codec, born, nonce.hex())
        own = part(stages, head_groups, shard)
        above = None if segment & 1 else parent + own
        held = Held(id_, used_s, codec, record, Place(segment >> 1, start, length), True)
        into[id_] = held, Known(extent, prefix_hash + own, above, first_token, position)


class JournalFile:
    """The file itself. Not thread-safe: its owner holds a lock. Raises `OSError`; a failed append leaves no trace."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self.n_bytes = 0

    def read(self) -> Contents:
        try:
            return decode(self._path.read_bytes())
        except FileNotFoundError:
            return Contents()

    def open(self, n_bytes: int) -> None:
        """Go on after its first `n_bytes`."""
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._fd, n_bytes)
        self.n_bytes = n_bytes

    def append(self, frames: bytes) -> None:
        view, at = memoryview(frames), self.n_bytes
        try:
            while view:
                n = os.pwrite(self._fd, view, at)
                view, at = view[n:], at + n
        except OSError:
            os.ftruncate(self._fd, self.n_bytes)
            raise
        self.n_bytes = at

    def rewrite(self, frames: bytes) -> None:
        """Put another in its place, whole or not at all."""
        temporary = self._path.with_suffix(".new")
        try:
            temporary.write_bytes(frames)
            fd = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
            os.rename(temporary, self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self.close()
        self._fd, self.n_bytes = fd, len(frames)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
