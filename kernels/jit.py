"""How our Numba kernels are compiled: without the GIL, kept on disk where that is possible.

Raises nothing of its own. Floating point stays IEEE 754 to the bit (no fast-math, no contraction), because stored bytes
depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F, signature: object = None) -> F:
    """Compile with `nogil`, cached beside the source or in the user's cache directory, else in memory only.

    signature: of Numba, to compile for now; None: on first call, for what it is called with.
    """
    try:
        return cast(F, numba.njit(signature, nogil=True, cache=True, fastmath=False)(function))
    except RuntimeError:  # Numba found no directory that it may write
        return cast(F, numba.njit(signature, nogil=True, fastmath=False)(function))
