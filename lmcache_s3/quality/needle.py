"""Needles in a haystack: facts strewn over a long prompt, asked for behind its coded cache.

Lines such as `Remember this pair: copper lantern tiger.` stand between paragraphs of prose. Asked for one, the model is
given the line up to `lantern`; the needle is found if, of all the answers in the prompt, it thinks the right one the
likeliest. Small models can do that, which follow no instructions and cannot spell a long code back. Answers begin
with different tokens, so that one step decides. All questions share one prompt and its cache. Pure but for the model.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lmcache_s3.quality.model import Model, Primed

_OWNERS = (
    "copper lantern", "northern ferry", "walnut cabinet", "silver whistle", "harbour office", "garden shed",
    "marble staircase", "velvet curtain", "railway museum", "paper lighthouse", "winter orchard", "granite bridge",
    "yellow submarine", "village bakery", "mountain hut", "crystal bowl", "wooden horse", "island chapel",
    "desert radio", "corner library", "iron gate", "cotton mill", "glass elevator", "river barge",
)  # fmt: skip


_ANSWERS = (
    "tiger", "orange", "window", "seven", "music", "river", "doctor", "summer", "paper", "king", "coffee", "stone",
    "London", "purple", "engine", "bread", "winter", "school", "market", "flower", "green", "horse", "silver", "island",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Needle:
    """question: what stands before the answer. answer: with the space before it."""

    question: str
    answer: str

    @property
    def line(self) -> str:
        return f"{self.question}{self.answer}."


@dataclass(frozen=True, slots=True)
class Haystack:
    """A prompt of whole chunks, as token ids. asked: (question's token ids, first token of its answer)."""

    prompt: list[int]
    asked: tuple[tuple[list[int], int], ...]


def needles(count: int, seed: int) -> list[Needle]:
    """Different owners and answers; the same seed gives the same."""
    chance = random.Random(seed)
    owners, answers = chance.sample(_OWNERS, count), chance.sample(_ANSWERS, count)
    return [Needle(f"Remember this pair: {owner}", f" {word}") for owner, word in zip(owners, answers, strict=True)]


def haystack(
    model: Model, prose: Sequence[str], length_tokens: int, *, count: int = 16, seed: int = 0, chunk_tokens: int = 256
) -> Haystack:
    """At most `length_tokens` tokens with the questions, `count` needles evenly apart in texts of `prose`."""
    length_tokens = min(length_tokens, model.max_tokens)
    strewn = needles(count, seed)
    questions = []
    for one in strewn:
        question = _plain(model, f"\n\n{one.question}")
        questions.append((question, _plain(model, f"\n\n{one.question}{one.answer}")[len(question)]))
    room = max(len(question) for question, _ in questions)
    prompt_tokens = (length_tokens - room) // chunk_tokens * chunk_tokens
    lines = [_plain(model, f"\n\n{one.line}\n\n") for one in strewn]
    hay_tokens = prompt_tokens - sum(map(len, lines))
    hay = list(itertools.islice(itertools.cycle(model.tokens("\n\n".join(prose))), hay_tokens))
    prompt: list[int] = []
    for i, line in enumerate(lines):
        prompt += hay[hay_tokens * i // count : hay_tokens * (i + 1) // count] + line
    return Haystack(prompt, tuple(questions))


def _plain(model: Model, text: str) -> list[int]:
    """Without what a tokenizer puts before a text."""
    return [int(token) for token in model.tokenizer(text, add_special_tokens=False)["input_ids"]]


def found(primed: Primed, asked: Sequence[tuple[list[int], int]]) -> int:
    """How many questions get the right answer of all that are in the prompt."""
    candidates = [answer for _, answer in asked]
    best = [int(primed.predict(question)[-1, candidates].argmax()) for question, _ in asked]
    return sum(candidates[choice] == answer for choice, (_, answer) in zip(best, asked, strict=True))
