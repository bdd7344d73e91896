"""Long documents, joined from those of one kind: what a coded cache costs far into a context.

Texts of one kind are put together in their order until they are long enough; none is used twice, and none that is part
of another, so of kinds with little text there are few, or none. Pure but for the model's tokenizer; raises nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_s3.quality.measure import CHUNK_TOKENS, PREDICTED_TOKENS
from lmcache_s3.quality.model import Model
from lmcache_s3.quality.texts import Document


def context_within(model: Model, context_tokens: int) -> int:
    """The longest prompt of whole chunks, at most so many tokens, behind which the model has room for an answer."""
    return min(context_tokens, model.max_tokens - PREDICTED_TOKENS - 1) // CHUNK_TOKENS * CHUNK_TOKENS


def joined(model: Model, documents: Sequence[Document], context_tokens: int) -> list[Document]:
    """Documents of at least `context_tokens` tokens and those to predict, kind by kind, in the order of the kinds."""
    needed = context_tokens + PREDICTED_TOKENS + 1
    whole = [one for one in documents if not any(one.text in other.text for other in documents if other is not one)]
    made: list[Document] = []
    for kind in dict.fromkeys(one.kind for one in documents):
        texts: list[str] = []
        n_tokens, n_made = 0, 0
        for one in whole:
            if one.kind != kind:
                continue
            texts.append(one.text)
            n_tokens += len(one.tokens(model))
            # texts are tokenised anew where they join: a few tokens more or less
            if n_tokens >= needed and len(model.tokens("\n\n".join(texts))) >= needed:
                made.append(Document(f"{kind}-{n_made}", kind, "\n\n".join(texts)))
                texts, n_tokens, n_made = [], 0, n_made + 1
    return made
