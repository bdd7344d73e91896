"""Random models of three small layers, and a tokenizer, for tests of what runs a model.

Needs torch and transformers.
"""

from __future__ import annotations

from typing import Any

from lmcache_s3.quality.model import Model
from lmcache_s3.types import KVDtype

VOCABULARY = 300


class Letters:
    """A tokenizer of single characters."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}


def tiny(kind: str = "llama", kv_dtype: KVDtype = "bfloat16") -> Model:
    """Three layers: `llama` with two KV heads for four (GQA), `mha` with as many, `gemma` of which two have a sliding
    window, `deepseek_v2` and `deepseek_v3` with latents of 24 + 8 channels (MLA) and experts in the last two."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = _made(kind)
    return Model.of(made, kv_dtype=kv_dtype, tokenizer=Letters())


def _made(kind: str) -> Any:
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,  # ten times the default: so that what is cached matters
    }
    if kind.startswith("deepseek"):
        shape |= {"num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 16, "first_k_dense_replace": 1}
        shape |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 16}
        shape |= {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        del shape["head_dim"]
    match kind:
        case "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
        case "mha":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, "num_key_value_heads": 4}))
        case "gemma":
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            config = transformers.Gemma3TextConfig(**shape, sliding_window=24, layer_types=kinds)
            return transformers.Gemma3ForCausalLM(config)
        case "deepseek_v2":
            return transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**shape))
        case "deepseek_v3":
            return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**shape))
    raise ValueError(kind)
