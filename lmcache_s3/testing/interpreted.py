"""Runs functions that launch Triton kernels where there is no GPU: in a process in which Triton interprets them.

Triton decides on import whether it compiles or interprets, so the process that asks must not be the one that runs. What
is run must be importable, and so must its arguments be picklable. Exceptions come back as they are.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")


class Interpreter:
    """One such process, from `with` to its end."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _interpret)

    @staticmethod
    def missing() -> str:
        """What is not installed here, for a test that is skipped; empty if all is there."""
        return ", ".join(name for name in ("torch", "triton") if find_spec(name) is None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()

    def run(self, function: Callable[..., T], *args: object, **kwargs: object) -> T:
        """Call it there, wait, and give back what it returns."""
        return self._pool.submit(function, *args, **kwargs).result()


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
