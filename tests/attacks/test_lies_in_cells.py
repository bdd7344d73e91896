"""Every way to lie inside a stored cell whose checksums are right, for the liar computed them; and what it would gain.

The cache never gets here with foreign bytes (the index's XXH3-64 is checked before), but plain Zarr readers do.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.cachegen import CachegenCodec
from lmcache_s3.codecs.dtypes import LARGEST, to_float32
from lmcache_s3.codecs.header import HEADER_BYTES, wrap
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Unusable
from lmcache_s3.testing.extents import random_bits
from lmcache_s3.types import KVDtype

SPEC = CellSpec((2, 3, 16, 2, 8), "bfloat16")
POSITION = CellPosition(bytes(range(16)), 512, 2, 1)
CELL = random_bits(SPEC.shape, SPEC.kv_dtype, np.random.default_rng(0))


def refuse(codec_id: str, payload: bytes, spec: CellSpec = SPEC) -> Unusable:
    """The payload under a right header is `Unusable`, with and without a position, and `out` keeps its length."""
    out = np.zeros(spec.shape, random_bits(spec.shape, spec.kv_dtype, np.random.default_rng(0)).dtype)
    data = wrap(payload, spec, POSITION)
    caught: Unusable | None = None
    for position in (None, POSITION):
        with pytest.raises(Unusable) as info:
            make_codec(codec_id).decode(data, spec, position, out)
        caught = info.value
    assert caught is not None
    return caught


def payload_of(codec_id: str, spec: CellSpec = SPEC) -> bytes:
    cell = random_bits(spec.shape, spec.kv_dtype, np.random.default_rng(0))
    return make_codec(codec_id).encode(cell, spec, POSITION)[HEADER_BYTES:]


class TestTorch:
    """A .pt is a program in a zip."""

    class Armed:
        """Pickles to a call; loading it must never make the call."""

        def __init__(self, function: Callable[..., object], *args: object) -> None:
            self.call = (function, args)

        def __reduce__(self) -> tuple[object, ...]:
            return self.call

    def saved(self, thing: object) -> bytes:
        file = io.BytesIO()
        torch.save(thing, file)
        return file.getvalue()

    def rewritten(self, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
        """The zip of an honest cell, written again by Python with some entries changed."""
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(payload_of("torch"))) as old, zipfile.ZipFile(file, "w", compression) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, change(entry.filename, old.read(entry)))
        return file.getvalue()

    def test_rewriting_alone_is_no_lie(self) -> None:
        data = wrap(self.rewritten(lambda name, data: data), SPEC, POSITION)
        out = np.empty_like(CELL)
        make_codec("torch").decode(data, SPEC, POSITION, out)
        assert (out == CELL).all()

    def test_a_pickle_that_runs_code(self, tmp_path: object) -> None:
        fired: list[int] = []
        for armed in (self.Armed(print, "fired"), self.Armed(eval, "1+1"), self.Armed(bytearray, 2**40)):
            refuse("torch", self.saved(armed))
        assert not fired

    def test_a_bytearray_of_a_terabyte(self) -> None:
        """weights_only admits `bytearray`, with any length: memory gone before a single check of the result."""
        pickle = b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."
        error = refuse("torch", self.rewritten(lambda name, data: pickle if name.endswith("data.pkl") else data))
        assert "pickle" in str(error)

    def test_more_elements_than_the_storage_has(self) -> None:
        """torch does not compare them: the tensor would show the process's memory behind the storage."""
        count = math.prod(SPEC.shape)

        def lie(name: str, data: bytes) -> bytes:
            if not name.endswith("data.pkl"):
                return data
            assert data.count(struct.pack("<BH", ord("M"), count)) == 1
            return data.replace(struct.pack("<BH", ord("M"), count), struct.pack("<BH", ord("M"), 65535))

        refuse("torch", self.rewritten(lie))

    def test_a_storage_shorter_or_longer_than_the_tensor(self) -> None:
        for size in (0, 10, CELL.nbytes - 2, CELL.nbytes + 2):
            other = bytes(size)
            refuse("torch", self.rewritten(lambda name, data, other=other: other if "data/0" in name else data))  # type: ignore[misc]

    def test_a_zip_bomb(self) -> None:
        refuse("torch", self.rewritten(lambda name, data: data, zipfile.ZIP_DEFLATED))
        refuse("torch", self.rewritten(lambda name, data: bytes(2**26) if "version" in name else data, 8))

    def test_a_directory_that_declares_absurd_sizes(self) -> None:
        honest = payload_of("torch")
        at = honest.index(b"PK\x01\x02")
        for field, value in ((20, 0xFFFFFFFE), (24, 0xFFFFFFFE), (42, 0xFFFFFFF0), (10, 8), (8, 1)):
            lying = bytearray(honest)
            width = "<H" if field in (8, 10) else "<I"
            struct.pack_into(width, lying, at + field, value)
            refuse("torch", bytes(lying))

    def test_a_pickle_that_only_torch_would_see(self) -> None:
        """Python's zip reader allows bytes before the archive and shifts all offsets, torch's does not. With the liar's
        pickle where torch would look and the honest one where Python looks, a check by one protects nobody from the
        other: so torch is given an archive of our own making."""
        honest = payload_of("torch")
        shifted = bytes(64) + honest
        try:
            out = np.zeros_like(CELL)
            make_codec("torch").decode(wrap(shifted, SPEC, POSITION), SPEC, None, out)
        except Unusable:
            return
        assert (out == CELL).all(), "what was proven is what was loaded"

    def test_memo_tricks_in_the_pickle(self) -> None:
        """A number fetched from the memo is not a number written down."""
        count = struct.pack("<BH", ord("M"), math.prod(SPEC.shape))
        for other in (b"h\x00", b"\x94", b"I1536\n"):
            refuse(
                "torch",
                self.rewritten(lambda name, data, o=other: data.replace(count, o) if "data.pkl" in name else data),  # type: ignore[misc]
            )

    def test_a_second_directory_behind_the_first(self) -> None:
        """Two readers of one zip that see different files: only one end record is admitted, at the very end."""
        honest = payload_of("torch")
        refuse("torch", honest + b"PK\x05\x06" + bytes(16) + b"\x04\x00junk")
        refuse("torch", honest[:-2] + struct.pack("<H", 1) + b"!")

    def test_thousands_of_entries(self) -> None:
        file = io.BytesIO(payload_of("torch"))
        with zipfile.ZipFile(file, "a") as archive:
            for number in range(100):
                archive.writestr(f"archive/{number}", b"")
        refuse("torch", file.getvalue())

    @pytest.mark.parametrize(
        "thing",
        [
            torch.zeros(SPEC.shape, dtype=torch.float16),
            torch.zeros(SPEC.shape[:4], dtype=torch.bfloat16),
            torch.zeros(SPEC.shape, dtype=torch.bfloat16).transpose(2, 4).contiguous().transpose(2, 4),
            torch.zeros(1, dtype=torch.bfloat16).expand(SPEC.shape),
            torch.zeros(SPEC.shape, dtype=torch.bfloat16, requires_grad=True),
            torch.zeros(SPEC.shape, dtype=torch.bfloat16).to_sparse(),
            [torch.zeros(SPEC.shape, dtype=torch.bfloat16)],
            {"kv": 1},
            b"",
        ],
        ids=["dtype", "shape", "strides", "expanded", "grad", "sparse", "list", "dict", "bytes"],
    )
    def test_something_else_that_torch_can_save(self, thing: object) -> None:
        refuse("torch", self.saved(thing))

    def test_the_old_format_which_is_a_bare_pickle(self) -> None:
        file = io.BytesIO()
        torch.save(torch.zeros(SPEC.shape, dtype=torch.bfloat16), file, _use_new_zipfile_serialization=False)
        refuse("torch", file.getvalue())


