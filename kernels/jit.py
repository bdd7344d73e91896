"""How our Numba kernels are compiled: on first call, without the GIL, kept on disk where that is possible.

Raises nothing of its own. Floating point stays IEEE 754 to the bit (no fast-math, no contraction), because stored bytes
depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """Compile lazily with `nogil`, cached beside the source or in the user's cache directory, else in memory only."""
    try:
        return cast(F, numba.njit(nogil=True, cache=True, fastmath=False)(function))
    except RuntimeError:  # Numba found no directory that it may write
        return cast(F, numba.njit(nogil=True, fastmath=False)(function))
