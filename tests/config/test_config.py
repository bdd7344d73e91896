"""Settings: where they come from, and that every mistake is one line with the thing and the mend."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from lmcache_s3.config import Settings, load_settings, settings_table
from lmcache_s3.errors import Invalid

URL = "s3://bucket/prefix"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("LMCACHE_S3_"):
            monkeypatch.delenv(name)


def message(**arguments: Any) -> str:
    with pytest.raises(Invalid) as caught:
        load_settings(**arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.kind == "setting"
    return text


def test_defaults() -> None:
    settings = load_settings(url=URL)
    assert settings.host_bytes == 1 << 30
    assert settings.extent_bytes == 256 << 20
    assert settings.disk_bytes is None
    assert settings.codec == "fast"
    assert settings.make_codec().id == "fast"


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("url: file:///from-file\npoll_s: 3\nio_threads: 3\nhost_bytes: null\n")
    monkeypatch.setenv("LMCACHE_S3_CONFIG", str(file))
    monkeypatch.setenv("LMCACHE_S3_POLL_S", "4")
    monkeypatch.setenv("LMCACHE_S3_IO_THREADS", "4")
    settings = load_settings(io_threads=5)
    assert (settings.url, settings.poll_s, settings.io_threads) == ("file:///from-file", 4.0, 5)
    assert settings.host_bytes is None
    other = tmp_path / "other.yaml"
    other.write_text("url: file:///other\n")
    assert load_settings(settings_file=other).url == "file:///other"
    assert load_settings(settings_file=str(other)).host_bytes == 1 << 30


def test_environment_spells_null_size_and_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_S3_URL", "memory://x")
    monkeypatch.setenv("LMCACHE_S3_HOST_BYTES", "null")
    monkeypatch.setenv("LMCACHE_S3_STAGING_BYTES", "1.5 GiB")
    monkeypatch.setenv("LMCACHE_S3_READ_ONLY", "true")
    monkeypatch.setenv("LMCACHE_S3_REGION", "")
    monkeypatch.setenv("LMCACHE_S3_STORAGE_OPTIONS", '{"anon": true}')
    settings = load_settings()
    assert settings.host_bytes is None
    assert settings.staging_bytes == 3 << 29
    assert settings.read_only
    assert settings.region is None
    assert settings.storage_options == {"anon": True}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "url: missing; write for example s3://bucket/prefix"),
        ({"url": ""}, "url: '' is not a URL; write for example s3://bucket/prefix"),
        ({"url": 7}, "url: 7 is not a URL; write for example s3://bucket/prefix"),
        ({"url": URL, "host_byte": 1}, "host_byte: unknown setting; did you mean host_bytes?"),
        ({"host_byte": 1}, "host_byte: unknown setting; did you mean host_bytes?"),
        (
            {"url": URL, "host_bytes": "12 parrots"},
            "host_bytes: '12 parrots' is not a size; write for example 4GiB",
        ),
        ({"url": URL, "host_bytes": "-4GiB"}, "host_bytes: '-4GiB' is not a size; write for example 4GiB"),
        ({"url": URL, "host_bytes": -4}, "host_bytes: -4 is not a size; write for example 4GiB"),
        ({"url": URL, "host_bytes": True}, "host_bytes: True is not a size; write for example 4GiB"),
        (
            {"url": URL, "host_bytes": 0},
            "host_bytes: 0 would keep nothing; leave it out (null) to switch this tier off",
        ),
        (
            {"url": URL, "disk_bytes": "0"},
            "disk_bytes: 0 would keep nothing; leave it out (null) to switch this tier off",
        ),
        (
            {"url": URL, "host_bytes": 1},
            "host_bytes: 1 bytes hold no chunk of any model; give 1MiB or more, and the unit: write for example 4GiB",
        ),
        (
            {"url": URL, "disk_bytes": 500},
            "disk_bytes: 500 bytes hold no chunk of any model; give 1MiB or more, and the unit: write for example 4GiB",
        ),
        (
            {"url": URL, "bucket_bytes": 500},
            "bucket_bytes: 500 bytes would have everything removed; give 1MiB or more, and the unit: write for example "
            "1TiB",
        ),
        (
            {"url": URL, "tenant_bytes": {"secret": 10}},
            "tenant_bytes: 10 bytes would have everything removed; give 1MiB or more, and the unit: write for example "
            "1TiB",
        ),
        ({"url": URL, "extent_bytes": 0}, "extent_bytes: 0 is not a size; write for example 256MiB"),
        ({"url": URL, "staging_bytes": None}, "staging_bytes: None is not a size; write for example 512MiB"),
        ({"url": URL, "codec": "fats"}, "codec: 'fats' is no codec; did you mean fast?"),
        (
            {"url": URL, "codec": "zzz"},
            "codec: 'zzz' is no codec; there are fast, torch, safetensors, lossless, cachegen, transform",
        ),
        (
            {"url": URL, "chunk_tokens": 0},
            "chunk_tokens: 0 is not a whole number from 1 to 65536; write for example 256",
        ),
        ({"url": URL, "poll_s": "often"}, "poll_s: 'often' is not a number of seconds above 0; write for example 2"),
        ({"url": URL, "poll_s": float("nan")}, "poll_s: nan is not a number of seconds above 0; write for example 2"),
        ({"url": URL, "read_only": "maybe"}, "read_only: 'maybe' is not true or false; write true or false"),
        ({"url": URL, "max_kl": 0}, "max_kl: 0 is not a number above 0; write for example 0.02"),
        (
            {"url": URL, "addressing_style": "dns"},
            "addressing_style: 'dns' is not auto, path or virtual; write path for a self-hosted service",
        ),
        (
            {"url": URL, "weights_digest": "abc"},
            "weights_digest: 'abc' is not 64 hex digits; leave it out to have it computed",
        ),
        (
            {"url": URL, "disk_bytes": "1GiB"},
            "disk_path: missing; disk_bytes: 1073741824 needs a directory, say /var/cache/lmcache-s3",
        ),
        ({"url": URL, "disk_path": "/x"}, "disk_bytes: missing; disk_path: '/x' needs a budget, for example 100GiB"),
        (
            {"url": URL, "storage_options": "key=secret"},
            'storage_options: its value is not a mapping; write for example {"token": "anon"}',
        ),
    ],
)
def test_mistakes(arguments: dict[str, Any], expected: str) -> None:
    assert message(**arguments) == expected


def test_long_values_are_cut() -> None:
    assert len(message(url=URL, host_bytes="9" * 5000 + "x")) < 200


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("host_byte: 3\n", "host_byte: unknown setting; did you mean host_bytes?"),
        ("- a\n", "not a mapping"),
        ("1: 2\n", "not a mapping"),
        ("a: [\n", "is not YAML"),
        ("url: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        ("host_bytes: 12 parrots\nurl: x\n", "'12 parrots' is not a size"),
        ("#" * 2_000_000, "2000000 bytes are no settings"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    assert expected in message(settings_file=file)


def test_file_that_is_not_there_and_an_empty_one(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in message(settings_file=tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_settings(url=URL, settings_file=tmp_path / "empty.yaml").url == URL


def test_off_without_quotes_is_false_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings.yaml").write_text("prefetch: off\n")
    assert load_settings(url=URL, settings_file=tmp_path / "settings.yaml").prefetch == "off"
    (tmp_path / "settings.yaml").write_text("prefetch: on\n")
    assert "prefetch: True is not off, queued or next_turn" in message(
        url=URL, settings_file=tmp_path / "settings.yaml"
    )
    monkeypatch.setenv("LMCACHE_S3_PREFETCH", "off")
    assert load_settings(url=URL).prefetch == "off"


def test_mistakes_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_S3_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("LMCACHE_S3_SERVICE_HOST", "10.0.0.1")
    load_settings(url=URL)
    monkeypatch.setenv("LMCACHE_S3_HOST_BYTE", "1")
    assert message(url=URL) == "LMCACHE_S3_HOST_BYTE: unknown setting; did you mean LMCACHE_S3_HOST_BYTES?"
    monkeypatch.delenv("LMCACHE_S3_HOST_BYTE")
    monkeypatch.setenv("LMCACHE_S3_STORAGE_OPTIONS", "{")
    assert message(url=URL) == "LMCACHE_S3_STORAGE_OPTIONS: its value is not JSON; write a JSON object"


def test_settings_are_frozen_travel_to_processes_and_hide_secrets() -> None:
    settings = load_settings(url=URL, storage_options={"secret": "hunter2"}, host_bytes="2GiB")
    with pytest.raises(ValueError, match="frozen"):
        settings.url = "other"
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301 (our own bytes)
    assert Settings.model_validate_json(settings.model_dump_json()) == settings
    assert "hunter2" not in repr(settings)


def test_table_has_a_cost_for_every_setting() -> None:
    table = settings_table()
    for name, info in Settings.model_fields.items():
        assert f"| `{name}` |" in table
        assert info.description
        assert len(info.description) > 30
    assert "| `host_bytes` | `1GiB` |" in table
    assert "| `url` | required |" in table
    assert len(table.splitlines()) == len(Settings.model_fields) + 2


def test_every_setting_reads_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "ca_bundle": "/ca.pem", "storage_options": "{}", "codec": "cachegen", "weights_digest": "ab" * 32,
            "codec_calibration": "ab" * 32,
        "disk_path": "/d", "addressing_style": "path", "prefetch": "off", "admission": "all",
        "requester_pays": "1", "read_only": "1", "single_writer": "1", "url": URL,
        "endpoint_url": "http://h", "region": "r", "profile": "p", "codec_level": "l",
        "tenant_bytes": '{"a": "1GiB"}',
    } | {
        f"{name}_bytes": "7MiB" for name in ("device", "host", "disk", "bucket", "default_tenant")
    }  # fmt: skip
    for name in Settings.model_fields:
        monkeypatch.setenv(f"LMCACHE_S3_{name.upper()}", values.get(name, "7"))
    settings = load_settings()
    assert {n: getattr(settings, n) for n in Settings.model_fields if n not in values} == {
        n: 7 for n in Settings.model_fields if n not in values
    }
    assert settings.addressing_style == "path"


def test_what_the_parts_get(tmp_path: Path) -> None:
    settings = load_settings(
        url=URL, region="eu", connect_timeout_s=1, poll_s=3, read_only=True, staging_bytes="64MiB", io_threads=3,
        load_deadline_s=9, host_bytes="2MiB", disk_bytes="3MiB", disk_path=tmp_path / "disk", ca_bundle="/ca.pem",
    )  # fmt: skip
    options = settings.store_options()
    assert (options.region, options.connect_timeout_s, options.ca_bundle) == ("eu", 1.0, "/ca.pem")
    index = settings.index_settings()
    assert (index.poll_s, index.read_only, index.single_writer) == (3.0, True, False)
    transfer = settings.transfer_settings()
    assert (transfer.staging_bytes, transfer.io_threads, transfer.load_deadline_s) == (64 << 20, 3, 9.0)
    tiers = settings.make_tiers("ab" * 32, "rank0")
    assert [(tier.name, tier.budget_bytes) for tier in tiers] == [("host", 2 << 20), ("disk", 3 << 20)]
    assert (tmp_path / "disk" / ("ab" * 8) / "rank0").is_dir()
    for tier in tiers:
        tier.close()
    assert load_settings(url=URL, host_bytes=None).make_tiers("ab" * 32, "rank0") == []


def test_codec_level() -> None:
    assert load_settings(url=URL, codec="cachegen", codec_level="fine").make_codec().config == {"level": "fine"}
    with pytest.raises(Invalid, match="'finest'"):
        load_settings(url=URL, codec="cachegen", codec_level="finest").make_codec()
    with pytest.raises(Invalid, match="level"):
        load_settings(url=URL, codec_level="fine").make_codec()


def test_what_is_kept() -> None:
    kept = load_settings(url=URL, bucket_bytes="1TiB", tenant_bytes={"a": "1GiB"}, ttl_s=86_400).gc_settings()
    assert (kept.max_bytes, kept.tenant_bytes, kept.ttl_s) == (2**40, {"a": 2**30}, 86_400)
    assert (kept.grace_s, kept.history_s, kept.default_tenant_bytes) == (3600, 7 * 86_400, None)
    with pytest.raises(Invalid, match="bucket_bytes: 0 is not a size above 0; write for example 1TiB"):
        load_settings(url=URL, bucket_bytes=0)
    with pytest.raises(Invalid) as e:
        load_settings(url=URL, tenant_bytes={"secret-salt": "much"})
    assert "secret-salt" not in str(e.value)
    assert "secret-salt" not in repr(load_settings(url=URL, tenant_bytes={"secret-salt": "1GiB"}))


def test_the_documentation_is_in_sync() -> None:
    """To mend: python -c "from lmcache_s3.config import settings_table; print(settings_table(), end='')", into it."""
    text = (Path(__file__).parents[2] / "SETTINGS.md").read_text("utf-8")
    assert settings_table() in text
