"""A Hugging Face model whose KV cache can be taken out as bits, and put back after something was done to it.

The model computes in float32; its cache is taken as an engine stores it: K after the rotary embedding, V, or the one
latent of both (`latent.py`), rounded to the kv dtype, one array `[kv, layer, token, head, channel]` per group of layers
that are alike (FORMAT.md §6.2). On a CPU or a GPU. Needs `pip install 'lmcache-s3[quality]'`. Not thread-safe.
Raises `Invalid` for a package that is missing, a model that cannot be loaded, or one whose cache is not of this kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import numpy as np

from lmcache_s3.errors import Invalid
from lmcache_s3.identity import KVGroup
from lmcache_s3.quality.latent import Latent, look
from lmcache_s3.types import STORAGE_DTYPE, Geometry, KVDtype
from lmcache_s3.weights import is_hub_name

if TYPE_CHECKING:
    import torch

KV: TypeAlias = list[np.ndarray]
"""One array [kv, layer, token, head, channel] of storage bits for each of `Model.groups`."""

_PROBE = (5, 7)
"""Tokens that show how a model keeps its cache; padding, whose embedding is zero, is neither in any that we know."""
_PIECE_TOKENS = 1024
"""Tokens a forward pass takes at most: bounds the memory of attention masks."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers with one shape of KV and one kind of attention. layers: their numbers in the model. latent: None where
    they keep K and V."""

    group: KVGroup
    layers: tuple[int, ...]
    latent: Latent | None = None

    def geometry(self, kv_dtype: KVDtype, chunk_tokens: int) -> Geometry:
        g = self.group
        return Geometry(g.kv, g.layers, g.heads, g.head_dim, kv_dtype, chunk_tokens)

    def planes_of(self, layer: Any) -> tuple[torch.Tensor, ...]:
        """[head, token, channel] of each plane, of a layer of a transformers cache."""
        keys, values = layer.keys[0], layer.values[0]
        return (keys, values) if self.latent is None else (self.latent.joined(keys, values),)

    def cached(self, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a transformers cache, of [plane, head, token, channel]; differentiable."""
        return (planes[:1], planes[1:]) if self.latent is None else self.latent.parted(planes)


