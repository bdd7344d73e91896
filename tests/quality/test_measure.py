"""A cache taken out, coded and put back: an exact codec changes nothing, and figures are what they are called."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.dtypes import to_float32
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Invalid
from lmcache_s3.quality import needle
from lmcache_s3.quality.coding import CodecCoder, through
from lmcache_s3.quality.measure import GREEDY_TOKENS, Mean, Score, Trial, compare, context_of, same_answer, summary
from lmcache_s3.testing.small import same_bits
from lmcache_s3.testing.tiny_model import VOCABULARY, tiny
from lmcache_s3.types import Grid, KVDtype

torch = pytest.importorskip("torch", reason="runs a model: pip install 'lmcache-s3[quality]'")
transformers = pytest.importorskip("transformers", reason="runs a model: pip install 'lmcache-s3[quality]'")

TOKENS = [int(t) for t in np.random.default_rng(1).integers(0, VOCABULARY, 64 + 256)]
CHUNK = 16


class Halving:
    """Codes nothing, returns half of every value."""

    name = "halving"

    def code(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> tuple[int, np.ndarray]:
        values = (cell.astype(np.uint32) << 16).view(np.float32) / 2
        return cell.nbytes // 4, (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_behind_a_cache_put_back_the_model_says_what_it_says_without_one(kind: str) -> None:
    model = tiny(kind, "float32")
    primed = model.primed(model.prefill(TOKENS[:64]))
    whole, _ = model._forward(TOKENS[:100], None)
    wanted = torch.log_softmax(whole[64:100], -1)
    for _ in range(2):  # asking leaves the cache as it was
        assert torch.allclose(primed.predict(TOKENS[64:100]), wanted, atol=1e-4)


def test_layers_are_grouped_by_what_their_cache_is_like() -> None:
    (all_alike,) = tiny().groups
    assert (all_alike.layers, all_alike.group.kind, all_alike.group.heads) == ((0, 1, 2), "full", 2)
    sliding, full = tiny("gemma").groups
    assert (sliding.layers, sliding.group.window, full.layers, full.group.window) == ((0, 2), 24, (1,), None)
    assert [kv.shape for kv in tiny("gemma").prefill(TOKENS[:32])] == [(2, 2, 32, 2, 16), (2, 1, 32, 2, 16)]


@pytest.mark.parametrize("kv_dtype", ["float16", "float8_e4m3fn"])
def test_values_beyond_a_narrow_dtype_become_its_largest(kv_dtype: KVDtype) -> None:
    model = tiny(kv_dtype=kv_dtype)
    with torch.no_grad():
        model.module.model.layers[1].self_attn.v_proj.weight *= 1e6
    (kv,) = model.prefill(TOKENS[:32])
    values = to_float32(kv, kv_dtype)
    assert np.isfinite(values).all()
    assert np.abs(values[1, 1]).max() == {"float16": 65504, "float8_e4m3fn": 448}[kv_dtype]


def test_a_device_that_is_not_there_is_told() -> None:
    model = tiny()
    with pytest.raises(Invalid, match="device 'nowhere'") as caught:
        model._setup(model.module.config, "bfloat16", "nowhere")
    assert caught.value.key == "device"


@pytest.mark.parametrize("codec", ["fast", "safetensors"])
@pytest.mark.parametrize("grid", [Grid(), Grid(3, 2), Grid(2, 1)])
def test_an_exact_codec_gives_the_bits_back_in_any_grid(codec: str, grid: Grid) -> None:
    model = tiny()
    kv = model.prefill(TOKENS[:64])
    coder = CodecCoder(make_codec(codec))
    decoded, n_bytes = through(coder, kv, model.groups, TOKENS[:64], "bfloat16", chunk_tokens=CHUNK, grid=grid)
    assert all(same_bits(a, b) for a, b in zip(decoded, kv, strict=True))
    assert n_bytes > sum(bits.nbytes for bits in kv)


def test_exact_scores_are_perfect_and_a_lossy_one_is_not() -> None:
    trial = Trial(tiny(), TOKENS, chunk_tokens=CHUNK)
    exact = trial.score(CodecCoder(make_codec("fast")), "random", "prose")
    assert len(trial.prompt) == 64
    assert (exact.kl, exact.delta_nll, exact.top1, exact.greedy_tokens) == (0, 0, 1, GREEDY_TOKENS)
    assert 16 < exact.bits < 16.1
    worse = trial.score(Halving(), "random", "prose")
    assert worse.kl > 0
    assert worse.bits == 4


def test_cut_prompts_are_refused() -> None:
    model = tiny()
    kv = model.prefill(TOKENS[:40])
    with pytest.raises(Invalid, match="whole chunks"):
        through(Halving(), kv, model.groups, TOKENS[:40], "bfloat16", chunk_tokens=CHUNK)


def test_the_divergence_is_that_of_the_book() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    kl, change, same = compare(p.log(), q.log(), [0, 1])
    assert kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert change == pytest.approx(math.log(2) / 2)
    assert same == 0.5  # a tie counts for the first token


def test_one_pass_finds_where_two_greedy_answers_part() -> None:
    model = tiny()
    kv = model.prefill(TOKENS[:64])
    halved = [Halving().code(bits, None, None)[1] for bits in kv]  # type: ignore[arg-type]
    answer = model.primed(kv).greedy(TOKENS[64], 32)
    other = model.primed(halved).greedy(TOKENS[64], 32)
    parts = next((i for i, (a, b) in enumerate(zip(answer, other, strict=True)) if a != b), 32)
    assert same_answer(model.primed(halved), TOKENS[64], answer) == parts
    assert same_answer(model.primed(kv), TOKENS[64], answer) == 32


def test_needles_lie_in_whole_chunks_and_their_answers_begin_differently() -> None:
    model = tiny()
    hay = needle.haystack(model, ["grass " * 500], 1024, count=4, chunk_tokens=CHUNK)
    assert len(hay.prompt) % CHUNK == 0
    assert len(hay.prompt) + max(len(question) for question, _ in hay.asked) <= 1024
    text = "".join(map(chr, hay.prompt))
    for one in needle.needles(4, 0):
        assert text.count(one.line) == 1
    assert needle.needles(4, 0) == needle.needles(4, 0) != needle.needles(4, 1)
    assert len({one.answer for one in needle.needles(16, 0)}) == 16


def test_a_needle_is_found_if_its_answer_is_the_likeliest_of_all() -> None:
    model = tiny()
    primed = model.primed(model.prefill(TOKENS[:64]))
    ranked = primed.predict(TOKENS[64:66])[-1].argsort(descending=True).tolist()
    assert needle.found(primed, [(TOKENS[64:66], ranked[5]), (TOKENS[64:66], ranked[9])]) == 1
    assert needle.found(primed, [(TOKENS[64:66], ranked[5])]) == 1


@pytest.mark.parametrize(("n", "context"), [(10, 0), (511, 0), (512, 256), (1279, 768), (1280, 1024), (9999, 1024)])
def test_prompts_are_whole_chunks_with_room_to_predict(n: int, context: int) -> None:
    assert context_of(n) == context


def test_means_are_over_documents() -> None:
    assert Mean.of([1.0]) == Mean(1.0, 0.0)
    assert Mean.of([1.0, 3.0]) == Mean(2.0, 1.0)
    scores = [Score("a", str(i), kind, float(i), 0, 1, 64, 2) for i, kind in enumerate(["prose", "prose", "code"])]
    both, prose = summary(scores, "a"), summary(scores, "a", "prose")
    assert both is not None
    assert prose is not None
    assert (both["kl"].value, prose["kl"].value) == (1, 0.5)
    assert summary(scores, "b") is summary(scores, "a", "chat") is None
