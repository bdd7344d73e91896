"""A background thread's manners: long work in Python lets other threads have the GIL every fraction of a millisecond.

A thread that wants the GIL otherwise waits until its holder is told to let go, 5 ms (`sys.getswitchinterval`) after it
asked: a thousand look-ups' time. Only threads that said `be_courteous` pause; for all others `breathe` does nothing, so
that pure functions may call it in their loops. Raises nothing.
"""

from __future__ import annotations

import threading
import time

_WORK_S = 300e-6
"""Work at most so long between pauses."""
_PAUSE_S = 20e-6
"""A pause must be a real sleep: after one of no length the same thread has the GIL again before another wakes."""
_thread = threading.local()


def be_courteous() -> None:
    """From now on `breathe` pauses in the calling thread."""
    _thread.since_s = time.perf_counter()


def breathe() -> None:
    """To be called every few microseconds of a longer piece of work."""
    since_s = getattr(_thread, "since_s", None)
    if since_s is not None and time.perf_counter() - since_s > _WORK_S:
        time.sleep(_PAUSE_S)
        _thread.since_s = time.perf_counter()
