"""The command line as a process: without torch and vllm, Ctrl-C, and a closed pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "vllm", "triton", "transformers", "pandas", "matplotlib"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_everything_but_tokenizing_works_without_torch_and_vllm(cache: Any, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("1 2 3")
    program = BLOCKED + textwrap.dedent(
        """
        from lmcache_s3.cli.main import app
        url, space, tokens = sys.argv[1:]
        for line in (["ls", url], ["ls", url, "--extents"], ["info", url, space], ["du", url], ["verify", url],
                     ["doctor", url], ["init", url], ["explain", url, "--space", space, "--tokens", tokens]):
            code = app(line, standalone_mode=False)
            assert not code, (line, code)
        assert not {"torch", "vllm", "triton", "pandas"} & set(sys.modules)
        """
    )
    done = run(program, cache.url, cache.exact.id, str(tokens))
    assert done.returncode == 0, done.stderr
    assert "every byte as the index says" in done.stdout


def test_a_text_needs_transformers_and_says_so(cache: Any) -> None:
    program = BLOCKED + "from lmcache_s3.cli.main import main\nsys.argv[1:1] = ['explain']\nmain()"
    done = run(program, cache.url, "--space", cache.exact.id, "--model", "/x", "--prompt", "hello")
    assert done.returncode == 2
    assert done.stderr == ("lmcache-s3: a prompt's text needs transformers; pip install it, or give --tokens FILE\n")


def test_console_script_and_no_traceback() -> None:
    script = Path(sys.executable).parent / "lmcache-s3"
    done = subprocess.run([script, "ls", "nope://x"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("lmcache-s3: url 'nope://x'")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_exits_130(cache: Any) -> None:
    program = textwrap.dedent(
        """
        import signal, sys, time
        from lmcache_s3.cli import main as cli
        from lmcache_s3.tiers.stores.local import LocalStore
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        def slow(*_, **__):
            print("waiting", flush=True)
            time.sleep(30)
        LocalStore.list = slow
        sys.argv[:] = ["lmcache-s3", "ls", sys.argv[1]]
        cli.main()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, cache.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
