"""Both connector roles with codec `transform`: the scheduler's finds the model's calibration, the workers' use it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the real vLLM is needed: make setup")

from lmcache_s3.calibration_store import publish, read_name
from lmcache_s3.codecs.base import CellSpec
from lmcache_s3.errors import Invalid
from lmcache_s3.testing.calibrations import made_calibration
from lmcache_s3.tiers.stores.open import open_store
from tests.engine.test_roles import CHUNK, DIM, HEADS, LAYERS, Engine, prompt

pytestmark = pytest.mark.engine


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "bucket").mkdir()
    return f"file://{tmp_path}/bucket"


def test_engines_of_other_layouts_share_calibrated_cells(url: str) -> None:
    """The known KV is any bits, which `transform` keeps as they are: what is loaded is what was computed."""
    spec = CellSpec((2, LAYERS, CHUNK, HEADS, DIM), "bfloat16")
    with pytest.raises(Invalid, match="lmcache-s3 calibrate"):
        Engine(url, codec="transform")
    store = open_store(url)
    publish(store, made_calibration(spec, unit_heads=2), "ab" * 32)
    with pytest.raises(Invalid, match="4 head groups"):
        Engine(url, 4, 1, codec="transform")
    digest = read_name(store, "ab" * 32, "bfloat16")
    tokens = prompt(3 * CHUNK + 5)
    a = Engine(url, 2, 2, codec="transform")
    assert a.ask(tokens, "a") == 0
    a.settle()
    assert a.scheduler.counters.total("stored_extents") == 1
    assert {str(worker._codec.config["calibration"]) for worker in a.workers} == {digest}
    a.close()
    (document,) = [store.get(one.key) for one in store.list("spaces/") if one.key.endswith("/zarr.json")]
    assert digest.encode() in document
    b = Engine(url, 1, 1, codec="transform")
    assert b.ask(tokens, "b") == 3 * CHUNK
    assert not b.failed
    b.close()
