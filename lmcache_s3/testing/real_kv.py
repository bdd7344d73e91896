"""A real model's KV cache of real text, for measurements: SmolLM2's, of our own documents.

Computed in float32 and rounded to bfloat16, as an engine's cache holds it. Raises `ModelMissing`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from lmcache_s3.testing.models import ModelMissing, smollm2

PROMPT_TOKENS = 1024


def smollm2_kv(prompts: int = 4) -> np.ndarray:
    """bfloat16 bits, u16 [kv, layer, token, head, channel], of so many prompts of 1,024 tokens one after another.

    Made in a process of its own: torch and transformers are not drawn into this one. About ten seconds.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kv.npy"
        code = f"from lmcache_s3.testing.real_kv import save; save({str(path)!r}, {prompts})"
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise ModelMissing(f"SmolLM2's KV could not be computed: {done.stderr.strip().splitlines()[-1:]}")
        kv: np.ndarray = np.load(path)
    return kv


def save(path: str, prompts: int) -> None:
    """Compute it here and write it as `.npy`."""
    import torch
    import transformers

    from lmcache_s3.benchmarks.prompts import documents, long_prompts

    directory = str(smollm2())
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenised = [tokenizer(document.text)["input_ids"] for document in documents()]
    parts = []
    for prompt in long_prompts(tokenised, PROMPT_TOKENS, prompts):
        with torch.inference_mode():
            cache = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).past_key_values
        sides = [[getattr(layer, side)[0].permute(1, 0, 2) for layer in cache.layers] for side in ("keys", "values")]
        bits = torch.stack([torch.stack(side) for side in sides]).to(torch.bfloat16).contiguous()
        parts.append(bits.view(torch.uint8).numpy().view(np.uint16))
    np.save(path, np.concatenate(parts, axis=2))