class TestSafetensors:
    def file(self, header: object, data: bytes) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    def tensor(self, **changes: object) -> dict[str, object]:
        return {"dtype": "BF16", "shape": list(SPEC.shape), "data_offsets": [0, CELL.nbytes], **changes}

    def test_the_honest_file_is_read(self) -> None:
        out = np.empty_like(CELL)
        data = wrap(self.file({"kv": self.tensor()}, CELL.tobytes()), SPEC, POSITION)
        make_codec("safetensors").decode(data, SPEC, POSITION, out)
        assert (out == CELL).all()

    @pytest.mark.parametrize(
        "changes",
        [
            {"dtype": "F16"},
            {"dtype": "U16"},
            {"dtype": "XX"},
            {"shape": [2, 3, 16, 16]},
            {"shape": [2, 3, 16, 8, 2]},
            {"shape": [2**63, 2**63]},
            {"shape": [2, 3, 16, 2, -8]},
            {"data_offsets": [0, 2**62]},
            {"data_offsets": [2, CELL.nbytes]},
            {"data_offsets": [CELL.nbytes, 0]},
        ],
        ids=str,
    )
    def test_descriptions_that_do_not_fit(self, changes: dict[str, object]) -> None:
        refuse("safetensors", self.file({"kv": self.tensor(**changes)}, CELL.tobytes()))

    def test_other_files(self) -> None:
        half = CELL.nbytes // 2
        two = {"kv": self.tensor(), "b": {"dtype": "U8", "shape": [0], "data_offsets": [half * 2, half * 2]}}
        for header in ({}, {"k": self.tensor()}, two, b"{", b"", b"[" * 900, b'{"__metadata__":{}}'):
            refuse("safetensors", self.file(header, CELL.tobytes()))

    def test_a_description_longer_than_any(self) -> None:
        """The library would parse a hundred megabytes of JSON."""
        for length in (2**63, 2**64 - 1, 1025, 10**8):
            refuse("safetensors", struct.pack("<Q", length) + CELL.tobytes())
        refuse("safetensors", b"")
        refuse("safetensors", b"\x01")


