"""The notebooks run on a cache that `Cache` filled, show what is in it, and carry no outputs in git."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_s3.cache import Cache
from lmcache_s3.codecs.dtypes import from_float32
from lmcache_s3.identity import KVGroup, Space

with warnings.catch_warnings():
    # Jupyter's own deprecations are not ours to mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    import nbformat
    from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SPACE = Space("ab" * 32, "bfloat16", (KVGroup("full", 4, 2, 2, 16),), chunk_tokens=32, model="org/small")


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One system prompt of 64 tokens, on which three prompts grow; a prompt of another tenant."""
    url = f"file://{tmp_path / 'store'}"
    monkeypatch.setenv("LMCACHE_S3_URL", url)
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    rng = np.random.default_rng(5)
    system = list(range(64))
    prompts = [(system + [1000 + i] * 96, "") for i in range(3)] + [(list(range(500, 600)), "tenant")]
    with Cache.open(url, SPACE, chunk_tokens=32) as cache:
        for tokens, salt in prompts:
            kv = from_float32(rng.standard_normal((2, 4, len(tokens), 2, 16)).astype(np.float32), "bfloat16")
            cache.store(tokens, kv, salt=salt).result(30)
    return url


def _outputs(notebook: Any, kind: str) -> str:
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            found.append(output.get("data", {}).get(kind, "") or output.get("text", ""))
    return "\n".join(found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_outputs_in_git(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_inside_the_bucket(filled: str) -> None:
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
    text = _outputs(notebook, "text/plain")
    assert SPACE.id[:8] in text
    assert "org/small" in text
    # 64 + 3 × 96 + 96 tokens in full chunks are stored; the system prompt is shared twice.
    assert "448 tokens of KV are stored; without sharing it would be 576" in text
    assert "bfloat16" in text
    pictures = [o for c in notebook.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    heat_map = next(c for c in notebook.cells if "imshow" in c["source"])
    assert len(heat_map["outputs"][-1]["data"]["image/png"]) > 5000


def test_the_kernel_is_this_python() -> None:
    from jupyter_client.kernelspec import KernelSpecManager

    argv = KernelSpecManager().get_kernel_spec("python3").argv
    assert argv[0] in ("python", "python3", sys.executable) or Path(argv[0]).resolve() == Path(sys.executable).resolve()
