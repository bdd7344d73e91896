"""The soak: a few seconds of it, and that it would notice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lmcache_s3.benchmarks import soak
from lmcache_s3.cache import Cache
from lmcache_s3.testing.small import small_settings


@pytest.mark.slow
def test_a_few_seconds(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    met = soak.main(tmp_path / "soak.json", minutes=0.1, url=f"file://{tmp_path}/bucket")
    figures = {one["name"]: one for one in json.loads((tmp_path / "soak.json").read_text("utf-8"))["figures"]}
    assert met
    assert figures["soak.checked"]["value"] > 0
    assert figures["soak.stored"]["value"] > 0
    assert figures["soak.wrong_bytes"]["value"] == 0


def test_a_wrong_byte_is_counted(tmp_path: Path) -> None:
    """What was stored for one chat is loaded as another's."""
    (tmp_path / "bucket").mkdir()
    url, space, tally = f"file://{tmp_path}/bucket", soak.soak_space(), soak.Tally()
    with Cache.open(url, space, small_settings(url)) as cache:
        cache.store(soak.chat_tokens(space, 1, 1), soak.chunk_kv(space, 2, 0)).result(20)
        soak.Soak(cache, tally)._load(1, 1)
    assert tally.checked_bytes == space.geometry.chunk_bytes
    assert tally.wrong_bytes > space.geometry.chunk_bytes // 2


def test_the_slope_is_that_of_what_grows() -> None:
    rss = [(float(s), 500.0 + 400.0 * (s < 100) + 0.01 * s) for s in range(600)]
    assert np.isclose(soak.slope_per_hour(rss), 36.0)
    assert soak.slope_per_hour(rss[:3]) == 0.0
