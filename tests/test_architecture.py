"""Arrows point one way: which part of the package may import which, and what importing it must not draw in."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"tiers": ROOT / "tiers", "codecs": ROOT / "codecs", "kernels": ROOT / "kernels"}
BOTTOM = {"lmcache_s3.types", "lmcache_s3.errors"}
MAY_USE = {
    "tiers": {"lmcache_s3.tiers", "lmcache_s3.codecs", "lmcache_s3.kernels"},
    "codecs": {"lmcache_s3.codecs", "lmcache_s3.kernels"},
    "kernels": {"lmcache_s3.kernels"},
}
ENGINE_ONLY = {"vllm"}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or "", node.lineno


def package_files() -> list[Path]:
    """Every source file once: the rooms at the top level, the rest below lmcache_s3/ without following its symlinks."""
    rest = [p for p in (ROOT / "lmcache_s3").rglob("*.py") if not any(q.is_symlink() for q in p.parents)]
    return rest + [p for room in ROOMS.values() for p in room.rglob("*.py")]


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_uses_only_what_lies_below_it(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in ROOMS[room].rglob("*.py")
        for name, line in imports(path)
        if name.startswith("lmcache_s3")
        and name not in BOTTOM
        and not any(name == ok or name.startswith(ok + ".") for ok in MAY_USE[room])
    ]
    assert not wrong, "\n".join(wrong)


def test_the_bottom_layer_is_standard_library_only() -> None:
    for module in BOTTOM:
        path = ROOT / (module.replace(".", "/") + ".py")
        for name, line in imports(path):
            assert name in BOTTOM or name.split(".")[0] in sys.stdlib_module_names, f"{path}:{line} imports {name}"


def test_only_the_engine_integration_imports_the_engine() -> None:
    home = ROOT / "lmcache_s3" / "integrations"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in package_files()
        if not path.is_relative_to(home) and path.name != "engine_worker.py"
        for name, line in imports(path)
        if name.split(".")[0] in ENGINE_ONLY
    ]
    assert not wrong, "\n".join(wrong)


def test_the_second_reader_of_the_index_shares_nothing_with_the_first() -> None:
    path = ROOT / "lmcache_s3" / "testing" / "second_index_reader.py"
    wrong = [f"line {line} imports {name}" for name, line in imports(path) if name.split(".")[0] == "lmcache_s3"]
    assert not wrong, "\n".join(wrong)


def test_rooms_have_no_init_so_that_codecs_stays_the_standard_librarys() -> None:
    for folder in ROOMS.values():
        assert not (folder / "__init__.py").exists()
    for room in ROOMS:
        link = ROOT / "lmcache_s3" / room
        assert link.is_symlink()
        assert link.readlink() == Path("..") / room


def test_every_folder_of_modules_is_in_the_wheel() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in package_files()}
    found = {".".join(p.relative_to(ROOT).parts) for p in folders}
    assert {name if name.startswith("lmcache_s3") else f"lmcache_s3.{name}" for name in found} == packages


ENGINES = {"torch", "vllm", "triton"}


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("lmcache_s3", ENGINES | {"numba"}),
        ("lmcache_s3.cli.main", ENGINES),  # the index's tables are read by Numba kernels (0.25 s to import)
        ("lmcache_s3.index.service", ENGINES),
    ],
)
def test_importing_draws_in_no_engine_and_no_torch(module: str, without: set[str]) -> None:
    code = f"import sys, {module}\nheavy = {without!r} & set(sys.modules)\nassert not heavy, heavy\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
