"""Documents joined to long prompts: long enough, each text used once, kinds apart."""

from __future__ import annotations

import pytest

from lmcache_s3.quality.long_texts import context_within, joined
from lmcache_s3.quality.measure import PREDICTED_TOKENS
from lmcache_s3.quality.texts import Document, held_out
from lmcache_s3.testing.tiny_model import tiny

pytest.importorskip("torch", reason="runs a model: pip install 'lmcache-s3[quality]'")


def test_joined_documents_are_long_enough_and_use_no_text_twice() -> None:
    model = tiny()
    made = joined(model, held_out(), 8192)
    assert {"prose", "code"} <= {one.kind for one in made}
    assert all(len(one.tokens(model)) >= 8192 + PREDICTED_TOKENS + 1 for one in made)
    for document in held_out():
        assert sum(document.text in one.text for one in made) <= 1
    assert len({one.name for one in made}) == len(made)


def test_kinds_with_too_little_text_are_left_out() -> None:
    model = tiny()
    short = [Document(f"s{i}", "chat", f"{i}" + "x" * 199) for i in range(2)]
    long = [Document(f"l{i}", "prose", f"{i}" + "y" * 399) for i in range(4)]
    # 400 + 2 + 400 letters hold 256 tokens and an answer, twice over
    assert [(one.kind, len(one.text)) for one in joined(model, short + long, 256)] == [("prose", 802), ("prose", 802)]


@pytest.mark.parametrize(("most", "wanted"), [(8192, 7936), (32_768, 8192), (1024, 768)])
def test_a_prompt_leaves_room_for_the_answer_in_the_models_context(most: int, wanted: int) -> None:
    model = tiny()
    model.max_tokens = most
    assert context_within(model, 8192) == wanted
