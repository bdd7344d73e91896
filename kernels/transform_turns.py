"""Cosine and sine of rotary positions, the same bits on every machine. FORMAT.md §7.3.

Float64 products and sums in a stated order, no library's trigonometry; NumPy contracts nothing. Pure; raises nothing.
"""

from __future__ import annotations

import numpy as np

TWO_PI = 6.283185307179586
_SINE = (-1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800)
_COSINE = (-1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800, 1 / 479001600, -1 / 87178291200)
"""Taylor's coefficients of sin(a) ÷ a − 1 and cos(a) − 1 in a²: for |a| ≤ π/4 good to 2⁻⁴⁰, far beyond float32."""


def _series(square: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    total: np.ndarray = np.full_like(square, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * square + coefficient
    total *= square
    return total


def cos_sin(turns: np.ndarray, first_token: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, sine) of turns · position, each float32 [token, pair]. turns: float64 [pair], revolutions a token.

    Positions are first_token … first_token + tokens − 1, at most 2⁵³.
    """
    position = np.float64(first_token) + np.arange(tokens, dtype=np.float64)
    turn = position[:, None] * turns
    turn = turn - np.rint(turn)  # exact, −½ … ½
    quarters = np.rint(turn * 4.0)
    angle = (turn - quarters * 0.25) * TWO_PI
    square = angle * angle
    sine = angle + angle * _series(square, _SINE)
    cosine = 1.0 + _series(square, _COSINE)
    quadrant = quarters.astype(np.int64) % 4
    odd = quadrant % 2 == 1
    cosine, sine = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    cosine = np.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    sine = np.where(quadrant >= 2, -sine, sine)
    return cosine.astype(np.float32), sine.astype(np.float32)
