"""What the engine's configuration says of the model: the space's facts, this rank's part, and reasons to stay off.

`describe` returns a `ModelFacts`, or raises `Unsupported` with the one line the log shows: the engine then runs as if
there were no cache. Settings that only the user can mend raise `Invalid` and stop the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

from lmcache_s3.errors import Invalid
from lmcache_s3.identity import KVGroup, Space
from lmcache_s3.types import ITEM_BYTES, Grid, KVDtype

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from lmcache_s3.config import Settings

_DTYPES: dict[torch.dtype, KVDtype] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}


class Unsupported(Exception):
    """This model or engine setting is not cached yet; the message says which and what happens instead."""


@dataclass(frozen=True)
class ModelFacts:
    """The model as the cache sees it; equal in both roles and on every rank.

    group: the one KV group (all layers alike). rope: the model's rope parameters. path: what vLLM loads the weights
    from (local directory or hub name). block_tokens: the engine's block size. every_format: vLLM was told which kind of
    weight file to load, so the digest covers all kinds that are there.
    """

    path: str
    revision: str | None
    name: str
    group: KVGroup
    kv_dtype: KVDtype
    rope: Mapping[str, Any]
    quantisation: str | None
    block_tokens: int
    tensor_parallel: int
    pipeline_parallel: int
    every_format: bool = False

    def space(self, weights: str, settings: Settings, fidelity: str) -> Space:
        return Space(
            weights=weights,
            kv_dtype=self.kv_dtype,
            groups=(self.group,),
            rope=dict(self.rope),
            chunk_tokens=settings.chunk_tokens,
            quantisation=self.quantisation,
            fidelity=fidelity,
            model=self.name,
        )

    def group_chunk_bytes(self, chunk_tokens: int) -> int:
        """Raw bytes of one chunk over all layers and heads."""
        group = self.group
        per_token = group.kv * group.layers * group.heads * group.head_dim
        return per_token * chunk_tokens * ITEM_BYTES[self.kv_dtype]

    @property
    def writers(self) -> int:
        """Tensor-parallel ranks that hold different heads."""
        return min(self.tensor_parallel, self.group.heads)

    def grid(self, settings: Settings) -> Grid | None:
        """The grid this engine writes, or None where its layers or heads do not divide evenly (it then only reads)."""
        groups = settings.head_groups or self.writers
        even = (
            self.group.layers % self.pipeline_parallel == 0
            and self.group.heads % groups == 0
            and groups % self.writers == 0
        )
        return Grid(self.pipeline_parallel, groups) if even else None

    def heads_of(self, tensor_rank: int) -> range:
        """KV heads that a tensor-parallel rank holds."""
        heads, ranks = self.group.heads, self.tensor_parallel
        if ranks > heads:
            head = tensor_rank * heads // ranks
            return range(head, head + 1)
        per_rank = heads // ranks
        return range(tensor_rank * per_rank, (tensor_rank + 1) * per_rank)

    def writes(self, tensor_rank: int) -> bool:
        """Where several ranks hold the same head, the first of them writes it."""
        return tensor_rank == 0 or self.heads_of(tensor_rank) != self.heads_of(tensor_rank - 1)


def describe(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings) -> ModelFacts:
    spec = _only_spec(vllm_config, kv_cache_config)
    if settings.chunk_tokens % spec.block_size:
        raise Invalid(
            f"chunk_tokens: {settings.chunk_tokens} is not a multiple of the engine's block size {spec.block_size}; "
            f"set chunk_tokens to a multiple of {spec.block_size}, or --block-size to a divisor of "
            f"{settings.chunk_tokens}",
            kind="setting",
            key="chunk_tokens",
        )
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    mla = isinstance(spec, MLAAttentionSpec)
    window = getattr(spec, "sliding_window", None)
    group = KVGroup(
        kind="mla" if mla else "sliding" if window else "full",
        layers=model.get_total_num_hidden_layers(),
        kv=1 if mla else 2,
        heads=1 if mla else model.get_total_num_kv_heads(),
        head_dim=spec.head_size,
        window=window,
    )
    quantisation = str(model.quantization) if model.quantization else None
    return ModelFacts(
        path=str(model.model),
        revision=model.revision,
        name=str(model.served_model_name or model.model),
        group=group,
        kv_dtype=_kv_dtype(spec, vllm_config),
        rope=_rope(model.hf_text_config, model.max_model_len),
        quantisation=quantisation,
        block_tokens=spec.block_size,
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        every_format=str(vllm_config.load_config.load_format) not in ("auto", "safetensors"),
    )


def _only_spec(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> AttentionSpec:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise Unsupported(
            f"this model keeps its KV in {len(groups)} groups (hybrid attention): nothing is stored or loaded for "
            "hybrid models yet"
        )
    spec = groups[0].kv_cache_spec
    if isinstance(spec, SlidingWindowSpec):
        # vLLM frees blocks behind the window while a request runs, and stands a null block in for them at a prefix hit.
        raise Unsupported("this model's attention has a sliding window everywhere: nothing is stored or loaded yet")
    if not isinstance(spec, FullAttentionSpec):
        raise Unsupported(f"KV of kind {type(spec).__name__} is not stored or loaded yet")
    if getattr(spec, "head_size_v", spec.head_size) != spec.head_size and not isinstance(spec, MLAAttentionSpec):
        raise Unsupported("K and V of different widths are not stored or loaded yet")
    if str(vllm_config.load_config.load_format) == "dummy":
        raise Unsupported("with --load-format dummy the weights have no files to know them by: nothing is cached")
    if vllm_config.model_config.hf_overrides:
        raise Unsupported(
            "with --hf-overrides the KV depends on more than the model's files: nothing is cached (write the changes "
            "into the model's config.json instead)"
        )
    if vllm_config.speculative_config is not None:
        raise Unsupported("with speculative decoding nothing is stored or loaded yet")
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise Unsupported("with context parallelism nothing is stored or loaded yet")
    return spec


def _kv_dtype(spec: AttentionSpec, vllm_config: VllmConfig) -> KVDtype:
    """fp8 caches are bytes to vLLM; what they mean stands in the cache's configuration."""
    if spec.dtype in _DTYPES:
        return _DTYPES[spec.dtype]
    named: dict[str, KVDtype] = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
    name = str(vllm_config.cache_config.cache_dtype)
    if spec.dtype == torch.uint8 and name in named:
        return named[name]
    raise Unsupported(f"KV cache dtype {name} ({spec.dtype}) is not stored or loaded yet")


