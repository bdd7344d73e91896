"""Runs as a script: keeps the daemons of one test server and ends them all, whatever becomes of the process above.

Reads JSON lines on standard input and answers one line each: `{"start": name, "argv": […], "log": path, "env": {…}}` →
the PID; `{"alive": name}` → true or false; `{"kill": name}` → true when it is gone. The first line is
`{"remove": [paths]}`. At the end of input (the process above closed it or died) every daemon is killed and the paths
are removed. Daemons also die with this script (PR_SET_PDEATHSIG; it has one thread, so the signal means what it says).
Standard library only, so that it starts with `python -I -S` in milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _start(order: dict[str, Any]) -> subprocess.Popen[bytes]:
    with open(order["log"], "ab") as log:
        return subprocess.Popen(
            order["argv"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=os.path.dirname(order["log"]),
            env={**os.environ, **order["env"]},
            preexec_fn=_die_with_parent,
        )


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.kill()
    daemon.wait()


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    daemons: dict[str, subprocess.Popen[bytes]] = {}
    doomed: list[str] = []
    try:
        for line in sys.stdin:
            order = json.loads(line)
            answer: int | bool | str = True
            if "remove" in order:
                doomed = order["remove"]
            elif "start" in order:
                try:
                    daemons[order["start"]] = _start(order)
                    answer = daemons[order["start"]].pid
                except OSError as e:
                    answer = str(e)
            elif "alive" in order:
                answer = order["alive"] in daemons and daemons[order["alive"]].poll() is None
            elif "kill" in order:
                _end(daemons.pop(order["kill"]))
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    finally:
        for daemon in reversed(daemons.values()):
            _end(daemon)
        for path in doomed:
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            elif os.path.lexists(path):
                os.unlink(path)


if __name__ == "__main__":
    main()
