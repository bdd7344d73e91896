"""Latents of models with latent attention: `Model` takes those that the engine stores, channel for channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="the real vLLM is needed: make setup")

import torch
import transformers

from lmcache_s3.codecs.dtypes import to_float32
from lmcache_s3.extent import open_extent
from lmcache_s3.quality.model import Model
from lmcache_s3.testing.engine import EngineProcess
from lmcache_s3.testing.models import random_deepseek
from lmcache_s3.tiers.stores.open import open_store

pytestmark = [pytest.mark.slow, pytest.mark.engine]

PROMPT = [(7 * i * i + 13 * i) % 40_000 + 100 for i in range(600)]
SHORT = [token % 300 for token in PROMPT[:200]]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}
YARN |= {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 32.0, "beta_slow": 1.0}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "yarn"])
def test_vllm_turns_the_keys_channels_to_the_same_values(version: int, rope: dict[str, Any] | None) -> None:
    """vLLM's own module on what the weights give, as `DeepseekV2MLAAttention` calls it (`is_neox_style=False`)."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    config = getattr(transformers, f"DeepseekV{version}Config")(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, first_k_dense_replace=1,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=24, q_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=32, v_head_dim=16, max_position_embeddings=256, **({"rope_parameters": rope} if rope else {}),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = getattr(transformers, f"DeepseekV{version}ForCausalLM")(config)
    model = Model.of(module, kv_dtype="float32")
    given: list[torch.Tensor] = []
    attention = module.model.layers[0].self_attn
    hook = attention.kv_a_proj_with_mqa.register_forward_hook(lambda _m, _i, out: given.append(out[0, :, 24:]))
    (kv,) = model.prefill(SHORT)
    hook.remove()
    parameters = {**rope, "rope_type": "deepseek_yarn"} if rope else {"rope_type": "default", "rope_theta": 10_000.0}
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        rotary = get_rope(32, max_position=256, rope_parameters=parameters, is_neox_style=False, dtype=torch.float32)
        key = given[0].contiguous()[:, None]
        _, turned = rotary.forward_native(torch.arange(len(SHORT)), key.clone(), key.clone())
    assert turned is not None
    assert np.allclose(to_float32(kv, "float32")[0, 0, :, 0, 24:], turned[:, 0].numpy(), atol=2e-5)


def test_an_engine_stores_the_latents_that_are_calibrated_on(tmp_path: Path) -> None:
    """On a CPU, where vLLM 0.32 turns the keys of such models by wrong positions (it takes a strided tensor for a
    contiguous one): so of the rotated part the lengths of its pairs of channels are compared, and all of token 0's."""
    directory, url = random_deepseek(tmp_path / "model"), f"file://{tmp_path}/bucket"
    with EngineProcess(directory, url=url, directory=tmp_path, name="mla", block_size=16, max_model_len=2048) as engine:
        assert engine.ask([PROMPT], 4)[0].cached_tokens == 0
        engine.wait_stats(lambda s: s["scheduler"]["stored_extents"] >= 1, what="the store")
        assert engine.ask([PROMPT], 4)[0].cached_tokens == 512
        assert engine.stat("scheduler", "failed_loads") == 0
    (key,) = [one.key for one in open_store(url).list("spaces/") if one.key.endswith("/zarr.json")]
    stored = open_extent(f"{url}/{key.removesuffix('/zarr.json')}")[...].astype(np.float32)
    model = Model(directory, device="cpu")
    assert model.kv_dtype == "bfloat16"
    (kv,) = model.prefill(PROMPT[:512])
    taken = to_float32(kv, "bfloat16")
    assert stored.shape == taken.shape == (1, 4, 512, 1, 576)

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    def pairs(a: np.ndarray) -> np.ndarray:
        lengths: np.ndarray = np.hypot(a[..., 512::2], a[..., 513::2])
        return lengths

    # Layer 0 is what bf16 makes of the same numbers; behind it come other layers' rounding and wrong rotations.
    assert apart(stored[:, 0, :, :, :512], taken[:, 0, :, :, :512]) < 0.01
    assert apart(pairs(stored[:, 0]), pairs(taken[:, 0])) < 0.01
    assert apart(stored[:, 0, 0], taken[:, 0, 0]) < 0.01
    assert apart(stored[..., :512], taken[..., :512]) < 0.1
    assert apart(pairs(stored), pairs(taken)) < 0.1
