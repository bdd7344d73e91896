"""gc, checkpoint, rebuild, log and ls --as-of on a real small cache: what they do, say and refuse."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcache_s3.cli.units import moment_s, size_bytes, span_s, time_text
from lmcache_s3.errors import Invalid
from lmcache_s3.identity import KVGroup, Space
from lmcache_s3.testing.filling import fill
from lmcache_s3.types import extent_prefix

Run = Callable[..., Any]
TOKENS = list(range(1000, 1050))


def age(cache: Any, seconds: float) -> None:
    """As if everything there had been written so much earlier."""
    for path in (cache.path / "spaces").rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime - seconds
            os.utime(path, (then, then))


def space_dir(cache: Any) -> Path:
    return Path(cache.path / "spaces" / cache.exact.id)


# ---- gc ----


def test_gc_of_a_cache_in_order_does_nothing(cli: Run, cache: Any) -> None:
    answer = cli("gc", cache.url)
    assert answer.code == 0, answer.err
    assert answer.out.count("nothing to do") == 2
    assert cli("verify", cache.url).code == 0


def test_gc_removes_to_the_budget_and_the_next_deletes(cli: Run, cache: Any) -> None:
    age(cache, 7200)
    record = cache.records[0]
    budget = f"{record.encoded_bytes}B"
    (plan,) = cli("gc", cache.url, "--space", cache.exact.id[:8], "--max-bytes", budget, "--dry-run", "--json").json[
        "spaces"
    ]
    assert [r["why"] for r in plan["removed"]] == ["budget"]
    (done,) = cli("gc", cache.url, "--space", cache.exact.id[:8], "--max-bytes", budget, "--json").json["spaces"]
    assert (
        done["removed"]
        == plan["removed"]
        == [{"extent": str(cache.records[1].name), "why": "budget", "encoded_bytes": cache.records[1].encoded_bytes}]
    )
    assert (cache.path / extent_prefix(cache.exact.id, cache.records[1].name)).is_dir()
    answer = cli("gc", cache.url, "--space", cache.exact.id[:8], "--max-bytes", budget)
    assert "extent objects deleted" in answer.out
    assert not (cache.path / extent_prefix(cache.exact.id, cache.records[1].name)).exists()
    assert cli("verify", cache.url).code == 0
    assert cli("ls", cache.url, "--extents", "--json").json["extents"][0]["space"]


def test_gc_by_tenant_and_by_age(cli: Run, cache: Any) -> None:
    other = fill(cache.store, cache.exact, range(500, 516), salt="team=a")
    assert other is not None
    plan = cli("gc", cache.url, "--tenant-bytes", "team=a=0B", "--dry-run", "--json").json
    assert [r["extent"] for s in plan["spaces"] for r in s["removed"]] == [str(other.name)]
    plan = cli("gc", cache.url, "--default-tenant-bytes", "0B", "--tenant-bytes", "team=a=1GiB", "--dry-run").out
    assert "over the tenant's budget" in plan
    age(cache, 3 * 86_400)
    plan = cli("gc", cache.url, "--ttl", "2d", "--dry-run", "--json").json
    assert sum(len(s["removed"]) for s in plan["spaces"]) == 4
    assert "not used for too long" in cli("gc", cache.url, "--ttl", "2d", "--dry-run").out
    assert cli("ls", cache.url, "--json").json["spaces"][0]["extents"] > 0, "a dry run removes nothing"


def test_gc_takes_the_settings_and_options_win(cli: Run, cache: Any) -> None:
    large = Space("cd" * 32, "bfloat16", (KVGroup("full", 4, 2, 8, 64),))
    for seed in range(3):
        fill(cache.store, large, range(seed, seed + 256), seed=seed)

    def removed(*arguments: object, **settings: str) -> int:
        env = {f"LMCACHE_S3_{name.upper()}": value for name, value in settings.items()}
        answer = cli("gc", cache.url, "--space", large.id, "--dry-run", "--json", *arguments, env=env)
        assert answer.code == 0, answer.err
        return sum(len(s["removed"]) for s in answer.json["spaces"])

    assert removed() == 0
    assert removed(bucket_bytes="1MiB") == 3
    assert removed("--max-bytes", "1GiB", bucket_bytes="1MiB") == 0
    assert removed(tenant_bytes='{"": "1MiB"}') == 3
    assert removed("--tenant-bytes", "other=1MiB", tenant_bytes='{"": "1MiB"}') == 0
    assert removed(default_tenant_bytes="1MiB") == 3
    age(cache, 7200)
    assert removed(ttl_s="3600") == 3
    assert removed(ttl_s="86400") == 0


def test_gc_deletes_orphans_and_leaves_alone_what_is_not_ours(cli: Run, cache: Any) -> None:
    record = cache.records[0]
    path = cache.path / extent_prefix(cache.exact.id, record.name)
    orphan = path.with_name(path.name.replace(record.name.nonce, "0" * 32))
    shutil.copytree(path, orphan)
    (space_dir(cache) / "extents" / "00").mkdir(exist_ok=True)
    (space_dir(cache) / "extents" / "00" / "readme").write_text("mine")
    assert "1 objects are not ours" in cli("gc", cache.url).out
    assert orphan.is_dir()
    age(cache, 7200)
    answer = cli("gc", cache.url)
    assert "in no index, and cannot come into it" in answer.out
    assert not orphan.exists()
    assert (space_dir(cache) / "extents" / "00" / "readme").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--max-bytes", "much"), "'much' is not a size; write for example 1TiB"),
        (("--ttl", "30"), "'30' is not a span of time; write for example 30d"),
        (("--tenant-bytes", "1GiB"), "write SALT=SIZE"),
        (("--space", "zz"), "no space of that id"),
    ],
)
def test_gc_names_the_mend(cli: Run, cache: Any, arguments: tuple[str, ...], expected: str) -> None:
    answer = cli("gc", cache.url, *arguments)
    assert answer.code == 2
    assert expected in answer.err


@pytest.mark.parametrize("name", ["gc", "checkpoint", "rebuild"])
def test_read_only_changes_nothing(cli: Run, cache: Any, name: str) -> None:
    answer = cli(name, cache.url, env={"LMCACHE_S3_READ_ONLY": "true"})
    assert answer.code == 2
    assert "read_only is set" in answer.err
    if name != "checkpoint":
        assert cli(name, cache.url, "--dry-run", env={"LMCACHE_S3_READ_ONLY": "true"}).code == 0


# ---- checkpoint, rebuild ----


def test_checkpoint(cli: Run, cache: Any) -> None:
    rows = {r["space"]: r for r in cli("checkpoint", cache.url, "--json").json["checkpoints"]}
    assert (rows[cache.exact.id]["version"], rows[cache.exact.id]["extents"]) == (2, 2)
    assert len(list((space_dir(cache) / "manifest" / "checkpoints").iterdir())) == 1
    assert cache.exact.id[:16] in cli("checkpoint", cache.url).out
    assert cli("verify", cache.url).code == 0


def test_rebuild_after_the_manifest_was_deleted(cli: Run, cache: Any) -> None:
    before = {r["extent"] for r in cli("ls", cache.url, "--extents", "--json").json["extents"]}
    shutil.rmtree(space_dir(cache) / "manifest")
    assert cli("ls", cache.url, "--json").json["spaces"] != []
    answer = cli("rebuild", cache.url)
    assert answer.code == 2
    assert "stop all engines, then add --yes" in answer.err
    (plan,) = cli("rebuild", cache.url, "--space", cache.exact.id, "--dry-run", "--json").json["spaces"]
    assert (plan["extents"], plan["chunks"], plan["rejected"]) == (2, 3, [])
    answer = cli("rebuild", cache.url, "--space", cache.exact.id, "--yes")
    assert answer.code == 0, answer.err
    assert "these are in the index" in answer.out
    assert {r["extent"] for r in cli("ls", cache.url, "--extents", "--json").json["extents"]} == before
    assert cli("verify", cache.url).code == 0


def test_rebuild_says_what_it_left_out(cli: Run, cache: Any) -> None:
    (cache.path / extent_prefix(cache.exact.id, cache.records[0].name) / "zarr.json").unlink()
    answer = cli("rebuild", cache.url, "--yes")
    assert "left out: 1 × no zarr.json: the upload never ended" in answer.out


# ---- log, ls --as-of ----


def test_log(cli: Run, cache: Any) -> None:
    document = cli("log", cache.url, "--space", cache.exact.id, "--json").json
    rows = document["spaces"][0]["versions"]
    assert [r["version"] for r in rows] == [1, 2]
    assert [r["added_extents"] for r in rows] == [1, 1]
    assert [r["added_chunks"] for r in rows] == [2, 1]
    assert rows[0]["added_bytes"] == cache.records[0].encoded_bytes
    assert rows[0]["removed_extents"] == 0
    assert len(rows[0]["writer"]) == 26
    assert time_text(time.time())[:11] == rows[0]["time"][:11]
    assert rows[0]["writer"] in cli("log", cache.url).out

    def versions(*arguments: object) -> list[int]:
        document = cli("log", cache.url, "--space", cache.exact.id, "--json", *arguments).json
        return [r["version"] for r in document["spaces"][0]["versions"]]

    assert versions("--last", 1) == [2]
    age(cache, 7200)
    assert versions("--since", "1h") == []
    assert versions("--since", "3h") == [1, 2]
    assert versions("--since", "3h", "--last", 1) == [2]


def test_log_shows_a_version_that_cannot_be_read(cli: Run, cache: Any) -> None:
    (space_dir(cache) / "manifest" / "log" / f"{2:020d}").write_bytes(b"{}")
    answer = cli("log", cache.url, "--space", cache.exact.id)
    assert answer.code == 0
    assert "format is not an integer" in answer.out


def test_ls_as_of(cli: Run, cache: Any) -> None:
    def extents(moment: object) -> int:
        answer = cli("ls", cache.url, "--space", cache.exact.id, "--as-of", moment, "--json")
        assert answer.code == 0, answer.err
        return int(answer.json["spaces"][0]["extents"])

    assert [extents(v) for v in (0, 1, 2)] == [0, 1, 2]
    first = space_dir(cache) / "manifest" / "log" / f"{1:020d}"
    os.utime(first, (first.stat().st_mtime - 7200,) * 2)
    assert extents("1h") == 1
    assert extents("3h") == 0
    assert extents(time_text(time.time() + 60)) == 2
    answer = cli("ls", cache.url, "--space", cache.exact.id, "--as-of", 7)
    assert answer.code == 2
    assert "there is no version 7, the newest is 2" in answer.err
    first.unlink()
    answer = cli("ls", cache.url, "--space", cache.exact.id, "--as-of", "3h")
    assert "nothing that old is kept; the oldest version is 2" in answer.err
    assert "is not a time" in cli("ls", cache.url, "--as-of", "then").err


def test_units() -> None:
    assert [size_bytes(t) for t in ("1.5KiB", "2MB", "7")] == [1536, 2_000_000, 7]
    assert [span_s(t) for t in ("0s", "90s", "1.5m", "2h", "30d", "1w")] == [0, 90, 90, 7200, 30 * 86_400, 604_800]
    assert moment_s("1970-01-02", lambda: 0.0) == 86_400
    assert moment_s("1970-01-01T01:00+01:00", lambda: 0.0) == 0
    assert moment_s("1h", lambda: 7200.0) == 3600
    for text in ("-1", "", "x"):
        with pytest.raises(Invalid):
            size_bytes(text)


@pytest.mark.usefixtures("cache")
def test_nothing_cached_yet(cli: Run, tmp_path: Path) -> None:
    for name in ("gc", "checkpoint", "log", "rebuild"):
        answer = cli(name, f"file://{tmp_path / 'new'}", *(("--yes",) if name == "rebuild" else ()))
        assert answer.code == 2
        assert "nothing is cached here yet" in answer.err
