"""How far a model's answers behind a coded cache are from those behind its own.

A document's first tokens are the prompt, whose KV is taken, rounded to the kv dtype and put back: that is *uncoded*,
what an exact cache gives. The same KV through a coder is *coded*. Both then predict the same tokens of the document:

- `kl`: KL(uncoded ‖ coded) of the next-token distributions, nats per token, mean over the predictions; the sharpest;
- `delta_nll`: change of the true next token's negative log-likelihood, nats per token;
- `top1`: share of predictions with the same likeliest token;
- `greedy_tokens`: tokens of a greedy answer of 64 up to the first that differs.

A mean is over documents, its standard error that of their values. Raises what coders raise, nothing of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lmcache_s3.quality.coding import Coder, through
from lmcache_s3.quality.model import KV, Model, Primed

if TYPE_CHECKING:
    import torch

CONTEXT_TOKENS = 1024
PREDICTED_TOKENS = 255
GREEDY_TOKENS = 64
CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Score:
    """One coder on one document. bits: stored bits per value of KV, everything counted."""

    coder: str
    document: str
    kind: str
    kl: float
    delta_nll: float
    top1: float
    greedy_tokens: float
    bits: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over documents and its standard error (0 for one document)."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n = len(values)
        mean = math.fsum(values) / n
        spread = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, math.sqrt(spread / (n - 1) / n) if n > 1 else 0.0)


def context_of(n_tokens: int, *, chunk_tokens: int = CHUNK_TOKENS, wanted: int = CONTEXT_TOKENS) -> int:
    """Tokens of a document that become the prompt: whole chunks, with enough behind them to predict; 0: too short."""
    room = n_tokens - PREDICTED_TOKENS - 1
    return max(0, min(wanted, room) // chunk_tokens * chunk_tokens)


class Trial:
    """One document in one model: what it says uncoded is computed once, then coders are held against it."""

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int],
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        context_tokens: int = CONTEXT_TOKENS,
    ) -> None:
        """context_tokens: of the prompt, at most."""
        context = context_of(len(tokens), chunk_tokens=chunk_tokens, wanted=context_tokens)
        self._model, self._chunk_tokens = model, chunk_tokens
        self.prompt = list(tokens[:context])
        self._asked = list(tokens[context : context + PREDICTED_TOKENS])
        self._truth = list(tokens[context + 1 : context + PREDICTED_TOKENS + 1])
        self.kv: KV = model.prefill(self.prompt)
        uncoded = model.primed(self.kv)
        self._log_p = uncoded.predict(self._asked)
        self._answer = uncoded.greedy(self._asked[0], GREEDY_TOKENS)

    def score(self, coder: Coder, document: str, kind: str) -> Score:
        """A coder's figures on this document."""
        kv, stored_bytes = through(
            coder, self.kv, self._model.groups, self.prompt, self._model.kv_dtype, chunk_tokens=self._chunk_tokens
        )
        coded = self._model.primed(kv)
        kl, delta_nll, top1 = compare(self._log_p, coded.predict(self._asked), self._truth)
        greedy = same_answer(coded, self._asked[0], self._answer)
        return Score(coder.name, document, kind, kl, delta_nll, top1, greedy, bits_per_value(kv, stored_bytes))


def bits_per_value(kv: KV, stored_bytes: int) -> float:
    return 8 * stored_bytes / sum(bits.size for bits in kv)


def compare(log_p: torch.Tensor, log_q: torch.Tensor, truth: Sequence[int]) -> tuple[float, float, float]:
    """KL(p ‖ q) and the truth's NLL under q less that under p, nats per token; share of equal likeliest tokens.

    log_p, log_q: float32 `[token, vocabulary]`. truth: the token that came.
    """
    import torch

    with torch.inference_mode():
        per_token = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
        rows, columns = torch.arange(len(truth)), torch.tensor(list(truth), device=log_p.device)
        change = (log_p[rows, columns] - log_q[rows, columns]).double()
        same = (log_p.argmax(-1) == log_q.argmax(-1)).double()
        return float(per_token.mean()), float(change.mean()), float(same.mean())


def same_answer(coded: Primed, first: int, answer: Sequence[int]) -> float:
    """Tokens of `answer`, the greedy one uncoded, that the coded cache answers too before it parts.

    One pass suffices: up to where they part, the coded answer's tokens are these.
    """
    said = coded.predict([first, *answer[:-1]]).argmax(-1).tolist()
    return float(next((i for i, (a, b) in enumerate(zip(said, answer, strict=True)) if a != b), len(answer)))


def summary(scores: Sequence[Score], coder: str, kind: str | None = None) -> dict[str, Mean] | None:
    """Means of a coder's figures, over all documents or those of a kind; None where there are none."""
    chosen = [s for s in scores if s.coder == coder and kind in (None, s.kind)]
    if not chosen:
        return None
    read: dict[str, Callable[[Score], float]] = {
        "kl": lambda s: s.kl,
        "delta_nll": lambda s: s.delta_nll,
        "top1": lambda s: s.top1,
        "greedy_tokens": lambda s: s.greedy_tokens,
        "bits": lambda s: s.bits,
    }
    return {name: Mean.of([get(s) for s in chosen]) for name, get in read.items()}
