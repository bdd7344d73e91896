"""Codec `torch`: a cell header, then `torch.save` of one tensor in its true dtype.

Such a file is a zip with a pickle in it, so the payload is proven harmless before torch sees it: the zip's entries are
stored, few and inside the payload; the pickle is, instruction for instruction, that of one contiguous CPU tensor of
the wanted shape and dtype over storage "0"; that storage has exactly the cell's bytes. Then an archive is written
again from these parts and given to `torch.load(weights_only=True)`.
Raises `Unusable` (header's kinds, payload) when decoding, `Invalid` for arrays that are not as their spec says.
"""

from __future__ import annotations

import io
import math
import pickletools  # parses instructions, runs none
import struct
import zipfile
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from lmcache_s3.codecs.arrays import check_array, contiguous, raw_bytes, storage_dtype
from lmcache_s3.codecs.base import JSON, CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.header import HEADER_BYTES, unwrap, wrap
from lmcache_s3.errors import Unusable
from lmcache_s3.types import Buffer

_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
_STORAGES = {"bfloat16": "torch BFloat16Storage", "float16": "torch HalfStorage", "float32": "torch FloatStorage"}

_MAX_ENTRIES = 16
_MAX_SMALL_BYTES = 4096
_OVERHEAD_BYTES = 16384
"""More than zip directory, pickle and padding ever take."""

_MEMO = {"BINPUT", "LONG_BINPUT"}
_INTEGERS = {"BININT", "BININT1", "BININT2", "LONG1"}


class TorchCodec(KVCodec):
    """`torch.save` of one tensor, read back without trusting it."""

    id: ClassVar[str] = "torch"
    exact: ClassVar[bool] = True

    @property
    def config(self) -> Mapping[str, JSON]:
        return {}

    def max_encoded_bytes(self, spec: CellSpec) -> int:
        return HEADER_BYTES + raw_bytes(spec) + _OVERHEAD_BYTES

    def encode(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> bytes:
        check_array(cell, spec, what="cell")
        # A fresh copy: torch saves the storage a tensor lies in, and shares memory with a NumPy array it came from.
        bits = bytearray(contiguous(cell, spec).reshape(-1).view(np.uint8).data)
        tensor = torch.frombuffer(bits, dtype=_DTYPES[spec.kv_dtype]).reshape(spec.shape)
        file = io.BytesIO()
        torch.save(tensor, file)
        return wrap(file.getbuffer(), spec, position)

    def decode(self, data: Buffer, spec: CellSpec, position: CellPosition | None, out: np.ndarray) -> None:
        check_array(out, spec, what="out")
        payload = bytes(unwrap(data, spec, position, max_bytes=self.max_encoded_bytes(spec)))
        archive = _proven_archive(payload, spec)
        try:
            tensor = torch.load(archive, map_location="cpu", weights_only=True, mmap=False)
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise Unusable(f"torch cannot read the payload: {error}", kind="payload") from error
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.dtype != _DTYPES[spec.kv_dtype]
            or tuple(tensor.shape) != spec.shape
            or not tensor.is_contiguous()
        ):
            raise Unusable("payload is not the tensor its pickle describes", kind="payload")
        bits = tensor.reshape(-1).view(torch.uint8).numpy()
        np.copyto(out, bits.view(storage_dtype(spec)).reshape(spec.shape))


def _proven_archive(payload: bytes, spec: CellSpec) -> io.BytesIO:
    """An archive of the same tensor, written by us from parts that were proven harmless.

    torch gets this one, never the stored one: its zip reader and Python's disagree on damaged zips, so what one has
    checked the other need not see.
    """
    if payload[-22:-18] != b"PK\x05\x06" or payload[-2:] != b"\0\0":
        raise Unusable("payload does not end as a zip without comment does", kind="payload")
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            entries = archive.infolist()
            root = _check_entries(entries, payload, spec)
            pickled, bits = archive.read(root + "data.pkl"), archive.read(root + "data/0")
            order = archive.read(root + "byteorder") if root + "byteorder" in archive.namelist() else b"little"
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, struct.error, RuntimeError) as error:
        # RuntimeError: encrypted entries, versions and methods that zipfile does not know
        raise Unusable(f"payload is no torch archive: {error}", kind="payload") from error
    if order != b"little" or len(bits) != raw_bytes(spec):
        raise Unusable("torch archive: big-endian, or its tensor has another length", kind="payload")
    _check_pickle(pickled, spec)
    proven = io.BytesIO()
    with zipfile.ZipFile(proven, "w") as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", order), ("data/0", bits), ("version", b"3\n")):
            archive.writestr("archive/" + name, data)
    proven.seek(0)
    return proven


