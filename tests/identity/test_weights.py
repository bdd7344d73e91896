"""The weights digest: content alone counts, and it is found cheaply where the hub already knows it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcache_s3 import weights
from lmcache_s3.errors import Invalid
from lmcache_s3.identity import weights_digest

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": b"first" * 1000,
    "model-00002-of-00002.safetensors": b"second" * 1000,
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"[]",
    "README.md": b"# a model",
}


def expected(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(c).digest() for c in contents))).hexdigest()


DIGEST = expected(
    *(FILES[n] for n in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was read."""
    seen: list[str] = []
    original: Callable[[Path], str] = weights._hash_file

    def spy(path: Path) -> str:
        seen.append(path.name)
        return original(path)

    monkeypatch.setattr(weights, "_hash_file", spy)
    return seen


def make_directory(path: Path, files: dict[str, bytes] = FILES) -> Path:
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def make_hub(home: Path, name: str = "org/small", commit: str = "c" * 40, ref: str | None = "main") -> Path:
    repo = home / "cache" / "huggingface" / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    for file, data in FILES.items():
        large = file.endswith(".safetensors")
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = repo / "blobs" / (hashlib.sha256(data).hexdigest() if large else git)
        blob.write_bytes(data)
        (snapshot / file).symlink_to(os.path.relpath(blob, snapshot))
    if ref:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    return repo


def test_directory_and_hub_name_agree_and_the_hub_is_not_read(home: Path, hashed: list[str]) -> None:
    assert weights_digest(str(make_directory(home / "copy"))) == DIGEST
    make_hub(home)
    hashed.clear()
    assert weights_digest("org/small") == DIGEST
    assert hashed == ["config.json"]
    assert weights_digest("org/small", revision="c" * 40) == DIGEST


def test_snapshot_directory_of_the_hub_cache_agrees(home: Path, hashed: list[str]) -> None:
    assert weights_digest(str(make_hub(home) / "snapshots" / ("c" * 40))) == DIGEST
    assert hashed == ["config.json"]


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00002.safetensors"])
def test_changed_weights_or_config_differ(home: Path, name: str) -> None:
    path = make_directory(home / "copy")
    data = bytearray(FILES[name])
    data[3] ^= 1
    before = (path / name).stat()
    assert weights_digest(str(path)) == DIGEST
    (path / name).write_bytes(data)
    os.utime(path / name, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert weights_digest(str(path)) != DIGEST


def test_everything_else_is_not_identity(home: Path) -> None:
    files = {k: v + b" " for k, v in FILES.items() if not k.endswith(".safetensors") and k != "config.json"}
    renamed = {k.replace("00001", "1").replace("00002", "2"): v for k, v in FILES.items() if k not in files}
    assert weights_digest(str(make_directory(home / "copy", files | renamed | {"pytorch_model.bin": b"x"}))) == DIGEST


def test_second_look_reads_nothing_and_works_read_only(home: Path, hashed: list[str]) -> None:
    path = str(make_directory(home / "copy"))
    weights_digest(path)
    assert sorted(hashed) == sorted(n for n in FILES if n.endswith(".safetensors") or n == "config.json")
    hashed.clear()
    assert weights_digest(path) == DIGEST
    assert hashed == ["config.json"]
    remembered = json.loads((home / "cache" / "lmcache-s3" / "weights.json").read_bytes())
    assert len(remembered["files"]) == 2
    assert os.listdir(home / "cache" / "lmcache-s3") == ["weights.json"]


def test_unwritable_memory_is_only_slower(home: Path) -> None:
    (home / "cache").write_bytes(b"a file where the directory should be")
    assert weights_digest(str(make_directory(home / "copy"))) == DIGEST


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"format": 9, "files": {}}', b'{"format": 1, "files": {"a": 3}}', b"\xff", b"[" * 100_000],
)
def test_damaged_memory_is_an_empty_one(home: Path, content: bytes) -> None:
    memory = home / "memory.json"
    memory.write_bytes(content)
    assert weights_digest(str(make_directory(home / "copy")), cache_path=memory) == DIGEST
    assert len(json.loads(memory.read_bytes())["files"]) == 2


def test_other_formats(home: Path) -> None:
    config = FILES["config.json"]
    both = {"config.json": config, "a.safetensors": b"1", "pytorch_model.bin": b"2"}
    old = {"config.json": config, "pytorch_model.bin": b"2", "adapter_model.safetensors": b"3"}
    mistral = {"params.json": b"{}", "consolidated.00.pth": b"4"}
    assert weights_digest(str(make_directory(home / "both", both))) == expected(config, b"1")
    assert weights_digest(str(home / "both"), every_format=True) == expected(config, b"1", b"2")
    assert weights_digest(str(make_directory(home / "old", old))) == expected(config, b"2")
    assert weights_digest(str(make_directory(home / "mistral", mistral))) == expected(b"{}", b"4")
    gguf = make_directory(home / "gguf", {"q4.gguf": b"5"}) / "q4.gguf"
    assert weights_digest(str(gguf)) == weights_digest(str(home / "gguf")) == expected(b"5")


def test_the_only_snapshot_serves_without_a_ref(home: Path) -> None:
    make_hub(home, ref=None)
    assert weights_digest("org/small") == DIGEST
    make_hub(home, commit="d" * 40, ref=None)
    with pytest.raises(Invalid, match="revision 'main' is not in the hub cache"):
        weights_digest("org/small")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"model": "org/none"}, "hf download org/none"),
        ({"model": "/nowhere/at/all"}, "no such directory"),
        ({"model": "org/small", "revision": "v2"}, "revision 'v2'"),
        ({"model": "org/small", "revision": "e" * 40}, "revision 'eeee"),
        ({"model": "../nowhere"}, "no such directory"),
    ],
)
def test_models_that_are_not_there(home: Path, arguments: dict[str, Any], named: str) -> None:
    make_hub(home)
    with pytest.raises(Invalid) as caught:
        weights_digest(**arguments)
    assert named in str(caught.value)
    assert arguments["model"] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_directories_without_weights_or_config(home: Path) -> None:
    with pytest.raises(Invalid, match="no weights"):
        weights_digest(str(make_directory(home / "a", {"config.json": b"{}"})))
    with pytest.raises(Invalid, match=r"no config\.json"):
        weights_digest(str(make_directory(home / "b", {"m.safetensors": b"1"})))
    file = home / "c.txt"
    file.write_bytes(b"")
    with pytest.raises(Invalid, match=r"no \.gguf"):
        weights_digest(str(file))


def test_dangling_link_of_an_unfinished_download(home: Path) -> None:
    repo = make_hub(home)
    for blob in (repo / "blobs").iterdir():
        if len(blob.name) == 64:
            blob.unlink()
    shutil.rmtree(home / "cache" / "lmcache-s3", ignore_errors=True)
    with pytest.raises(Invalid, match="cannot be read"):
        weights_digest("org/small")
