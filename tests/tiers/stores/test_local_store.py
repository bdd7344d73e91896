"""What only LocalStore can get wrong: what lies around, what stands in the way, and racing deletes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmcache_s3.errors import Invalid, LMCacheS3Error, Missing, Unavailable, Unsafe
from lmcache_s3.tiers.stores.fsspec_ import FsspecStore
from lmcache_s3.tiers.stores.keys import RESERVED_SEGMENT, check_key
from lmcache_s3.tiers.stores.local import LocalStore
from lmcache_s3.types import Outcome


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b/c", b"1")
    assert store.create("a/b/d", b"2") is Outcome.WON
    assert store.create("a/b/d", b"3") is Outcome.LOST
    assert files(tmp_path) == ["a", "a/b", "a/b/c", "a/b/d"]
    store.delete("a/b/c")
    store.delete("a/b/d")
    assert files(tmp_path) == []
    assert tmp_path.is_dir()


def test_foreign_files_are_not_objects(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.put("d/key", b"x")
    d = tmp_path / "store" / "d"
    (d / f"{RESERVED_SEGMENT}0123").write_bytes(b"half written by a crash")
    (d / "link").symlink_to("/etc/passwd")
    (d / "new\nline").write_bytes(b"x")
    os.mkfifo(d / "fifo")
    assert [info.key for info in store.list("")] == ["d/key"]
    for key in ("d/link", "d/fifo"):
        with pytest.raises(Missing):
            store.get(key)


def test_an_object_and_a_directory_of_one_name_are_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"x")
    store.put("d/e", b"x")
    for call in (lambda: store.put("a/b", b"y"), lambda: store.create("a/b", b"y"), lambda: store.put("d", b"y")):
        with pytest.raises(Invalid, match="below its name") as e:
            call()
        assert e.value.kind == "argument"
    assert files(tmp_path) == ["a", "d", "d/e"]


def test_check(tmp_path: Path) -> None:
    LocalStore(tmp_path).check()
    LocalStore(tmp_path / "will" / "be").check()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Invalid, match="not a directory") as e:
        LocalStore(tmp_path / "file" / "x").check()
    assert e.value.kind == "bucket"
    with pytest.raises(Invalid, match="absolute"):
        LocalStore("relative/path")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
def test_a_place_where_no_directory_can_be_made() -> None:
    store = LocalStore("/proc/lmcache-s3")
    for call in (lambda: store.put("key", b"x"), lambda: store.create("key", b"x")):
        with pytest.raises(Invalid, match=r"no directory can be made in /proc; name another path|permission") as e:
            call()
        assert e.value.kind == "permission"


def failing(number: int) -> Callable[..., int]:
    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number), "/some/where")

    return fail


@pytest.mark.parametrize(
    ("number", "error", "kind"),
    [
        (errno.ENOSPC, Unavailable, "full"),
        (errno.EDQUOT, Unavailable, "full"),
        (errno.EACCES, Invalid, "permission"),
        (errno.EROFS, Invalid, "permission"),
        (errno.EIO, Unavailable, "network"),
    ],
)
def test_failures_are_mapped_and_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[LMCacheS3Error], kind: str
) -> None:
    store = LocalStore(tmp_path)
    store.put("key", b"old")
    monkeypatch.setattr(os, "write", failing(number))
    for call in (lambda: store.put("key", b"new"), lambda: store.create("other", b"new")):
        with pytest.raises(error) as e:
            call()
        assert e.value.kind == kind
    monkeypatch.undo()
    assert files(tmp_path) == ["key"]
    assert store.get("key") == b"old"


def test_a_link_that_fails_oddly_is_unknown_and_one_that_cannot_be_is_unsafe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    monkeypatch.setattr(os, "link", failing(errno.EIO))
    assert store.create("key", b"x") is Outcome.UNKNOWN
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    with pytest.raises(Unsafe, match="single_writer") as e:
        store.create("key", b"x")
    assert e.value.kind == "no_put_if_absent"


def test_a_repeated_link_is_not_taken_for_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: the link took effect, its answer was lost, the client repeated it and was told that the file exists."""
    link = os.link

    def twice(*args: str, follow_symlinks: bool) -> None:
        link(*args, follow_symlinks=follow_symlinks)
        link(*args, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "link", twice)
    assert LocalStore(tmp_path).create("key", b"x") is Outcome.WON


def test_writers_survive_deleters_pruning_their_directory(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def work(i: int) -> None:
        for n in range(50):
            key = f"a/b/c/{i}-{n}"
            store.put(key, b"x")
            assert store.get(key) == b"x"
            store.delete(key)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert files(tmp_path) == []


def test_fsspec_file_system_without_a_safe_create_is_refused(tmp_path: Path) -> None:
    """fsspec's own local file system has a create, but a racy one."""
    store = FsspecStore.from_url(f"file://{tmp_path}")
    store.check()
    (tmp_path / "a").write_bytes(b"x")
    assert store.get("a") == b"x"
    with pytest.raises(Unsafe, match="single_writer") as e:
        store.create("b", b"x")
    assert e.value.kind == "no_put_if_absent"
    assert not (tmp_path / "b").exists()


def test_long_keys() -> None:
    assert check_key("/".join(["s" * 255] * 3)) == "/".join(["s" * 255] * 3)
    for key in ("s" * 256, "ü" * 128, "/".join(["s" * 255] * 4), f"a/{RESERVED_SEGMENT}x"):
        with pytest.raises(Invalid):
            check_key(key)
