"""Each command on a real small cache: what it says, what it exits with, and its errors."""

from __future__ import annotations

import json
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcache_s3.analysis.catalog import list_spaces
from lmcache_s3.codecs import registry
from lmcache_s3.errors import Invalid
from lmcache_s3.identity import KVGroup, Space
from lmcache_s3.testing.filling import fill
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.local import LocalStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import Outcome, extent_prefix, shard_key

Run = Callable[..., Any]


def test_ls(cli: Run, cache: Any) -> None:
    answer = cli("ls", cache.url)
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert len(lines) == 3
    assert {line.split()[0] for line in lines[1:]} == {cache.exact.id[:16], cache.lossy.id[:16]}
    assert "org/small" in answer.out

    rows = {row["space"]: row for row in cli("ls", cache.url, "--json").json["spaces"]}
    assert rows[cache.exact.id] == {
        "space": cache.exact.id, "model": "org/small", "kv_dtype": "bfloat16", "fidelity": "exact", "chunk_tokens": 16,
        "extents": 2, "chunks": 3, "raw_bytes": 3 * cache.exact.geometry.chunk_bytes, "version": 2,
        "encoded_bytes": sum(r.encoded_bytes for r in cache.records[:2]),
    }  # fmt: skip
    assert rows[cache.lossy.id]["fidelity"].startswith("unmeasured-cachegen-")


def test_ls_extents(cli: Run, cache: Any) -> None:
    rows = cli("ls", cache.url, "--extents", "--json").json["extents"]
    assert {row["extent"] for row in rows} == {str(r.name) for r in cache.records}
    for row in rows:
        assert (Path(row["url"].removeprefix("file://")) / "zarr.json").is_file()
    out = cli("ls", cache.url, "--extents").out
    assert all(str(r.name) in out for r in cache.records)


def test_url_and_more_come_from_the_environment(cli: Run, cache: Any) -> None:
    env = {"LMCACHE_S3_URL": cache.url}
    assert cache.exact.id[:16] in cli("ls", env=env).out
    assert cli("info", cache.exact.id[:10], "--json", env=env).json["space"] == cache.exact.id


def test_nothing_cached_yet(cli: Run, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'new'}"
    assert "nothing cached yet" in cli("ls", url).out
    assert cli("du", url, "--json").json["total"]["objects"] == 0
    answer = cli("verify", url)
    assert (answer.code, "nothing cached yet" in answer.out.replace("\n", " ")) == (0, True)
    assert not (tmp_path / "new").exists()


def test_a_prefix_that_was_forgotten(cli: Run, cache: Any) -> None:
    out = cli("ls", f"file://{cache.path.parent}").out.replace("\n", "")
    assert f"nothing cached yet; there is a cache below, {cache.url}" in out


def test_info(cli: Run, cache: Any) -> None:
    facts = cli("info", cache.url, cache.exact.id[:8], "--json").json
    assert facts["weights"] == "ab" * 32
    assert facts["chunks"] == 3
    record = cache.records[1]
    facts = cli("info", cache.url, record.name, "--json").json
    assert facts["tokens"] == [32, 48]
    assert facts["hashes"] == [h.hex() for h in record.chunk_hashes()]
    assert all((cache.path / shard).is_file() for shard in facts["shards"])
    assert len(facts["shards"]) == 4
    assert "4 full layers × 2 heads × 8" in cli("info", cache.url, cache.exact.id).out
    assert "lmcache_s3.open_extent(" in cli("info", cache.url, record.name).out
    assert cli("info", cache.url).out == cli("ls", cache.url).out


def test_info_of_what_is_not_there(cli: Run, cache: Any) -> None:
    answer = cli("info", cache.url, "0" * 32 + ".1.fast.0-" + "0" * 32)
    assert answer.code == 2
    assert "no live extent" in answer.err
    assert "no space of that id" in cli("info", cache.url, "zz").err


def test_du_adds_up_to_the_files(cli: Run, cache: Any) -> None:
    orphan = cache.path / extent_prefix(cache.exact.id, cache.records[0].name)
    orphan = orphan.parent / str(cache.records[0].name).replace(".fast.0-", ".fast.9-") / "c" / "0"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"x" * 77)
    for name, size in (("calibrations/a.safetensors", 1000), ("calibrations/b.json", 10), ("quality/w/x.json", 5)):
        cache.store.put(name, bytes(size))
    document = cli("du", cache.url, "--json").json
    files = [p for p in cache.path.rglob("*") if p.is_file()]
    assert document["total"]["objects"] == len(files)
    assert document["total"]["stored_bytes"] == sum(p.stat().st_size for p in files)
    rows = {(r["space"], r["what"]): r for r in document["rows"]}
    assert rows[cache.exact.id, "not in the index"]["stored_bytes"] == 77
    assert rows[cache.exact.id, "fast"]["objects"] == 2 * 5
    assert rows[cache.exact.id, "fast"]["raw_bytes"] == 3 * cache.exact.geometry.chunk_bytes
    assert rows[cache.lossy.id, "cachegen"]["objects"] == 2
    assert (rows["", "calibrations"]["objects"], rows["", "calibrations"]["stored_bytes"]) == (2, 1010)
    assert rows["", "quality"]["stored_bytes"] == 5
    assert "total" in cli("du", cache.url).out


