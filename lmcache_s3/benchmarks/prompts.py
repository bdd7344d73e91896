"""What the engines are asked: our own documents, each with a question about it.

Pure apart from reading package data. Raises nothing of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

QUESTIONS = {
    "coffee_machine": ("What colour is the handle of the small brush?", "blue"),
    "observatory": ("Who was the first director of the observatory?", "Margit Solheim"),
    "seed_bank": ("What did the teacher on Shetland send, and why was it welcome?", "oats"),
    "tide_mill": ("Who founded the trust that bought the mill?", "Helena Marsh"),
}
"""Document → question and what a right answer says, shortest document first; the last is kept for the failure that the
demo shows."""

WARM_UP = "Good morning. Please say in one short sentence what a library is for."
"""Shorter than a chunk: nothing of it is stored."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A document and the question about it."""

    name: str
    text: str
    question: str
    answer: str

    def is_answered_by(self, text: str) -> bool:
        """Whether a text says what a right answer says."""
        return self.answer.casefold() in text.casefold()

    @property
    def title(self) -> str:
        return self.text.splitlines()[0]

    def messages(self) -> list[dict[str, str]]:
        """As a chat: the document first, so that other questions about it share its prefix."""
        return [{"role": "user", "content": f"{self.text}\n\nQuestion: {self.question} Answer in one sentence."}]


def documents() -> list[Asked]:
    """The documents in the order of `QUESTIONS`."""
    room = files("lmcache_s3.benchmarks").joinpath("documents")
    return [Asked(name, room.joinpath(f"{name}.txt").read_text("utf-8"), *q) for name, q in QUESTIONS.items()]


def long_prompts(tokenised: Sequence[Sequence[int]], length_tokens: int, count: int) -> list[list[int]]:
    """`count` prompts of exactly `length_tokens` tokens with no prefix in common: the documents in other orders.

    tokenised: the token ids of each document. Real prose throughout; a document that is there twice is there whole.
    """
    prompts: list[list[int]] = []
    n = len(tokenised)
    for i in range(count):
        order = [tokenised[(i + k) % n] for k in range(n)]
        skip = 97 * (i // n)  # from the second round on a document does not start at its beginning
        tokens = list(
            itertools.islice(itertools.cycle(itertools.chain.from_iterable(order)), skip, skip + length_tokens)
        )
        prompts.append(tokens)
    return prompts
