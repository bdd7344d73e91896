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
    """Llama of three layers alike, or (`gemma`) of two with a sliding window and one without."""
    import torch
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
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "llama":
            made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
        else:
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            config = transformers.Gemma3TextConfig(**shape, sliding_window=24, layer_types=kinds)
            made = transformers.Gemma3ForCausalLM(config)
    return Model.of(made, kv_dtype=kv_dtype, tokenizer=Letters())
