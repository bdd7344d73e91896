"""Models with latent attention: what is taken out of their cache is what an engine keeps, and can be put back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmcache_s3.codecs.dtypes import to_float32
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Invalid
from lmcache_s3.quality.coding import CodecCoder, through
from lmcache_s3.quality.measure import compare
from lmcache_s3.testing.small import same_bits
from lmcache_s3.testing.tiny_model import VOCABULARY, tiny

torch = pytest.importorskip("torch", reason="runs a model: pip install 'lmcache-s3[quality]'")
transformers = pytest.importorskip("transformers", reason="runs a model: pip install 'lmcache-s3[quality]'")

from lmcache_s3.quality.latent import Latent, look  # noqa: E402
from lmcache_s3.quality.model import Model  # noqa: E402

TOKENS = [int(t) for t in np.random.default_rng(1).integers(0, VOCABULARY, 100)]
KINDS = ["deepseek_v2", "deepseek_v3"]
WIDTH, ROTARY = 24, 8


def attention(model: Model, layer: int) -> Any:
    return model.module.model.layers[layer].self_attn


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_a_layer_is_one_latent(kind: str) -> None:
    model = tiny(kind)
    (group,) = model.groups
    assert (group.group.kind, group.group.kv, group.group.heads, group.group.head_dim) == ("mla", 1, 1, WIDTH + ROTARY)
    assert group.layers == (0, 1, 2)
    (kv,) = model.prefill(TOKENS[:40])
    assert kv.shape == (1, 3, 40, 1, WIDTH + ROTARY)
    assert kv.dtype == np.uint16


@pytest.mark.parametrize("kind", KINDS)
def test_its_channels_lie_as_the_weights_have_them_turned_in_neighbouring_pairs(kind: str) -> None:
    """As engines keep them: the normed latent, then each pair (2j, 2j + 1) of the projection's turned by its own
    frequency. Looked at in layer 1, by the formula."""
    model = tiny(kind, "float32")
    projected: list[Any] = []
    hook = attention(model, 1).kv_a_proj_with_mqa.register_forward_hook(lambda _m, _i, out: projected.append(out[0]))
    (kv,) = model.prefill(TOKENS[:40])
    hook.remove()
    (raw,) = projected
    latent = attention(model, 1).kv_a_layernorm(raw[:, :WIDTH])
    turn = torch.arange(40)[:, None] * 10_000.0 ** (-torch.arange(0, ROTARY, 2) / ROTARY)
    even, odd = raw[:, WIDTH::2], raw[:, WIDTH + 1 :: 2]
    turned = torch.stack([even * turn.cos() - odd * turn.sin(), odd * turn.cos() + even * turn.sin()], -1).flatten(1)
    wanted = torch.cat([latent, turned], -1).detach().numpy()
    assert np.allclose(to_float32(kv, "float32")[0, 1, :, 0], wanted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kv_dtype", "most"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_behind_latents_put_back_the_model_says_what_it_says_without(kind: str, kv_dtype: Any, most: float) -> None:
    model = tiny(kind, kv_dtype)
    primed = model.primed(model.prefill(TOKENS[:64]))
    whole, _ = model._forward(TOKENS, None)
    wanted = torch.log_softmax(whole[64:], -1)
    for _ in range(2):  # asking leaves the cache as it was
        assert (primed.predict(TOKENS[64:]) - wanted).abs().max() < most


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_codec_gives_the_latents_back(kind: str) -> None:
    model = tiny(kind)
    kv = model.prefill(TOKENS[:64])
    decoded, _ = through(CodecCoder(make_codec("fast")), kv, model.groups, TOKENS[:64], "bfloat16", chunk_tokens=16)
    assert same_bits(decoded[0], kv[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_latent_is_that_of_the_labels_likelihood(kind: str) -> None:
    """In each of twelve places and along the gradient itself, finite differences of the same labels' likelihood."""
    model = tiny(kind, "float32")
    kv = model.prefill(TOKENS[:32])
    (gradient,) = model.sampled_gradients(kv, TOKENS[32:40], seed=7)
    assert gradient.shape == kv[0].shape
    drawn = torch.Generator().manual_seed(7)
    labels = torch.multinomial(model.primed(kv).predict(TOKENS[32:40]).exp(), 1, generator=drawn)
    values = to_float32(kv[0], "float32")

    def rise(direction: np.ndarray) -> float:
        sides = [
            model.primed([(values + sign * direction).astype(np.float32).view(kv[0].dtype)]).predict(TOKENS[32:40])
            for sign in (1, -1)
        ]
        above, below = (float(log_p.double().gather(1, labels).sum()) for log_p in sides)
        return (above - below) / 2

    along = 1e-2 * gradient / np.linalg.norm(gradient)
    assert rise(along) == pytest.approx(float((along.astype(np.float64) * gradient).sum()), rel=0.05)
    flat = np.abs(gradient).reshape(-1)
    for place in np.argsort(flat)[-12:]:
        one = np.zeros_like(flat)
        one[place] = 0.02
        expected = 0.02 * float(gradient.reshape(-1)[place])
        assert rise(one.reshape(gradient.shape)) == pytest.approx(expected, rel=0.1, abs=2e-5)


def test_a_latent_that_is_changed_changes_what_the_model_says() -> None:
    model = tiny("deepseek_v3")
    kv = model.prefill(TOKENS[:64])
    changed = kv[0].copy()
    changed[:, :, :, :, -1] ^= 0x8000  # one channel of the rotated part
    asked = TOKENS[64:]
    log_p, log_q = (model.primed([one]).predict(asked[:-1]) for one in (kv[0], changed))
    assert compare(log_p, log_q, asked[1:])[0] > 1e-6


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 2, 1)])
def test_what_is_joined_can_be_parted(order: tuple[int, ...]) -> None:
    latent = Latent(3, order)
    keys, values = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(2, 4)
    back = latent.parted(latent.joined(keys, values))
    assert torch.equal(back[0], keys)
    assert torch.equal(back[1], values)


def test_an_unknown_order_of_channels_is_refused() -> None:
    projection = torch.nn.Linear(1, 5, bias=False)
    with torch.no_grad():
        projection.weight.copy_(torch.arange(5.0)[:, None])

    def forward() -> list[Any]:
        made = projection(torch.ones(1, 2, 1))
        return [SimpleNamespace(keys=made[None, :, :, :1], values=made[None, :, :, 1:].flip(-1))]

    with pytest.raises(Invalid, match="order of channels that is unknown"):
        look(projection, SimpleNamespace(kv_lora_rank=1, qk_rope_head_dim=4), forward)


def test_a_cache_with_more_in_it_than_latents_is_refused() -> None:
    """Sparse attention keeps keys of an indexer, too."""
    config = transformers.DeepseekV32Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, kv_lora_rank=24, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
        index_topk=8, index_head_dim=16, index_n_heads=2,
    )  # fmt: skip
    with pytest.raises(Invalid, match="cannot be measured yet"):
        Model.of(transformers.DeepseekV32ForCausalLM(config))