def test_init_prints_a_line_to_copy(cli: Run, cache: Any, tmp_path: Path) -> None:
    answer = cli("init", f"file://{tmp_path / 'it is new'}", "--region", "eu-central-1")
    assert answer.code == 0
    assert "is empty" in answer.out
    words = shlex.split(answer.out.splitlines()[-1])
    assert words[:4] == ["vllm", "serve", "MODEL", "--kv-transfer-config"]
    config = json.loads(words[4])
    assert config["kv_load_failure_policy"] == "recompute"
    assert config["kv_connector_extra_config"] == {"url": f"file://{tmp_path / 'it is new'}", "region": "eu-central-1"}
    assert [p for p in (tmp_path / "it is new").rglob("*") if p.is_file()] == []
    assert cli("init", cache.url, "--json").json["spaces"] == 2


def test_doctor(cli: Run, cache: Any, tmp_path: Path) -> None:
    before = sorted(p for p in cache.path.rglob("*") if p.is_file())
    answer = cli("doctor", cache.url, "--json")
    assert answer.code == 0
    checks = {c["name"]: c for c in answer.json["checks"]}
    assert list(checks) == ["store", "write", "read", "clock", "put-if-absent", "delete", "versions"]
    assert all(c["ok"] is not False for c in checks.values())
    assert "one winner each" in checks["put-if-absent"]["detail"]
    assert sorted(p for p in cache.path.rglob("*") if p.is_file()) == before

    spaces = {s["space"]: s for s in answer.json["spaces"]}
    assert spaces[cache.exact.id]["version"] == spaces[cache.exact.id]["behind"] == 2
    assert spaces[cache.exact.id]["writers"] == 2
    out = cli("doctor", cache.url).out
    assert "versions/s" in out
    assert cache.exact.id[:16] in out

    (cache.path / "spaces" / cache.exact.id / "manifest" / "log" / f"{2:020d}").write_bytes(b"{}")
    answer = cli("doctor", cache.url)
    assert answer.code == 1
    assert "manifest version 2 cannot be read" in answer.out

    (tmp_path / "file").write_bytes(b"")
    answer = cli("doctor", f"file://{tmp_path / 'file'}")
    assert answer.code == 1
    assert "failed" in answer.out
    assert "is not a directory" in answer.out


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)


def test_verify_finds_each_kind_of_damage_and_repairs(cli: Run, cache: Any) -> None:
    answer = cli("verify", cache.url)
    assert (answer.code, answer.out) == (0, "ok 3 extents, every byte as the index says\n")

    flipped, without_metadata, truncated = cache.records
    _damage(cache.path / shard_key(cache.exact.id, flipped.name, flipped.grid, 2))
    (cache.path / extent_prefix(cache.exact.id, without_metadata.name) / "zarr.json").unlink()
    shard = cache.path / shard_key(cache.lossy.id, truncated.name, truncated.grid, 0)
    shard.write_bytes(shard.read_bytes()[:-5])

    answer = cli("verify", cache.url, "--json")
    assert answer.code == 1
    found = {d["extent"]: d["kind"] for d in answer.json["damaged"]}
    assert found == {
        str(flipped.name): "checksum", str(without_metadata.name): "missing", str(truncated.name): "format",
    }  # fmt: skip
    lines = cli("verify", cache.url).out.splitlines()
    assert sum(line.startswith("damaged") for line in lines) == 3
    assert "--repair" in lines[-1]

    assert sorted(cli("verify", cache.url, cache.lossy.id, "--repair", "--json").json["removed"]) == [
        str(truncated.name)
    ]
    assert cli("verify", cache.url, cache.lossy.id).code == 0
    assert cli("verify", cache.url, "--repair").code == 1
    assert cli("verify", cache.url).out == "ok 0 extents, every byte as the index says\n"


def test_verify_notices_metadata_that_disagrees_with_the_index(cli: Run, cache: Any) -> None:
    first, second, _ = cache.records
    path = cache.path / extent_prefix(cache.exact.id, first.name) / "zarr.json"
    document = json.loads(path.read_bytes())
    document["attributes"]["lmcache_s3"]["first_token"] = 16
    path.write_text(json.dumps(document))
    other = cache.path / extent_prefix(cache.exact.id, second.name) / "zarr.json"
    shape = json.loads(other.read_bytes())
    shape["shape"][2] += 1
    other.write_text(json.dumps(shape))
    damaged = cli("verify", cache.url, "--json").json["damaged"]
    assert {d["extent"]: d["kind"] for d in damaged} == {str(first.name): "format", str(second.name): "shape"}


