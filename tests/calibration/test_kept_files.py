"""Copies of calibrations that processes keep in the user's cache take a bounded room."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lmcache_s3.codecs.base import CellSpec
from lmcache_s3.codecs.calibrations import Registry
from lmcache_s3.testing.calibrations import made_calibration
from lmcache_s3.testing.small import small_space
from lmcache_s3.types import Grid

SPEC = CellSpec.of(small_space().geometry, Grid())


def test_files_read_least_lately_make_room(tmp_path: Path) -> None:
    files = {one.digest: one.to_bytes() for one in (made_calibration(SPEC, seed=i) for i in range(4))}
    a, b, c, d = files
    died, written, other = tmp_path / "died.part", tmp_path / "written.part", tmp_path / "notes.txt"
    for path in (died, written, other):
        path.write_bytes(b"x")
    _age(died, 2)
    three = 3 * max(map(len, files.values()))

    def fetch(digest: str, room: int) -> None:
        registry = Registry(tmp_path, most_file_bytes=room)
        registry.attach("bucket", files.__getitem__)
        registry.find(digest)

    for digest, hours in ((a, 9), (b, 8), (c, 7)):
        fetch(digest, three)
        _age(tmp_path / f"{digest}.safetensors", hours)
    Registry(tmp_path).find(a)  # reads the file: used again
    fetch(d, three)
    assert _kept(tmp_path) == {a, c, d}
    assert [path.exists() for path in (died, written, other)] == [False, True, True]
    fetch(b, 1)
    assert _kept(tmp_path) == {b}, "what was just fetched stays"


def _age(path: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))


def _kept(directory: Path) -> set[str]:
    return {path.stem for path in directory.glob("*.safetensors")}
