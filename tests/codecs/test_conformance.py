"""Every codec passes the suite that ships with the package."""

from __future__ import annotations

import pytest

from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.codecs.cachegen import LEVELS
from lmcache_s3.codecs.registry import CODEC_IDS, make_codec
from lmcache_s3.testing.codec import CodecTests


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


@pytest.mark.parametrize("id", CODEC_IDS)
def test_no_codec_goes_without_the_suite(id: str) -> None:
    tested = [suite().make_codec() for suite in CodecTests.__subclasses__()]
    assert {codec.level for codec in tested if codec.id == id} == (set(LEVELS) if id == "cachegen" else {"exact"})
