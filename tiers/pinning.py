"""Host memory that a GPU reads and writes by itself (page-locked), where this process uses CUDA; else nothing.

torch is optional: whoever uses CUDA has imported it and begun; we do neither. What cannot be locked is used as it is:
slower, never wrong. Raises nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def pin_for_cuda(memory: np.ndarray) -> Callable[[], None] | None:
    """Page-lock an array's memory; returns what unlocks it, None if it was not locked."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    runtime, address = torch.cuda.cudart(), memory.ctypes.data
    if int(runtime.cudaHostRegister(address, memory.nbytes, 0)) != 0:
        return None
    return lambda: runtime.cudaHostUnregister(address)
