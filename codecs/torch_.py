"""Codec `torch`: a cell header, then `torch.save` of one tensor in its true dtype.

Such a file is a zip with a pickle in it, so the payload is proven harmless before torch sees it: the zip's entries are
stored, few and inside the payload; the pickle is, instruction for instruction, that of one contiguous CPU tensor of
the wanted shape and dtype over storage "0"; that storage has exactly the cell's bytes. Then
`torch.load(weights_only=True)`.
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

_MEMO = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}


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
        _check_archive(payload, spec)
        try:
            tensor = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True, mmap=False)
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


def _check_archive(payload: bytes, spec: CellSpec) -> None:
    """Prove that the zip holds one tensor of this spec and nothing that could make a loader work or allocate more."""
    if payload[-22:-18] != b"PK\x05\x06" or payload[-2:] != b"\0\0":
        raise Unusable("payload does not end as a zip without comment does", kind="payload")
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            entries = archive.infolist()
            _check_entries(entries, payload, spec)
            pickled = archive.read(next(e for e in entries if e.filename.endswith("/data.pkl")))
            order = [archive.read(e) for e in entries if e.filename.endswith("/byteorder")]
    except (
        zipfile.BadZipFile,
        ValueError,
        EOFError,
        OSError,
        struct.error,
        StopIteration,
        RuntimeError,  # zipfile: encrypted entries, versions it does not know
    ) as error:
        raise Unusable(f"payload is no torch archive: {error}", kind="payload") from error
    if order not in ([], [b"little"]):
        raise Unusable("payload is a big-endian archive", kind="payload")
    _check_pickle(pickled, spec)


def _check_entries(entries: list[zipfile.ZipInfo], payload: bytes, spec: CellSpec) -> None:
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


def _check_pickle(pickled: bytes, spec: CellSpec) -> None:
    """Compare the pickle with the only one admitted. (torch compares no element counts with storage sizes.)"""
    try:
        found = [
            ("INT", arg) if isinstance(arg, int) and op.name != "PROTO" else (op.name, arg)
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
        ("INT", elements),
        ("TUPLE", None),
        ("BINPERSID", None),
        ("INT", 0),
        ("MARK", None),
        *(("INT", length) for length in spec.shape),
        ("TUPLE", None),
        ("MARK", None),
        *(("INT", stride) for stride in strides),
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
