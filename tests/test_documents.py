"""What the documents say is so: examples run, commands and files exist, vectors are those the code is tested with."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

import pytest

from lmcache_s3.cli.main import app
from lmcache_s3.identity import prefix_hashes
from lmcache_s3.index.manifest import decode_delta, encode_delta

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "FORMAT.md", "SETTINGS.md", "CONTRIBUTING.md", "CHANGELOG.md")


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(name), re.DOTALL)


def test_the_readmes_python_runs() -> None:
    (example,) = blocks("README.md", "python")
    exec(compile(example.replace("memory://readme", f"memory://{secrets.token_hex(8)}"), "README.md", "exec"), {})


def test_the_readmes_commands_exist() -> None:
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
    known |= {group.name for group in app.registered_groups if group.name}
    shown = set(re.findall(r"lmcache-s3 ([a-z]+)", text("README.md")))
    listed = set(re.findall(r"`([a-z]+)(?: e2e)?`", text("README.md").split("and `init`")[1].split("All of them")[0]))
    assert shown | listed | {"init"} == known


def test_the_line_for_vllm_is_json_that_the_connector_admits() -> None:
    from lmcache_s3.config import load_settings

    (line,) = re.findall(r"--kv-transfer-config '(\{.*?\})'", text("README.md"), re.DOTALL)
    transfer = json.loads(line)
    assert transfer["kv_load_failure_policy"] == "recompute"
    load_settings(**transfer["kv_connector_extra_config"])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", text(name)):
        assert "://" in target or (ROOT / target).exists(), target
    for path in re.findall(r"`((?:tests|lmcache_s3|codecs|tiers|kernels)/[\w./-]+)`", text(name)):
        assert (ROOT / path).exists(), path


def test_the_vectors_of_the_format() -> None:
    space_id = "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"  # SHA-256 of {"a":1}
    for value in prefix_hashes(space_id, list(range(8)), 4):
        assert value.hex() in text("FORMAT.md")
    (version,) = [line for line in text("FORMAT.md").splitlines() if line.startswith('{"format":1,"writer":"01JDX')]
    assert encode_delta(decode_delta(version.encode(), 8)).decode() == version
    for test, vector in (("test_header.py", r'"([0-9a-f]{40,})"\n\s+"([0-9a-f]+)"'),):
        (halves,) = re.findall(vector, text(f"tests/codecs/{test}"))
        assert "".join(halves) in re.sub(r"[`\s]", "", text("FORMAT.md"))
