"""Codecs by name, and the fidelity class of what they write."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from lmcache_s3.codecs.base import KVCodec
from lmcache_s3.codecs.cachegen import CachegenCodec
from lmcache_s3.codecs.registry import CODEC_IDS, fidelity_class, make_codec
from lmcache_s3.errors import Invalid


class Measured(CachegenCodec):
    @property
    def measured_kl(self) -> float | None:
        return 0.0125


@pytest.mark.parametrize("id", CODEC_IDS)
def test_every_codec_is_made_by_its_name(id: str) -> None:
    assert isinstance(make_codec(id), KVCodec)
    assert make_codec(id).id == id
    assert make_codec(id, {}).config == make_codec(id).config


@pytest.mark.parametrize(
    ("id", "config", "says"),
    [
        ("fats", None, "did you mean 'fast'"),
        ("CacheGen", None, "did you mean 'cachegen'"),
        ("", None, "there are fast, torch, safetensors, lossless, cachegen"),
        ("cachegen", {"levle": "fine"}, "did you mean 'level'"),
        ("cachegen", {"level": "finest"}, "fine, medium, coarse"),
        ("fast", {"level": "fine"}, "it has none"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(id: str, config: dict[str, object] | None, says: str) -> None:
    with pytest.raises(Invalid, match=says) as caught:
        make_codec(id, config)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_fidelity_classes() -> None:
    for exact in ("fast", "torch", "safetensors", "lossless"):
        assert fidelity_class(make_codec(exact), None) == fidelity_class(make_codec(exact), 0.02) == "exact"
    assert fidelity_class(make_codec("cachegen", {"level": "fine"}), None) == "unmeasured-cachegen-fine"
    assert fidelity_class(Measured(), 0.02) == "kl0.02"
    assert fidelity_class(Measured(), 1) == "kl1.0"
    assert fidelity_class(Measured(), None) == "kl0.0125"


@pytest.mark.parametrize("codec", [CachegenCodec(), Measured()], ids=["unmeasured", "worse"])
def test_a_bound_nobody_measured_is_not_promised(codec: KVCodec) -> None:
    with pytest.raises(Invalid, match=r"max_kl=0\.01"):
        fidelity_class(codec, 0.01)


@pytest.mark.parametrize("bound", [0, -1, float("nan"), float("inf")])
def test_bounds_that_are_none(bound: float) -> None:
    with pytest.raises(Invalid, match="above 0"):
        fidelity_class(make_codec("fast"), bound)


def test_the_registry_and_fast_stay_light() -> None:
    code = (
        "import sys, lmcache_s3.codecs.registry as r, lmcache_s3.extent\n"
        "r.make_codec('fast'); r.make_codec('lossless'); r.make_codec('cachegen'); r.make_codec('transform')\n"
        "heavy = {'torch', 'numba', 'zarr', 'safetensors', 'ml_dtypes'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_codec_with_a_header_is_registered_with_zarr() -> None:
    entries = {e.name: e.load() for e in importlib.metadata.entry_points(group="zarr.codecs") if "lmcache" in e.value}
    assert set(entries) == {f"lmcache_s3.{id}" for id in CODEC_IDS if id != "fast"}
    for name, adapter in entries.items():
        assert name == f"lmcache_s3.{adapter.codec_id}"
