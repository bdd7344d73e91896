"""Every codec passes the suite that ships with the package."""

from __future__ import annotations

import numpy as np
import pytest

from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.cachegen import LEVELS
from lmcache_s3.codecs.registry import CODEC_IDS, make_codec
from lmcache_s3.testing.calibrations import encoder
from lmcache_s3.testing.codec import POSITION, SPEC, CodecTests


class TestFast(CodecTests):
    says_position = False  # Zarr's standard codecs carry none; the index's checksum guards its place

    def make_codec(self) -> KVCodec:
        return make_codec("fast")


class TestTorch(CodecTests):
    def make_codec(self) -> KVCodec:
        return make_codec("torch")


class TestSafetensors(CodecTests):
    def make_codec(self) -> KVCodec:
        return make_codec("safetensors")


class TestLossless(CodecTests):
    def make_codec(self) -> KVCodec:
        return make_codec("lossless")


class TestCachegenFine(CodecTests):
    def make_codec(self) -> KVCodec:
        return make_codec("cachegen", {"level": "fine"})


class TestCachegenMedium(CodecTests):
    def make_codec(self) -> KVCodec:
        return make_codec("cachegen")


class TestCachegenCoarse(CodecTests):
    def make_codec(self) -> KVCodec:
        return make_codec("cachegen", {"level": "coarse"})


class TestTransform(CodecTests):
    def make_codec(self) -> KVCodec:
        return encoder("transform", SPEC, POSITION)

    def codec_for(self, spec: CellSpec, position: CellPosition) -> KVCodec:
        return encoder("transform", spec, position)

    def check_close(self, wanted: np.ndarray, got: np.ndarray) -> None:
        """Its steps are the calibration's, whatever the values: a quarter, spread over a unit's values."""
        assert np.isfinite(got).all()
        assert (np.abs(got - wanted) <= 1 + 0.2 * np.abs(wanted)).all()


@pytest.mark.parametrize("id", CODEC_IDS)
def test_no_codec_goes_without_the_suite(id: str) -> None:
    tested = [suite().make_codec() for suite in CodecTests.__subclasses__()]
    levels = {codec.level for codec in tested if codec.id == id}
    assert levels == (set(LEVELS) if id == "cachegen" else {"exact"}) or (id == "transform" and len(levels) == 1)
