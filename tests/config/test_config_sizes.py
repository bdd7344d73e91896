"""Sizes that do not go with a model: an error where nothing could ever fit, a warning where little does."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.config import load_settings
from lmcache_s3.config_sizes import check_sizes
from lmcache_s3.errors import Invalid
from lmcache_s3.types import Geometry, Grid

LARGE = Geometry(kv=2, layers=32, heads=8, head_dim=128, kv_dtype="bfloat16", chunk_tokens=256)
"""A chunk takes 32 MiB."""


def warnings(codec: str = "fast", grid: Grid = Grid(), processes: int = 1, **settings: Any) -> list[str]:  # noqa: B008
    known = load_settings(url="memory://x", codec=codec, **settings)
    return check_sizes(known, LARGE, make_codec(codec), grid, processes=processes)


@pytest.mark.parametrize("codec", ["fast", "torch", "safetensors", "lossless", "cachegen"])
def test_the_defaults_are_enough(codec: str) -> None:
    assert warnings(codec) == []
    assert warnings(codec, write_behind_s=60, disk_bytes="1GiB", disk_path="/d", device_bytes="1GiB") == []


@pytest.mark.parametrize("name", ["host_bytes", "device_bytes", "disk_bytes"])
def test_a_tier_in_which_no_chunk_fits(name: str) -> None:
    disk: dict[str, Any] = {"disk_path": "/d"} if name == "disk_bytes" else {}
    little: dict[str, Any] = {name: "16MiB"}
    hardly: dict[str, Any] = {name: "33MiB"}
    with pytest.raises(Invalid, match=f"{name}: 16777216 holds no chunk of this model .*give many times 37MiB") as e:
        warnings(**little, **disk)
    assert (e.value.kind, e.value.key) == ("setting", name)
    assert "\n" not in str(e.value)
    (said,) = warnings("cachegen", **little, **disk)
    assert said.startswith(f"{name}=16777216 may hold not even one chunk")
    (said,) = warnings(**hardly, **disk)
    assert said.startswith(f"{name}=34603008 may hold not even one chunk")
    assert warnings(grid=Grid(2, 2), **little, **disk) == [], "a cell is a quarter of a chunk"


def test_extents_of_less_than_a_chunk() -> None:
    (said,) = warnings(extent_bytes=10)
    assert said.startswith("extent_bytes=10 is less than one chunk of this model (32MiB)")
    assert warnings(extent_bytes="32MiB") == warnings("cachegen", extent_bytes="16MiB") == []
    assert warnings(extent_bytes=10, read_only=True) == []


def test_what_rests_must_fit() -> None:
    tight: dict[str, Any] = {"write_behind_s": 60, "write_behind_bytes": "16MiB"}
    with pytest.raises(Invalid, match="write_behind_bytes: 16777216 holds no chunk of this model") as e:
        warnings(**tight)
    assert e.value.key == "write_behind_bytes"
    assert warnings(write_behind_bytes="16MiB") == warnings(read_only=True, **tight) == []
    (said,) = warnings(write_behind_s=60, write_behind_bytes="128MiB")
    assert "prompts between the two are never stored; give 256MiB or more, or lower extent_bytes" in said
    assert warnings(write_behind_s=60, write_behind_bytes="128MiB", extent_bytes="128MiB") == []
    assert warnings(grid=Grid(1, 2), processes=2, write_behind_s=60, write_behind_bytes="128MiB") == []
    (said,) = warnings("cachegen", **tight)
    assert said.startswith("write_behind_bytes=16777216")
