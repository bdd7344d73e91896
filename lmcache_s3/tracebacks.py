"""Errors that outlive their work, without the memory that their tracebacks hold on to.

A traceback keeps the local variables of every frame it passed, buffers among them; a report with one error in it would
keep a buffer, and its part of the budget, for as long as somebody has the report. Raises nothing.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


def without_frames(error: E) -> E:
    """The same error, its causes too, without tracebacks: for typed errors, whose message says all."""
    for one in _chain(error):
        one.__traceback__ = None
    return error


def without_locals(error: E) -> E:
    """The same error with its tracebacks, but the variables of frames that have ended are cleared: for bugs."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)
    return error


def with_note(error: E) -> E:
    """The same error without tracebacks, and what they said as a note: for bugs of one load in another one's thread.
    Frames lead to their callers, which have not ended yet and hold the other load's memory."""
    error.add_note("".join(traceback.format_exception(error)))
    return without_frames(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [one.__cause__, one.__context__]