def _check_entries(entries: list[zipfile.ZipInfo], payload: bytes, spec: CellSpec) -> str:
    """Returns the folder that all lie in, with a slash."""
    if not 0 < len(entries) <= _MAX_ENTRIES or len({e.filename for e in entries}) != len(entries):
        raise Unusable(f"torch archive of {len(entries)} entries", kind="payload")
    root = entries[0].filename.split("/", 1)[0] + "/"
    for entry in entries:
        tensor = entry.filename == root + "data/0"
        fits = entry.file_size == raw_bytes(spec) if tensor else entry.file_size <= _MAX_SMALL_BYTES
        if (
            entry.compress_type != zipfile.ZIP_STORED
            or entry.flag_bits & 1
            or entry.compress_size != entry.file_size
            or not fits
            or not entry.filename.startswith(root)
            or not 0 <= entry.header_offset <= len(payload) - entry.file_size
        ):
            raise Unusable(f"torch archive: entry {entry.filename[:60]!r} is not as torch writes it", kind="payload")
    names = {e.filename for e in entries}
    if not {root + "data/0", root + "data.pkl"} <= names:
        raise Unusable("torch archive lacks its tensor", kind="payload")
    return root


def _check_pickle(pickled: bytes, spec: CellSpec) -> None:
    """Compare the pickle with the only one admitted. (torch compares no element counts with storage sizes.)"""
    try:
        found = [
            ("integer" if op.name in _INTEGERS else op.name, arg)
            for op, arg, _ in pickletools.genops(pickled)
            if op.name not in _MEMO
        ]
    except (ValueError, TypeError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise Unusable(f"torch archive: no pickle: {error}", kind="payload") from error
    if found != _expected_pickle(spec):
        raise Unusable("torch archive: its pickle is not that of one plain tensor of this cell", kind="payload")


def _expected_pickle(spec: CellSpec) -> list[tuple[str, object]]:
    elements = math.prod(spec.shape)
    strides = [math.prod(spec.shape[axis + 1 :]) for axis in range(len(spec.shape))]
    typed = spec.kv_dtype in _STORAGES
    version = 2 if typed else 3
    # Untyped storages count bytes, typed ones elements; the types that need them here have one byte an element.
    storage = _STORAGES[spec.kv_dtype] if typed else "torch.storage UntypedStorage"
    return [
        ("PROTO", 2),
        ("GLOBAL", f"torch._utils _rebuild_tensor_v{version}"),
        ("MARK", None),
        ("MARK", None),
        ("BINUNICODE", "storage"),
        ("GLOBAL", storage),
        ("BINUNICODE", "0"),
        ("BINUNICODE", "cpu"),
        ("integer", elements),
        ("TUPLE", None),
        ("BINPERSID", None),
        ("integer", 0),
        ("MARK", None),
        *(("integer", length) for length in spec.shape),
        ("TUPLE", None),
        ("MARK", None),
        *(("integer", stride) for stride in strides),
        ("TUPLE", None),
        ("NEWFALSE", None),
        ("GLOBAL", "collections OrderedDict"),
        ("EMPTY_TUPLE", None),
        ("REDUCE", None),
        *(() if typed else (("GLOBAL", f"torch {spec.kv_dtype}"),)),
        ("TUPLE", None),
        ("REDUCE", None),
        ("STOP", None),
    ]