def test_a_space_that_cannot_be_read_is_said_and_the_others_shown(cli: Run, cache: Any) -> None:
    (cache.path / "spaces" / cache.lossy.id / "space.json").write_bytes(b"{}")
    rows = {row["space"]: row for row in cli("ls", cache.url, "--json").json["spaces"]}
    assert "space.json" in rows[cache.lossy.id]["problem"]
    assert rows[cache.exact.id]["chunks"] == 3
    answer = cli("verify", cache.url)
    assert answer.code == 1
    assert f"unreadable space {cache.lossy.id}" in answer.out
    (cache.path / "spaces" / cache.lossy.id / "space.json").write_bytes(cache.exact.to_json())
    assert "of another space" in cli("ls", cache.url).out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ls"], "lmcache-s3: url: missing; write for example s3://bucket/prefix\n"),
        (["ls", "nope://x"], "unknown scheme 'nope'"),
        (["ls", "/x", "--addressing-style", "dns"], "addressing_style: 'dns' is not auto, path or virtual"),
        (["init", "/dev/null/x"], "not a directory"),
        (["calibrate", "/nope", "--url", "/x"], "model '/nope': no such directory"),
        (["ls", "/x", "--settings-file", "/y"], "settings file /y: cannot be read"),
    ],
)
def test_errors_are_one_line_and_exit_2(cli: Run, arguments: list[str], expected: str) -> None:
    answer = cli(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert expected.lower() in answer.err.lower()
    assert answer.err.count("\n") == 1


def test_a_listing_of_spaces_does_not_list_their_extents(cache: Any) -> None:
    counted = CountingStore(cache.store)
    assert {entry.id for entry in list_spaces(counted)} == {cache.exact.id, cache.lossy.id}
    assert counted.counts == {"list": 3, "get": 2}


@pytest.mark.s3
def test_on_real_s3(cli: Run, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket_url + "/team"
    space = Space("ab" * 32, "float16", (KVGroup("full", 2, 2, 1, 4),), chunk_tokens=16)
    store = open_store(url)
    record = fill(store, space, range(40))
    assert record is not None
    assert cli("doctor", url).code == 0
    assert cli("init", url, "--json").json["spaces"] == 1
    assert cli("ls", url, "--json").json["spaces"][0]["chunks"] == 2
    assert cli("verify", url).code == 0
    assert cli("du", url, "--json").json["total"]["raw_bytes"] == record.raw_bytes
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    answer = cli("doctor", url, "--json")
    assert answer.code == 1
    assert [c["ok"] for c in answer.json["checks"]] == [False, None]
    assert cli("ls", url).code == 2
    assert cli("ls", url).err.count("\n") == 1


def test_a_codec_that_is_not_installed_is_no_damage(cli: Run, cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = registry.make_codec

    def without_cachegen(id: str, config: Any = None) -> Any:
        if id == "cachegen":
            raise Invalid("codec 'cachegen' needs the package 'numba'", kind="setting")
        return original(id, config)

    monkeypatch.setattr("lmcache_s3.analysis.check.make_codec", without_cachegen)
    answer = cli("verify", cache.url, "--repair", "--json")
    assert answer.code == 1
    assert [d["kind"] for d in answer.json["damaged"]] == ["unsupported"]
    assert answer.json["removed"] == []
    assert f"unknown {cache.records[2].name}: unsupported: not checked" in cli("verify", cache.url).out
    monkeypatch.undo()
    assert cli("verify", cache.url).code == 0


def test_a_store_that_ignores_put_if_absent_is_refused(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clobber(self: LocalStore, key: str, data: bytes) -> Outcome:
        self.put(key, data)
        return Outcome.WON

    monkeypatch.setattr(LocalStore, "create", clobber)
    url = f"file://{tmp_path / 'store'}"
    answer = cli("init", url)
    assert answer.code == 2
    assert "single_writer=true" in answer.err
    answer = cli("doctor", url, "--json")
    assert answer.code == 1
    assert [c["name"] for c in answer.json["checks"] if c["ok"] is False] == ["put-if-absent"]


@pytest.mark.parametrize(("met", "code"), [(True, 0), (None, 0), (False, 1)])
def test_bench_runs_its_module(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, met: Any, code: int) -> None:
    asked: list[Any] = []

    def main(json_path: Path | None) -> Any:
        asked.append(json_path)
        return met

    module = types.ModuleType("lmcache_s3.benchmarks.e2e")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lmcache_s3.benchmarks.e2e", module)
    assert cli("bench", "e2e", "--json", tmp_path / "f.json").code == code
    assert asked == [tmp_path / "f.json"]
    assert cli("bench", "nothing").code == 2
