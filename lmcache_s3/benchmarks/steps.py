"""Progress that is always visible: a spinner with seconds on a terminal, plain lines where there is none.

One thread. Raises nothing of its own; an exception inside a step passes through after the step was marked as failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

_LINE_EVERY_S = 10.0
"""Without a terminal a waiting step says so this often."""

Tick = Callable[[float], None]


class Steps:
    """`with steps("starting the engines") as tick:` – call `tick(seconds)` while waiting."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._begin_s = time.monotonic()

    @contextmanager
    def __call__(self, text: str) -> Iterator[Tick]:
        start_s = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(text) as status:
                yield lambda _seconds: status.update(f"{text} [dim]{time.monotonic() - start_s:.0f} s[/dim]")
        else:
            self.console.print(f"[{start_s - self._begin_s:5.0f} s] {text} …", markup=False)
            said_s = start_s

            def tick(_seconds: float) -> None:
                nonlocal said_s
                now_s = time.monotonic()
                if now_s - said_s >= _LINE_EVERY_S:
                    said_s = now_s
                    self.console.print(f"          … {now_s - start_s:.0f} s", markup=False)

            yield tick
        self.console.print(f"[green]✓[/green] {text} [dim]({time.monotonic() - start_s:.1f} s)[/dim]")
