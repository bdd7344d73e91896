"""How often chunks of each kind come back at each age, learned as it happens, and what keeping one is worth therefore.

Survival analysis in two tables: reuses seen, and chunk-seconds during which one could have been seen; their ratio is
the hazard. What keeping a chunk of some kind and age is worth is Gittins' index: the highest rate of reuses per second
of room that any way of keeping it longer and then giving up can expect. (Gittins, "Bandit processes and dynamic
allocation indices", 1979.) It looks ahead: people read and type before their next turn, so a chat's hazard rises first,
and the hazard of this moment would throw away every chat just before it comes back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

AGES_S = (
    *(0, 5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 150, 180, 240, 300, 400, 500, 600, 800, 1000, 1500, 2500),
    *(4000, 7000, 12_000, 20_000, 40_000, 86_400, 259_200),
)
"""Lower edges of the bins of age; the last bin has no end, and nothing is expected there."""
BINS = len(AGES_S) - 1
WIDTHS_S = np.diff(np.array(AGES_S, np.float64))

_REMEMBERED = 262_144.0
"""Chunk reuses that the tables remember; older ones count exponentially less."""
_PRIOR = 200.0
"""Reuses' worth of belief, for each kind and age, that a kind differs from all others by one factor only."""


class ReuseTable:
    """Reuses and exposure by kind and bin of age. kinds: how many there are; usual: how many of them, from the first
    on, are of the usual sort, from which the others' first guess comes."""

    def __init__(self, kinds: int, usual: int) -> None:
        self.reuses = np.zeros((kinds, BINS))
        self.exposure_s = np.zeros((kinds, BINS))
        self._usual = usual

    def forget(self) -> None:
        total = float(self.reuses.sum())
        if total > _REMEMBERED:
            self.reuses *= _REMEMBERED / total
            self.exposure_s *= _REMEMBERED / total

    def hazards(self) -> NDArray[np.float64]:
        """Reuses per second, [kind, bin]; 0 where nothing was seen yet."""
        seen, exposed = self.reuses[: self._usual].sum(axis=0), self.exposure_s[: self._usual].sum(axis=0)
        usual = np.divide(seen, exposed, out=np.zeros(BINS), where=exposed > 0)
        expected = self.exposure_s @ usual
        factor = (self.reuses.sum(axis=1) + 1) / (expected + 1)
        guess = usual * factor[:, None]
        believed_s = np.divide(_PRIOR, guess, out=np.zeros_like(guess), where=guess > 0)
        known = self.exposure_s + believed_s
        prior = np.where(guess > 0, _PRIOR, 0.0)
        out: NDArray[np.float64] = np.divide(self.reuses + prior, known, out=np.zeros_like(guess), where=known > 0)
        return out

    def worth(self) -> NDArray[np.float64]:
        """Gittins' index, [kind, bin]: reuses per second of room, from the beginning of the bin on."""
        reused = 1 - np.exp(-self.hazards() * WIDTHS_S)
        out = np.zeros_like(reused)
        for first in range(BINS):
            now = reused[:, first:]
            alive = np.cumprod(np.hstack([np.ones((len(now), 1)), 1 - now[:, :-1]]), axis=1)
            gained = np.cumsum(alive * now, axis=1)
            spent_s = np.cumsum(alive * WIDTHS_S[first:] * (1 - now / 2), axis=1)
            out[:, first] = (gained / spent_s).max(axis=1)
        return out
