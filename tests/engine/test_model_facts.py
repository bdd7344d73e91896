"""What in the engine's configuration changes the bits of its KV: rope parameters, and what some kinds depend on."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="the real vLLM is needed: make setup")

from lmcache_s3.config import load_settings
from lmcache_s3.errors import Invalid
from lmcache_s3.integrations.vllm.blocks import EngineBlocks
from lmcache_s3.integrations.vllm.model import _rope
from lmcache_s3.integrations.vllm.opening import Opening
from lmcache_s3.integrations.vllm.requests import extra_keys, uncacheable

pytestmark = pytest.mark.engine


def rope(max_model_len: int = 4096, **config: Any) -> dict[str, Any]:
    return _rope(SimpleNamespace(**{"max_position_embeddings": 131072} | config), max_model_len)


def test_one_spelling_for_old_and_new_configurations() -> None:
    new = rope(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0})
    assert new == rope(rope_theta=500000.0, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert new["rope_theta"] == 500000.0


def test_plain_rope_does_not_depend_on_the_engines_length() -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    assert rope(4096, rope_parameters=parameters) == rope(100_000, rope_parameters=parameters)


@pytest.mark.parametrize("inside", [True, False])
def test_longrope_takes_its_long_factors_when_the_engine_is_longer_than_the_original(inside: bool) -> None:
    """As vLLM does (phi3_long_rope_scaled_rope.py); where the original length stands differs between models."""
    parameters: dict[str, Any] = {"rope_type": "longrope", "long_factor": [2.0], "short_factor": [1.0]}
    where: dict[str, Any] = {}
    (parameters if inside else where)["original_max_position_embeddings"] = 4096
    short, same, long = (rope(n, rope_parameters=parameters, **where) for n in (2048, 4096, 4097))
    assert short == same != long


def test_dynamic_scaling_depends_on_the_longest_position() -> None:
    parameters = {"rope_type": "dynamic", "factor": 2.0}
    assert rope(rope_parameters=parameters) != rope(rope_parameters=parameters, max_position_embeddings=4096)


class OtherImpl:
    pass


@pytest.mark.parametrize("odd", ["dtype", "shape", "backend"])
def test_a_layer_unlike_the_others_is_refused(odd: str) -> None:
    """Where K and V lie is learnt from one layer: it must hold for all."""
    names = ["model.layers.0.attn", "model.layers.1.attn"]
    views = {name: torch.zeros(2, 2, 8, 16, dtype=torch.bfloat16) for name in names}
    layers = {name: SimpleNamespace(impl=SimpleNamespace(), dtype=torch.bfloat16) for name in names}
    if odd == "dtype":
        views[names[1]] = views[names[1]].to(torch.float16)
    elif odd == "shape":
        views[names[1]] = torch.zeros(2, 2, 4, 16, dtype=torch.bfloat16)
    else:
        layers[names[1]].impl = OtherImpl()
    facts: Any = SimpleNamespace(heads_of=lambda rank: range(2))
    with pytest.raises(Invalid, match=r"model\.layers\.1\.attn"):
        EngineBlocks.learn(views, layers, facts, 0)


def test_an_adapter_loaded_again_is_read_again(tmp_path: Path) -> None:
    """The engine gives each adapter it loads a number of its own; the same path may hold other weights by then."""
    settings = load_settings(url="memory://adapters")
    opening = Opening(SimpleNamespace(), settings, settings.make_codec())  # type: ignore[arg-type]

    def digest(number: int) -> str:
        end_s = time.monotonic() + 10
        while (found := opening.adapter_digest(number, str(tmp_path))) is None and time.monotonic() < end_s:
            time.sleep(0.01)
        assert found is not None
        return found

    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"old")
    old = digest(1)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"newer")
    assert digest(1) == old, "what the engine has under this number"
    assert digest(2) != old


def test_adapters_loaded_in_place_and_streaming_sessions_are_not_cached() -> None:
    lora = SimpleNamespace(load_inplace=True, lora_int_id=1, lora_path="/adapter")
    assert extra_keys(SimpleNamespace(lora_request=lora, mm_features=[]), lambda *_: "ab" * 32) is None
    request: Any = SimpleNamespace(prompt_token_ids=[1], prompt_embeds=None, pooling_params=None, resumable=True)
    assert uncacheable(request) == "streaming session"