ROWS = SPEC.shape[0] * SPEC.shape[1]


class TestCachegen:
    """The payload's fixed part: version, mode, first exact, dtype, words, escapes; then the sections."""

    def test_fixed_fields(self) -> None:
        honest = payload_of("cachegen")
        for at, values in ((0, (0, 2, 255)), (1, (2, 255)), (2, (1, 2, 255)), (3, (0, 2, 6, 255))):
            for value in values:
                refuse("cachegen", honest[:at] + bytes([value]) + honest[at + 1 :])

    @pytest.mark.parametrize("count", [0, 1, 2**16, 2**31, 2**32 - 1])
    @pytest.mark.parametrize("at", [4, 8])
    def test_counts_that_would_move_the_sections_or_allocate(self, at: int, count: int) -> None:
        honest = bytearray(payload_of("cachegen"))
        if struct.unpack_from("<I", honest, at)[0] != count:
            struct.pack_into("<I", honest, at, count)
            refuse("cachegen", bytes(honest))

    def test_rows_that_do_not_add_up(self) -> None:
        """A row's words or escapes taken from its neighbour, or from beyond the payload."""
        honest = payload_of("cachegen")
        for at in (12, 12 + 4 * ROWS):
            for first, second in ((-1, 1), (2**31, -(2**31)), (1, 0), (2**32 - 1, 0)):
                lying = bytearray(honest)
                counts = struct.unpack_from("<II", honest, at)
                struct.pack_into("<II", lying, at, *((c + d) % 2**32 for c, d in zip(counts, (first, second))))  # noqa: B905
                refuse("cachegen", bytes(lying))

    def test_words_and_escapes_trade_places(self) -> None:
        """A word is two escapes: the sizes add up, the stream does not."""
        honest = bytearray(payload_of("cachegen"))
        words, escapes = struct.unpack_from("<II", honest, 4)
        (first_words,), (first_escapes,) = (struct.unpack_from("<I", honest, at) for at in (12, 12 + 4 * ROWS))
        struct.pack_into("<II", honest, 4, words - 1, escapes + 2)
        struct.pack_into("<I", honest, 12, first_words - 1)
        struct.pack_into("<I", honest, 12 + 4 * ROWS, first_escapes + 2)
        assert "stream" in str(refuse("cachegen", bytes(honest)))

    def test_steps_that_are_out_of_range(self) -> None:
        honest = bytearray(payload_of("cachegen"))
        for base in (0, 60, 0x7F8, 0xFFFF):
            struct.pack_into("<H", honest, 12 + 8 * ROWS, base)
            assert "step" in str(refuse("cachegen", bytes(honest)))

    def test_tables_there_are_not(self) -> None:
        for place in range(3):
            for table in (111, 255):
                honest = bytearray(payload_of("cachegen"))
                honest[12 + 10 * ROWS + place] = table
                assert "table" in str(refuse("cachegen", bytes(honest)))

    def test_raw_cells_of_another_length(self) -> None:
        fixed = struct.pack("<BBBBII", 1, 0, 0, 1, 0, 0)
        for size in (0, CELL.nbytes - 1, CELL.nbytes - 2):
            refuse("cachegen", fixed + bytes(size))
        for lie in ((1, 0, 1, 1, 0, 0), (1, 0, 0, 1, 1, 0), (1, 0, 0, 1, 0, 1)):
            refuse("cachegen", struct.pack("<BBBBII", *lie) + CELL.tobytes())

    def test_a_cell_of_one_token_has_nothing_quantised(self) -> None:
        spec = CellSpec((2, 3, 1, 2, 8), "bfloat16")
        refuse("cachegen", struct.pack("<BBBBII", 1, 1, 1, 1, 0, 0) + bytes(100), spec)

    @pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "float8_e4m3fn"])
    def test_numbers_that_overflow_stay_finite(self, kv_dtype: KVDtype) -> None:
        """The largest steps there may be: saturated, never infinite or NaN, no warning."""
        spec = CellSpec((1, 1, 512, 1, 4), kv_dtype)
        cell = random_bits(spec.shape, kv_dtype, np.random.default_rng(0))
        lying = bytearray(CachegenCodec().encode(cell, spec, POSITION)[HEADER_BYTES:])
        assert lying[1] == 1
        out = np.empty_like(cell)
        for base in range(868, 840, -1):
            struct.pack_into("<H", lying, 12 + 8, base)
            try:
                CachegenCodec().decode(wrap(bytes(lying), spec, POSITION), spec, None, out)
                break
            except Unusable:
                continue
        assert base > 850
        values = to_float32(out, kv_dtype)
        assert np.isfinite(values).all()
        assert kv_dtype == "bfloat16" or values.max() == -values.min() == LARGEST[kv_dtype]
