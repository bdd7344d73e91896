"""Models with multi-head latent attention (MLA): a layer's cache as engines keep it, one vector a token.

That vector is the latent (after its norm), then the rotated part of the key, which all heads share: kv 1, heads 1. The
same numbers lie in transformers' cache, the latent as a layer's keys, the rotated part as its values. Engines rotate
channels where the weights put them; transformers may sort them first, even ones before odd ones. At position 0 nothing
is rotated, so what the weights gave and what the cache holds there show the order. K and V are expanded by the model
itself as it attends, so gradients of a latent pass through that. Raises `Invalid` for an order that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache_s3.errors import Invalid

if TYPE_CHECKING:
    import torch

_SAME = 1e-4
"""1 − cosine below which two vectors are the same but for their length: YaRN may scale what is rotated."""


@dataclass(frozen=True, slots=True)
class Latent:
    """How the vectors of a group of layers lie in transformers' cache.

    width: channels of the latent. order: channel of the cached rotated part that the engine has at each place.
    """

    width: int
    order: tuple[int, ...]

    def joined(self, latent: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
        """[…, width + rotary] as the engine has it."""
        import torch

        return torch.cat([latent, rotated[..., list(self.order)]], dim=-1)

    def parted(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `joined` put together; differentiable."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return values[..., : self.width], values[..., self.width :][..., back]


def look(module: Any, config: Any, forward: Callable[[], Sequence[Any]]) -> list[tuple[Any, Latent | None]]:
    """Each layer of a transformers model's cache, and how it keeps its latents; None: it keeps none.

    forward: runs the model on a prompt of a few tokens and returns the layers of its cache.
    """
    width, rotary = getattr(config, "kv_lora_rank", None), getattr(config, "qk_rope_head_dim", None)
    if not width or not rotary:
        return [(layer, None) for layer in forward()]
    with _outputs(module, width + rotary) as made:
        layers = forward()
    return [(layer, _latent_of(number, layer, width, rotary, made)) for number, layer in enumerate(layers)]


@contextmanager
def _outputs(module: Any, features: int) -> Iterator[list[torch.Tensor]]:
    """What the model's linear maps of so many outputs give for token 0, while it lasts; each float [features]."""
    import torch

    made: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        made.append(output.detach().reshape(-1, features)[0].float())

    wide = [one for one in module.modules() if isinstance(one, torch.nn.Linear) and one.out_features == features]
    hooks = [one.register_forward_hook(keep) for one in wide]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()


def _latent_of(number: int, layer: Any, width: int, rotary: int, made: Sequence[torch.Tensor]) -> Latent | None:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or (keys.shape[1], keys.shape[3]) != (1, width):
        return None
    if (values.shape[1], values.shape[3]) != (1, rotary):
        return None
    cached = values[0, 0, 0].detach().float()
    sorted_first = tuple(place // 2 + place % 2 * (rotary // 2) for place in range(rotary))
    for order in (tuple(range(rotary)), sorted_first):
        latent = Latent(width, order)
        if any(_same(cached[list(order)], output[width:]) for output in made):
            return latent
    raise Invalid(
        f"layer {number} rotates its keys in an order of channels that is unknown: it cannot be measured yet",
        kind="argument",
        key="model",
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    length = float(a.norm() * b.norm())
    return length > 0 and 1 - float(a @ b) / length < _SAME
