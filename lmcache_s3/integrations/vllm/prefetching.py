"""Which requests' KV to bring nearer before it is asked for: those that wait in the engine's queue, and next turns.

Bookkeeping of the scheduler role; no I/O. vLLM matches a request when it has room for it. One that was not scheduled
in the step after it arrived waits for others, and its chunks can come from the bucket into a tier meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

_PER_STEP = 4
"""Requests looked up a step at most: hashing a long prompt takes a millisecond, which the engine waits for."""


class Queue:
    """The requests that wait, oldest first. Used by the scheduler's thread alone."""

    def __init__(self) -> None:
        self._arrived: dict[str, Request] = {}
        """Since the last step."""
        self._waiting: dict[str, Request] = {}
        """Through at least one step, and not looked up yet."""

    def arrived(self, request: Request) -> None:
        self._arrived[request.request_id] = request

    def left(self, request_id: str) -> None:
        """It is scheduled, its load is ordered, or it ended."""
        self._arrived.pop(request_id, None)
        self._waiting.pop(request_id, None)

    def step(self) -> list[Request]:
        """A step was scheduled: those to look up now, each once."""
        due = [self._waiting.pop(request_id) for request_id in list(self._waiting)[:_PER_STEP]]
        self._waiting.update(self._arrived)
        self._arrived.clear()
        return due

    def clear(self) -> None:
        self._arrived.clear()
        self._waiting.clear()
