"""Needles in a haystack: facts strewn over a long prompt, asked for behind its coded cache.

Lines such as `The access code of the copper lantern is 4471.` stand between paragraphs of prose. Asked for one, the
model is given the line up to `is`; the needle is found if it then says the code to the last digit. No model has to
follow instructions for that, so small ones can do it. All questions share one prompt and its cache. Pure apart from the
model.
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
    """A prompt of whole chunks and what can be asked of it, as token ids."""

    prompt: list[int]
    asked: tuple[tuple[list[int], list[int]], ...]


def needles(count: int, seed: int) -> list[Needle]:
    """Different owners and codes; the same seed gives the same."""
    chance = random.Random(seed)
    owners = chance.sample(_OWNERS, count)
    codes = chance.sample(range(1000, 10_000), count)
    return [Needle(f"The access code of the {owner} is", f" {code}") for owner, code in zip(owners, codes, strict=True)]


def haystack(
    model: Model, prose: Sequence[str], length_tokens: int, *, count: int = 16, seed: int = 0, chunk_tokens: int = 256
) -> Haystack:
    """At most `length_tokens` tokens with the questions, `count` needles evenly apart in texts of `prose`."""
    length_tokens = min(length_tokens, model.max_tokens)
    found = needles(count, seed)
    questions = []
    for needle in found:
        question = _plain(model, f"\n\n{needle.question}")
        questions.append((question, _plain(model, f"\n\n{needle.question}{needle.answer}")[len(question) :]))
    room = max(len(question) + len(answer) for question, answer in questions)
    prompt_tokens = (length_tokens - room) // chunk_tokens * chunk_tokens
    lines = [_plain(model, f"\n\n{needle.line}\n\n") for needle in found]
    hay_tokens = prompt_tokens - sum(map(len, lines))
    hay = list(itertools.islice(itertools.cycle(model.tokens("\n\n".join(prose))), hay_tokens))
    prompt: list[int] = []
    for i, line in enumerate(lines):
        prompt += hay[hay_tokens * i // count : hay_tokens * (i + 1) // count] + line
    return Haystack(prompt, tuple(questions))


def _plain(model: Model, text: str) -> list[int]:
    """Without what a tokenizer puts before a text."""
    return [int(token) for token in model.tokenizer(text, add_special_tokens=False)["input_ids"]]


def found(primed: Primed, asked: Sequence[tuple[list[int], list[int]]]) -> int:
    """How many answers the model gives in full, greedily."""
    count = 0
    for question, answer in asked:
        said = primed.predict([*question, *answer[:-1]])[len(question) - 1 :].argmax(-1).tolist()
        count += said == answer
    return count
