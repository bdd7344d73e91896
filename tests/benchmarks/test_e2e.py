"""How `bench e2e` and the demo judge: what counts as the same answer and as the same KV. (The runs need engines.)"""

from __future__ import annotations

import dataclasses

import pytest

from lmcache_s3.benchmarks import demo, e2e
from lmcache_s3.benchmarks.figures import Figure
from lmcache_s3.benchmarks.prompts import documents, long_prompts
from lmcache_s3.testing.engine import Answer


def answer(tokens: tuple[int, ...], gap: float = 1.0) -> Answer:
    """The likeliest token of each step is the one taken, `gap` nats before 99."""
    logprobs = tuple(((token, -0.1), (99, -0.1 - gap)) for token in tokens)
    return Answer(10, tokens, "", 1.0, 2.0, 0, "length", logprobs)


def test_the_same_a_near_tie_and_another_answer() -> None:
    identity = e2e.Identity()
    for _ in range(19):
        identity.compare("same", answer((1, 2, 3)), answer((1, 2, 3)))
    assert (identity.holds, identity.to_the_bit) == (True, 19)
    identity.compare("tie", answer((1, 99, 5)), answer((1, 2, 3), gap=0.04))
    assert (identity.holds, len(identity.near_ties), identity.to_the_bit) == (True, 1, 19)
    identity.compare("another tie", answer((99,)), answer((1,), gap=0.0))
    assert not identity.holds, "two of 21 are more than 5 %"


@pytest.mark.parametrize("got", [answer((1, 99, 3)), answer((1, 2))])
def test_a_clear_difference_fails_whatever_the_rest(got: Answer) -> None:
    identity = e2e.Identity()
    for _ in range(100):
        identity.compare("same", answer((1, 2, 3)), answer((1, 2, 3)))
    identity.compare("other", got, answer((1, 2, 3), gap=0.06))
    assert not identity.holds
    assert demo.compare(got, answer((1, 2, 3), gap=0.06)) == "no"


def test_the_demo_says_where_answers_part_at_a_near_tie() -> None:
    assert demo.compare(answer((1, 2)), answer((1, 2))) == "yes"
    assert demo.compare(answer((1, 99)), answer((1, 2), gap=0.01)) == "to a near-tie at word 1 (0.01 nats)"


def line(op: str, name: str, bits: str) -> dict[str, str]:
    return {"op": op, "hash": name, "shard": "0-30×0-3", "xxh3": bits}


def test_loaded_kv_must_be_all_there_and_have_the_stored_bits() -> None:
    stored = [line("store", "a", "1"), line("store", "b", "2")]
    good = [line("load", "a", "1"), line("load", "b", "2")]
    assert e2e._loaded_is_stored(stored, good, 2)
    assert not e2e._loaded_is_stored(stored, good[:1], 2), "a chunk was not loaded"
    assert not e2e._loaded_is_stored(stored, [good[0], line("load", "b", "3")], 2), "other bits"
    assert not e2e._loaded_is_stored(stored, [good[0], line("load", "c", "2")], 2), "never stored"


def test_a_figure_that_misses_makes_the_run_fail_and_the_schema_holds() -> None:
    figure = Figure("e2e.ttft_speedup", 7.9, "×", 8, "higher")
    assert not figure.ok
    assert dataclasses.replace(figure, value=8.0).ok


def test_long_prompts_begin_differently_and_are_as_long_as_asked() -> None:
    texts = [[i * 1000 + k for k in range(700)] for i, _ in enumerate(documents())]
    prompts = long_prompts(texts, 2000, 9)
    assert {len(p) for p in prompts} == {2000}
    assert len({tuple(p[:256]) for p in prompts}) == 9
