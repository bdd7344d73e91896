"""The wheel, in a clean virtual environment without torch and vllm: it imports, opens a bucket and runs the command."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow

FILL = """
import sys, numpy as np, lmcache_s3
from lmcache_s3.identity import KVGroup
space = lmcache_s3.Space(weights="ab" * 32, kv_dtype="bfloat16", rope={}, chunk_tokens=16, model="packaged",
                         groups=(KVGroup("full", 2, 2, 2, 8),))
kv = np.arange(2 * 2 * 32 * 2 * 8, dtype=np.uint16).reshape(2, 2, 32, 2, 8)
with lmcache_s3.Cache.open(sys.argv[1], space) as cache:
    cache.store(list(range(32)), kv).result(30)
with lmcache_s3.Cache.open(sys.argv[1], space) as cache:
    match = cache.lookup(list(range(32)))
    assert match.tokens == 32, match
    assert np.array_equal(cache.retrieve(match).result(30).array, kv)
heavy = {"torch", "vllm", "triton"} & set(sys.modules)
assert not heavy, heavy
print("ok")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a fresh environment with nothing but the wheel and what it needs."""
    where = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", str(where)], check=True, timeout=120)
    pip = [str(where / "bin" / "python"), "-m", "pip", "install", "--quiet", str(wheel)]
    subprocess.run(pip, check=True, timeout=600)
    return where / "bin"


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_room_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for must in (
        "tiers/base.py",
        "tiers/eviction/base.py",
        "tiers/stores/base.py",
        "codecs/base.py",
        "kernels/paged.py",
        "quality/texts/calibration/chats/slovenia.txt",
        "py.typed",
    ):
        assert f"lmcache_s3/{must}" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lmcache_s3"}


def test_it_stores_and_loads_without_torch_or_vllm(clean: Path, tmp_path: Path) -> None:
    python = str(clean / "python")
    for absent in ("torch", "vllm", "triton"):
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({absent!r}) is not None)"
        run(python, "-c", code, cwd=tmp_path)
    url = f"file://{tmp_path}/bucket"
    (tmp_path / "bucket").mkdir()
    assert run(python, "-c", FILL, url, cwd=tmp_path).strip() == "ok"
    spaces = json.loads(run(str(clean / "lmcache-s3"), "ls", url, "--json", cwd=tmp_path))
    assert "packaged" in json.dumps(spaces)
    assert "packaged" in run(str(clean / "lmcache-s3"), "ls", url, cwd=tmp_path)
    run(str(clean / "lmcache-s3"), "verify", url, cwd=tmp_path)


def test_plain_zarr_opens_an_extent_with_the_package_merely_installed(clean: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket"
    (tmp_path / "bucket").mkdir()
    run(str(clean / "python"), "-c", FILL, url, cwd=tmp_path)
    (meta,) = (tmp_path / "bucket").rglob("extents/*/*/zarr.json")
    code = "import sys, zarr; a = zarr.open_array(sys.argv[1], mode='r'); print(a.shape, a[:].ravel()[:4].tolist())"
    assert run(str(clean / "python"), "-c", code, str(meta.parent), cwd=tmp_path) == "(2, 2, 32, 2, 8) [0, 1, 2, 3]\n"
