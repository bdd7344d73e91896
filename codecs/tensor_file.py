"""Safetensors files, read without trust and written always alike.

Reading copies nothing: arrays are read-only views of the bytes given. Dtypes: those of `DTYPES`. Offsets must follow
one another without gaps or overlaps and end where the file ends. Raises `Unusable` of the kind asked for, nothing else.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NoReturn, TypeGuard

import numpy as np

from lmcache_s3.errors import Unusable

DTYPES: dict[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I16": "<i2", "U8": "|u1"}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 64 << 20
_MAX_AXES = 8


def write_tensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The file: widest types first, then by name, so that all arrays are aligned behind a header of a multiple of 8."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    parts: list[bytes] = []
    at = 0
    for name in order:
        array = tensors[name]
        dtype = array.dtype.newbyteorder("<")
        parts.append(np.ascontiguousarray(array, dtype).tobytes())
        end = at + len(parts[-1])
        header[name] = {"dtype": _NAMES[dtype], "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((_LENGTH.pack(len(text)), text, *parts))


def read_tensors(data: bytes, *, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, metadata). Raises `Unusable` of that kind."""

    def refuse(text: str) -> NoReturn:
        raise Unusable(f"safetensors: {text}", kind=kind)

    if len(data) < _LENGTH.size:
        refuse("shorter than its length")
    (length,) = _LENGTH.unpack_from(data)
    begin = _LENGTH.size + length
    if length > _MAX_HEADER_BYTES or begin > len(data):
        refuse(f"a header of {length} bytes in {len(data)}")
    try:
        header = json.loads(data[_LENGTH.size : begin])
    except (ValueError, RecursionError) as error:
        raise Unusable(f"safetensors: its header is not JSON ({error})", kind=kind) from error
    if not isinstance(header, dict):
        refuse("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse("its metadata are no texts")
    placed: list[tuple[int, int, str, np.dtype, list[int]]] = []
    for name, entry in header.items():
        said: dict[str, Any] = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = said.get("dtype"), said.get("shape"), said.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPES or not _lengths(shape) or not _lengths(offsets):
            refuse(f"{name[:40]!r} is described as {str(entry)[:100]}")
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
            refuse(f"{name[:40]!r} does not fill its place")
        placed.append((offsets[0], offsets[1], name, np.dtype(DTYPES[dtype]), shape))
    at = 0
    arrays: dict[str, np.ndarray] = {}
    view = memoryview(data)[begin:]
    for first, last, name, dtype, shape in sorted(placed, key=lambda one: one[:3]):
        if first != at or last > len(view):
            refuse(f"{name[:40]!r} lies at {first} … {last}, not at {at} or not within {len(view)}")
        arrays[name] = np.frombuffer(view[first:last], dtype).reshape(shape)
        at = last
    if at != len(view):
        refuse(f"{len(view) - at} bytes belong to nothing")
    return arrays, metadata


def _lengths(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_AXES
        and all(type(one) is int and 0 <= one < 1 << 48 for one in value)
    )