class Model:
    """A causal language model and its tokenizer. path: a directory or a hub name; nothing of it is executed.

    device: as torch names it; None: a GPU where there is one. kv_dtype: of the cache; None: the model's own dtype.
    """

    def __init__(self, path: str | Path, *, device: str | None = None, kv_dtype: KVDtype | None = None) -> None:
        here = Path(path).is_dir()
        if not here and not is_hub_name(str(path)):
            raise Invalid(f"model {str(path)!r}: no such directory", kind="argument", key="model")
        try:
            import torch
            import transformers
        except ModuleNotFoundError as error:
            raise Invalid(
                f"running a model needs the package {error.name!r}: pip install 'lmcache-s3[quality]'",
                kind="setting",
                key="model",
            ) from error
        self.path = str(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            config = transformers.AutoConfig.from_pretrained(self.path)
            own = str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)).removeprefix("torch.")
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self.path)
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            where = "" if here else ", which is no directory here,"
            raise Invalid(
                f"model {self.path!r}{where} cannot be loaded: {said}", kind="argument", key="model"
            ) from error
        self._setup(config, kv_dtype or own, device)

    @classmethod
    def of(cls, model: Any, *, kv_dtype: KVDtype = "bfloat16", tokenizer: Any = None) -> Model:
        """Around a transformers model in memory; it becomes float32."""
        made = cls.__new__(cls)
        made.path, made.tokenizer, made._model = "memory", tokenizer, model.float()
        made._setup(model.config, kv_dtype, "cpu")
        return made

    def _setup(self, config: Any, stated: str, device: str) -> None:
        self.device = device
        self.kv_dtype: KVDtype = next((known for known in get_args(KVDtype) if known == stated), "bfloat16")
        try:
            self._model = self._model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            said = " ".join(str(error).split())[:200]
            raise Invalid(
                f"model {self.name} cannot be put on device {device!r}: {said}", kind="argument", key="device"
            ) from error
        self._config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.max_tokens = int(getattr(self._config, "max_position_embeddings", 1 << 20))
        self.groups = self._find_groups()

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def module(self) -> Any:
        """The transformers model itself."""
        return self._model

    def _find_groups(self) -> tuple[LayerGroup, ...]:
        """From the cache of a short prompt: what is there cannot be wrong."""
        try:
            looked = look(self._model, self._config, lambda: self._forward(_PROBE, None)[1].layers)
        except Invalid:
            raise
        # by transformers, of models whose cache is not K and V
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise self._unknown(f"its cache is of another kind ({' '.join(str(error).split())[:120]})") from error
        layers, latents = zip(*looked, strict=True)
        kinds = getattr(self._config, "layer_types", None) or ["full_attention"] * len(layers)
        window = getattr(self._config, "sliding_window", None)
        found: dict[tuple[KVGroup, Latent | None], list[int]] = {}
        for number, (layer, kind, latent) in enumerate(zip(layers, kinds, latents, strict=True)):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if latent is not None:
                of_one = KVGroup("mla", 1, 1, 1, latent.width + len(latent.order))
            elif keys is None or values is None or keys.shape != values.shape or keys.shape[2] != len(_PROBE):
                why = f"layer {number} keeps for each token neither K and V of one shape nor a latent of both"
                raise self._unknown(why + " (which transformers does from 5.16 on)")
            else:
                limit = window if "sliding" in kind else None
                of_one = KVGroup("full" if limit is None else "sliding", 1, 2, keys.shape[1], keys.shape[3], limit)
            found.setdefault((of_one, latent), []).append(number)
        return tuple(
            LayerGroup(replace(of_one, layers=len(numbers)), tuple(numbers), latent)
            for (of_one, latent), numbers in found.items()
        )

    def _unknown(self, why: str) -> Invalid:
        return Invalid(f"model {self.name}: {why}: it cannot be measured yet", kind="argument", key="model")

    # --- text

    def tokens(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text)["input_ids"]]

    def chat_tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation in the model's own template; as plain text where it has none."""
        if getattr(self.tokenizer, "chat_template", None):
            return self.tokens(self.tokenizer.apply_chat_template(list(messages), tokenize=False))
        return self.tokens("\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages))

    # --- caches

    def prefill(self, tokens: Sequence[int]) -> KV:
        """The KV of a prompt, rounded to the kv dtype, as new arrays."""
        cache: Any = None
        for start in range(0, len(tokens), _PIECE_TOKENS):
            _, cache = self._forward(tokens[start : start + _PIECE_TOKENS], cache, logits=1)
        return [self._take(cache, group) for group in self.groups]

    def _take(self, cache: Any, group: LayerGroup) -> np.ndarray:
        import torch

        planes = []
        for layers in zip(*(group.planes_of(cache.layers[number]) for number in group.layers), strict=True):
            values = torch.stack([one.permute(1, 0, 2) for one in layers])
            if self.kv_dtype not in ("bfloat16", "float32"):  # narrow ranges: the largest for what is beyond
                most = torch.finfo(getattr(torch, self.kv_dtype)).max
                values = values.clamp(-most, most)
            rounded = values.to(getattr(torch, self.kv_dtype)).contiguous().cpu()
            planes.append(rounded.view(torch.uint8).numpy().view(STORAGE_DTYPE[self.kv_dtype]))
        return np.stack(planes)

    def primed(self, kv: KV) -> Primed:
        """A cache with this KV in it, from which continuations can be asked."""
        return Primed(self, self._cache_of(self._values(kv)))

    def sampled_gradients(self, kv: KV, tokens: Sequence[int], *, seed: int) -> list[np.ndarray]:
        """Gradients of Σ log p(label) behind this KV with respect to it, float32 arrays shaped like it.

        tokens: what follows the prompt. A label, drawn from what the model predicts after each of them: so that the
        mean of g gᵀ is the Fisher matrix, summed over these predictions.
        """
        import torch

        values = [one.requires_grad_(True) for one in self._values(kv)]
        ids = torch.tensor([list(tokens)], device=self.device)
        out = self._model(input_ids=ids, past_key_values=self._cache_of(values), use_cache=True)
        log_p = torch.log_softmax(out.logits[0].float(), dim=-1)
        drawn = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=drawn).to(self.device)
        gradients = torch.autograd.grad(log_p.gather(1, labels).sum(), values)
        return [one.permute(0, 1, 3, 2, 4).contiguous().cpu().numpy() for one in gradients]

    def _values(self, kv: KV) -> list[torch.Tensor]:
        """float32 [plane, layer, head, token, channel] for each group, on the device."""
        import torch

        made = []
        for bits in kv:
            flat = torch.from_numpy(np.ascontiguousarray(bits).view(np.uint8)).view(getattr(torch, self.kv_dtype))
            made.append(flat.to(self.device, torch.float32).permute(0, 1, 3, 2, 4))
        return made

    def _cache_of(self, values: Sequence[torch.Tensor]) -> Any:
        """A transformers cache, of `_values`."""
        import transformers

        tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for group, of_group in zip(self.groups, values, strict=True):
            for i, number in enumerate(group.layers):
                tensors[number] = group.cached(of_group[:, i])
        cache = transformers.DynamicCache()
        for number in sorted(tensors):
            cache.update(*tensors[number], number)
        return cache

    def _forward(self, tokens: Sequence[int], cache: Any, *, logits: int = 0) -> tuple[Any, Any]:
        """Logits of the last `logits` tokens (0: of all) `[token, vocabulary]`, and the cache that grew."""
        import torch
        import transformers

        cache = transformers.DynamicCache() if cache is None else cache
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=self.device)
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=logits)
        return out.logits[0], out.past_key_values


class Primed:
    """A prompt's KV in a model. Every question leaves it as it was."""

    def __init__(self, model: Model, cache: Any) -> None:
        self._model, self._cache = model, cache

    def predict(self, tokens: Sequence[int]) -> torch.Tensor:
        """Log-probabilities, float32 `[token, vocabulary]`, of what follows each of these tokens after the prompt."""
        import torch

        logits, self._cache = self._model._forward(tokens, self._cache)
        self._cache.crop(-len(tokens))
        with torch.inference_mode():
            return torch.log_softmax(logits.float(), dim=-1)

    def greedy(self, first: int, n_tokens: int) -> list[int]:
        """The likeliest continuation of the prompt and one token more."""
        answer: list[int] = []
        for _ in range(n_tokens):
            logits, self._cache = self._model._forward([answer[-1] if answer else first], self._cache, logits=1)
            answer.append(int(logits[-1].argmax()))
        self._cache.crop(-n_tokens)
        return answer
