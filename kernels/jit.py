"""How our Numba kernels are compiled: without the GIL, kept on disk where that is possible.

Raises nothing of its own. Floating point stays IEEE 754 to the bit (no fast-math, no contraction), because stored bytes
depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F, signature: object = None, *, nogil: bool = True) -> F:
    """Compile, cached beside the source or in the user's cache directory, else in memory only.

    signature: of Numba, to compile for now; None: on first call, for what it is called with. nogil: release the GIL
    meanwhile; what takes microseconds keeps it, since getting it back from a busy thread can take milliseconds.
    """
    try:
        return cast(F, numba.njit(signature, nogil=nogil, cache=True, fastmath=False)(function))
    except RuntimeError:  # Numba found no directory that it may write
        return cast(F, numba.njit(signature, nogil=nogil, fastmath=False)(function))


def inlined(function: F) -> F:
    """Compile what becomes part of each kernel that calls it, such as a step that hands vectors on in registers."""
    return cast(F, numba.njit(forceinline=True, nogil=True, fastmath=False)(function))