def _rope(config: Any, max_model_len: int) -> dict[str, Any]:
    """Rope parameters under one spelling, whatever version of transformers wrote the configuration.

    Two kinds depend on more than their parameters: LongRoPE takes its long factors for every position once the engine's
    `max_model_len` passes the original length, and both it and dynamic NTK scale by the longest position.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        parameters = {
            "rope_theta": getattr(config, "rope_theta", None),
            **(getattr(config, "rope_scaling", None) or {}),
        }
    rope = {str(k): _plain(v) for k, v in dict(parameters).items() if v is not None}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ("longrope", "dynamic"):
        longest = getattr(config, "max_position_embeddings", None)
        original = rope.get("original_max_position_embeddings")
        original = getattr(config, "original_max_position_embeddings", longest) if original is None else original
        rope["max_position_embeddings"] = longest
        if kind == "longrope":
            rope["long_factors"] = original is None or max_model_len > original
    return rope


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def rank_layers(layer_names: list[str]) -> tuple[list[str], range]:
    """This rank's attention layers in model order, and their places in the model."""
    ordered = sorted(layer_names, key=extract_layer_index)
    places = [extract_layer_index(name) for name in ordered]
    if places != list(range(places[0], places[0] + len(places))):
        raise Unsupported(f"layers {places[:4]}… of this rank are not consecutive: nothing is stored or loaded")
    return ordered, range(places[0], places[0] + len(places))
