"""`CodecTests`: what every KVCodec must do. Subclass it, name your codec, and pytest runs it.

    class TestMine(CodecTests):
        def make_codec(self) -> KVCodec:
            return MyCodec()

One that fits only some models gives for each spec and place the codec to encode with (`codec_for`).

It checks round trips of every dtype and of odd shapes, strides, buffer types, threads, positions, and that bytes which
were cut, lengthened or changed are `Unusable` and never an array, a crash or a write outside `out`. It does not measure
what a lossy codec costs in quality.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import ClassVar, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_s3.codecs.arrays import raw_bytes
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.dtypes import to_float32
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.testing.extents import any_bits, random_bits
from lmcache_s3.types import KVDtype

DTYPES: tuple[KVDtype, ...] = get_args(KVDtype)
POSITION = CellPosition(bytes(range(16)), 512, 2, 1)
SPEC = CellSpec((2, 3, 16, 2, 8), "bfloat16")

shapes = st.tuples(
    st.integers(1, 2), st.integers(1, 4), st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 3, 8, 16])
)
quick = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
)


class CodecTests:
    """The conformance suite. says_position: its cells carry their position (all but `fast` must)."""

    says_position: ClassVar[bool] = True

    def make_codec(self) -> KVCodec:
        raise AssertionError("a subclass names its codec")

    def codec_for(self, spec: CellSpec, position: CellPosition) -> KVCodec:
        """What encodes such a cell; its cells, too, are decoded by `make_codec`'s."""
        return self.make_codec()

    @pytest.fixture
    def codec(self) -> KVCodec:
        return self.make_codec()

    @pytest.fixture
    def stored(self, codec: KVCodec) -> bytes:
        return codec.encode(random_bits(SPEC.shape, SPEC.kv_dtype, np.random.default_rng(1)), SPEC, POSITION)

    def decoded(self, data: bytes, spec: CellSpec, position: CellPosition | None) -> np.ndarray:
        out = np.empty_like(random_bits(spec.shape, spec.kv_dtype, np.random.default_rng(0)))
        self.make_codec().decode(data, spec, position, out)
        return out

    @quick
    @given(
        shape=shapes, kv_dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1), first=st.sampled_from([0, 64])
    )
    def test_what_is_encoded_is_decoded(
        self, shape: tuple[int, int, int, int, int], kv_dtype: KVDtype, seed: int, first: int
    ) -> None:
        spec, position = CellSpec(shape, kv_dtype), replace(POSITION, first_token=first)
        codec = self.codec_for(spec, position)
        cell = random_bits(shape, kv_dtype, np.random.default_rng(seed))
        data = codec.encode(cell, spec, position)
        assert type(data) is bytes
        assert len(data) <= codec.max_encoded_bytes(spec)
        out = self.decoded(data, spec, position)
        if codec.exact:
            assert out.tobytes() == cell.tobytes()
        else:
            self.check_close(to_float32(cell, kv_dtype), to_float32(out, kv_dtype))
            if first == 0:
                assert out[:, :, :1].tobytes() == cell[:, :, :1].tobytes(), "the prompt's first token is exact"
        assert self.decoded(data, spec, None).tobytes() == out.tobytes()

    def check_close(self, wanted: np.ndarray, got: np.ndarray) -> None:
        """For lossy codecs: finite, and no value further off than its layer's K or V is wide."""
        assert np.isfinite(got).all()
        width = np.abs(wanted).max(axis=(2, 3, 4), keepdims=True)
        assert (np.abs(got - wanted) <= width).all()

    @quick
    @given(shape=shapes, kv_dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1))
    def test_any_bit_patterns_can_be_stored(
        self, shape: tuple[int, int, int, int, int], kv_dtype: KVDtype, seed: int
    ) -> None:
        spec = CellSpec(shape, kv_dtype)
        codec = self.codec_for(spec, POSITION)
        cell = any_bits(shape, kv_dtype, np.random.default_rng(seed))
        out = self.decoded(codec.encode(cell, spec, POSITION), spec, POSITION)
        finite = np.isfinite(to_float32(cell, kv_dtype))
        assert not codec.exact or out.tobytes() == cell.tobytes()
        assert out[~finite].tobytes() == cell[~finite].tobytes(), "what cannot be quantised is kept"
        assert np.isfinite(to_float32(out, kv_dtype)[finite]).all()

    def test_strides_do_not_matter(self, codec: KVCodec) -> None:
        wide = random_bits((2, 6, 16, 4, 8), "bfloat16", np.random.default_rng(2))
        cell = wide[:, 1:4, :, 1:3]
        data = codec.encode(cell, SPEC, POSITION)
        assert data == codec.encode(np.ascontiguousarray(cell), SPEC, POSITION)
        target = np.full_like(wide, 0xABCD)
        codec.decode(data, SPEC, POSITION, target[:, 1:4, :, 1:3])
        assert target[:, 1:4, :, 1:3].tobytes() == self.decoded(data, SPEC, POSITION).tobytes()
        target[:, 1:4, :, 1:3] = 0xABCD
        assert (target == 0xABCD).all(), "decode wrote outside `out`"

    def test_encoding_is_a_function_of_its_arguments(self, codec: KVCodec) -> None:
        cell = random_bits(SPEC.shape, SPEC.kv_dtype, np.random.default_rng(3))
        before = cell.copy()
        first = codec.encode(cell, SPEC, POSITION)
        assert codec.encode(cell, SPEC, POSITION) == first == self.make_codec().encode(cell, SPEC, POSITION)
        assert (cell == before).all()

    def test_every_kind_of_buffer_is_read(self, codec: KVCodec, stored: bytes) -> None:
        wanted = self.decoded(stored, SPEC, POSITION)
        padded = b"xyz" + stored
        for data in (bytearray(stored), memoryview(stored), memoryview(bytearray(stored)), memoryview(padded)[3:]):
            out = np.empty_like(wanted)
            codec.decode(data, SPEC, POSITION, out)
            assert (out == wanted).all()

    def test_many_threads_at_once(self, codec: KVCodec) -> None:
        def round_trip(seed: int) -> bool:
            cell = random_bits(SPEC.shape, SPEC.kv_dtype, np.random.default_rng(seed))
            data = codec.encode(cell, SPEC, POSITION)
            out = np.empty_like(cell)
            codec.decode(data, SPEC, POSITION, out)
            return data == codec.encode(cell, SPEC, POSITION) and (not codec.exact or bool((out == cell).all()))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(round_trip, range(64)))

    def test_another_position_is_refused(self, codec: KVCodec, stored: bytes) -> None:
        if not self.says_position:
            return
        others = [
            replace(POSITION, prefix_hash=bytes(16)),
            replace(POSITION, first_token=256),
            replace(POSITION, first_layer=3),
            replace(POSITION, first_head=0),
        ]
        for other in others:
            with pytest.raises(Unusable) as caught:
                self.decoded(stored, SPEC, other)
            assert caught.value.kind == "position"

    def test_a_cut_or_lengthened_cell_is_unusable(self, stored: bytes) -> None:
        for length in sorted({0, 1, 3, 4, 8, 55, 56, 57, len(stored) // 2, len(stored) - 4, len(stored) - 1}):
            for position in (None, POSITION):
                with pytest.raises(Unusable):
                    self.decoded(stored[:length], SPEC, position)
        for extra in (b"\0", b"\0" * 4096, stored):
            for position in (None, POSITION):
                with pytest.raises(Unusable):
                    self.decoded(stored + extra, SPEC, position)

    def test_a_flipped_bit_is_unusable(self, stored: bytes) -> None:
        rng = np.random.default_rng(4)
        places = [*range(64), *rng.integers(0, len(stored), 300), *range(len(stored) - 64, len(stored))]
        for place in places:
            changed = bytearray(stored)
            changed[place] ^= 1 << int(rng.integers(8))
            with pytest.raises(Unusable):
                self.decoded(bytes(changed), SPEC, None)

    @pytest.mark.parametrize(
        "other",
        [
            CellSpec((2, 3, 16, 2, 4), "bfloat16"),
            CellSpec((2, 3, 32, 2, 8), "bfloat16"),
            CellSpec((2, 3, 16, 2, 8), "float32"),
            CellSpec((2, 3, 16, 2, 8), "float8_e5m2"),
        ],
        ids=str,
    )
    def test_a_cell_of_another_spec_is_unusable(self, stored: bytes, other: CellSpec) -> None:
        for position in (None, POSITION):
            with pytest.raises(Unusable):
                self.decoded(stored, other, position)

    def test_arrays_that_are_not_as_the_spec_says_are_refused(self, codec: KVCodec, stored: bytes) -> None:
        cell = random_bits(SPEC.shape, SPEC.kv_dtype, np.random.default_rng(5))
        wrong: list[np.ndarray] = [cell.astype(np.float32), cell[:1], cell.view(np.int16), cell.reshape(2, 3, 16, 16)]
        for array in wrong:
            with pytest.raises(Invalid):
                codec.encode(array, SPEC, POSITION)
            with pytest.raises(Invalid):
                codec.decode(stored, SPEC, POSITION, array)

    def test_size_is_bounded_before_encoding(self, codec: KVCodec) -> None:
        for shape in ((1, 1, 1, 1, 1), SPEC.shape, (2, 64, 256, 8, 128)):
            for kv_dtype in DTYPES:
                spec = CellSpec(shape, kv_dtype)
                bound = codec.max_encoded_bytes(spec)
                assert raw_bytes(spec) <= bound <= raw_bytes(spec) + 65536

    def test_its_configuration_makes_it_again(self, codec: KVCodec, stored: bytes) -> None:
        again = make_codec(codec.id, codec.config)
        assert (again.id, again.config, again.level) == (codec.id, codec.config, codec.level)
        out = self.decoded(stored, SPEC, POSITION)
        with_defaults = np.empty_like(out)
        make_codec(codec.id).decode(stored, SPEC, POSITION, with_defaults)
        assert (out == with_defaults).all(), "the index knows the codec's id only: its defaults decode every cell"

    def test_what_it_promises_of_its_error_makes_sense(self, codec: KVCodec) -> None:
        assert codec.measured_kl is None or codec.measured_kl >= 0
        assert not codec.exact or (codec.measured_kl == 0 and codec.level == "exact")
