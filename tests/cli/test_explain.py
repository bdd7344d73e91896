"""`explain` names the reason of a miss: another space, another salt, a token that differs, a prompt too short."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcache_s3.analysis.catalog import tending
from lmcache_s3.identity import KVGroup, Space, weights_digest
from lmcache_s3.index.manifest import Delta, encode_delta, inbox_key, log_key
from lmcache_s3.index.service import Index, IndexSettings
from lmcache_s3.testing.filling import fill
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import ExtentRecord, extent_prefix

Run = Callable[..., Any]
TOKENS = list(range(1000, 1050))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


@pytest.fixture
def space(model: Path) -> Space:
    digest = weights_digest(str(model))
    return Space(digest, "bfloat16", (KVGroup("full", 2, 2, 1, 4),), chunk_tokens=16, model="org/small")


@pytest.fixture
def ask(cli: Run, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """explain, for these tokens, by an engine with chunks of 16."""
    monkeypatch.setenv("LMCACHE_S3_CHUNK_TOKENS", "16")

    def run(tokens: list[int], *more: object) -> Any:
        file = tmp_path / "tokens"
        file.write_text(" ".join(map(str, tokens)))
        answer = cli("explain", f"file://{tmp_path / 'store'}", "--tokens", file, "--model", model, "--json", *more)
        assert answer.code == 0, answer.err
        return answer.json

    return run


@pytest.fixture
def filled(tmp_path: Path, space: Space) -> Space:
    fill(open_store(f"file://{tmp_path / 'store'}"), space, TOKENS)
    return space


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(
    ("tokens", "more", "matched", "expected"),
    [
        (TOKENS, (), 3, "a hit: 48 of 50 tokens are cached; the last 2 do not fill a chunk"),
        (TOKENS[:32], (), 2, "a hit: 32 of 32 tokens are cached"),
        (TOKENS[:15], (), 0, "15 tokens are shorter than a chunk (16)"),
        ([1, *TOKENS], (), 0, "not even the first chunk matches"),
        (TOKENS, ("--salt", "tenant"), 0, "another cache_salt (the one given)"),
        (TOKENS[:20] + [1] * 30, (), 1, "leaves everything stored within tokens 16 to 31"),
        (TOKENS + [1] * 30, (), 3, "3 of 5 chunks match"),
    ],
)
def test_where_a_prompt_leaves_what_is_stored(
    ask: Run, tokens: list[int], more: tuple[str, ...], matched: int, expected: str
) -> None:
    answer = ask(tokens, *more)
    assert answer["prompts"][0]["matched_chunks"] == matched
    assert expected in answer["verdict"][-1]
    assert [c["matched"] for c in answer["prompts"][0]["chunks"]] == [i < matched for i in range(len(tokens) // 16)]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"chunk_tokens": 32}, "chunk_tokens: 32 there, 16 here"),
        ({"fidelity": "kl0.02"}, "fidelity: kl0.02 there, exact here"),
        ({"kv_dtype": "float16"}, "kv_dtype: float16 there, bfloat16 here"),
    ],
)
def test_same_weights_stored_differently(
    ask: Run, tmp_path: Path, space: Space, change: dict[str, Any], field: str
) -> None:
    other = Space(**{**{f: getattr(space, f) for f in space.__dataclass_fields__}, **change})
    fill(open_store(f"file://{tmp_path / 'store'}"), other, TOKENS)
    answer = ask(TOKENS)
    assert answer["spaces"][0]["differs"] == [field]
    assert "the weights are the same, but stored differently" in answer["verdict"][0]
    assert field.partition(":")[0] in answer["verdict"][0]


def test_other_weights(ask: Run, filled: Space, model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"changed")
    answer = ask(TOKENS)
    assert answer["spaces"][0]["differs"][0].startswith(f"weights: {filled.weights[:12]}… there")
    assert "no space holds these weights" in answer["verdict"][0]
    assert answer["prompts"] == []


def test_an_empty_bucket_and_an_empty_space(ask: Run, tmp_path: Path, space: Space) -> None:
    assert "nothing is cached under this URL" in ask(TOKENS)["verdict"][0]
    store = open_store(f"file://{tmp_path / 'store'}")
    Index.open(store, space, settings=IndexSettings(single_writer=True), background=False).close()
    assert "the space is empty" in ask(TOKENS)["verdict"][0]


def test_a_gap_in_the_middle(ask: Run, tmp_path: Path, space: Space) -> None:
    store = open_store(f"file://{tmp_path / 'store'}")
    first = fill(store, space, TOKENS[:16])
    fill(store, space, TOKENS)
    assert first is not None
    with Index.open(store, space, settings=IndexSettings(single_writer=True), background=False) as index:
        index.remove([first.name], why="test").result(10)
    answer = ask(TOKENS)
    assert f"chunk 0 was evicted: version 3 removed {first.name} at " in answer["verdict"][0]
    assert "chunk 1 is there, but out of reach" in answer["verdict"][0]
    assert [c["missing"] and c["missing"]["fate"] for c in answer["prompts"][0]["chunks"]] == ["evicted", None, None]


def upload(tmp_path: Path, space: Space, tokens: list[int]) -> ExtentRecord:
    """An extent's objects, and no commit."""
    elsewhere = open_store(f"file://{tmp_path / 'elsewhere'}")
    record = fill(elsewhere, space, tokens)
    assert record is not None
    prefix = extent_prefix(space.id, record.name)
    shutil.copytree(tmp_path / "elsewhere" / prefix, tmp_path / "store" / prefix)
    return record


def fates(answer: Any) -> list[str | None]:
    return [c["missing"] and c["missing"]["fate"] for c in answer["prompts"][0]["chunks"]]


def test_not_yet_visible_void_and_gone(ask: Run, tmp_path: Path, filled: Space) -> None:
    store = open_store(f"file://{tmp_path / 'store'}")
    other = list(range(48))
    record = upload(tmp_path, filled, other)
    answer = ask(other)
    assert fates(answer) == ["uploaded"] * 3
    assert "chunk 0 is not yet visible: uploaded at " in answer["verdict"][0]
    assert str(record.name) in answer["verdict"][0]

    key = inbox_key(filled.id, "01JDXB4Z5T8V6Q2W3E4R5T6Y7H")
    store.put(key, encode_delta(Delta("01JDXB4Z5T8V6Q2W3E4R5T6Y7H", add=(record,))))
    answer = ask(other)
    assert fates(answer) == ["waiting"] * 3
    assert "chunk 0 is not yet visible: handed over at " in answer["verdict"][0]
    store.delete(key)

    log = tending(store, filled)
    log.commit([], floor=1)
    answer = ask(other)
    assert fates(answer) == ["void"] * 3
    assert f"chunk 0 is void: {record.name} was uploaded, but not committed within the grace" in answer["verdict"][0]

    log.checkpoint()
    for version in (1, 2):
        store.delete(log_key(filled.id, version))
    answer = ask(other)
    assert fates(answer) == ["gone"] * 3
    assert f"chunk 0 is gone: {record.name} lies there" in answer["verdict"][0]

    (tmp_path / "store" / extent_prefix(filled.id, record.name) / "zarr.json").write_bytes(b"{}")
    assert fates(ask(other)) == ["never"] * 3


def test_a_second_upload_is_covered(ask: Run, tmp_path: Path, filled: Space) -> None:
    record = upload(tmp_path, filled, TOKENS)
    answer = ask(TOKENS)
    assert answer["prompts"][0]["covered"] == [str(record.name)]
    assert "a hit" in answer["verdict"][0]
    assert "1 more uploads of it are covered by these" in answer["verdict"][0]
    assert fates(answer) == [None] * 3


def test_the_fates_are_in_the_table(cli: Run, tmp_path: Path, filled: Space) -> None:
    upload(tmp_path, filled, TOKENS[:32] + list(range(32)))
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps(TOKENS[:32] + list(range(32)) + [7] * 16))
    answer = cli("explain", f"file://{tmp_path / 'store'}", "--space", filled.id, "--tokens", file)
    lines = [line.split() for line in answer.out.splitlines() if " to " in line]
    assert ["hit" in line for line in lines[:3]] == [True, False, False]
    assert "missing: not yet visible, uploaded" in answer.out
    assert "missing: never stored" in answer.out


def test_people_read_a_table(cli: Run, tmp_path: Path, filled: Space) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps(TOKENS + [1] * 16))
    answer = cli("explain", f"file://{tmp_path / 'store'}", "--space", filled.id[:6], "--tokens", file)
    assert answer.code == 0
    assert "0 to 2" in answer.out
    assert "hit" in answer.out
    assert "missing" in answer.out


def test_the_only_space_is_meant_where_none_is_named(cli: Run, tmp_path: Path, filled: Space, space: Space) -> None:
    url, file = f"file://{tmp_path / 'store'}", tmp_path / "tokens.json"
    file.write_text(json.dumps(TOKENS))
    answer = cli("explain", url, "--tokens", file)
    assert answer.code == 0, answer.err
    assert "a hit: 48 of 50 tokens are cached" in answer.out
    assert "not compared" in answer.out
    assert cli("explain", url, "--json").json["spaces"] == [
        {"space": filled.id, "model": filled.model, "differs": None}
    ]
    other = Space(space.weights, "float16", space.groups, chunk_tokens=16)
    fill(open_store(url), other, TOKENS)
    answer = cli("explain", url, "--tokens", file)
    assert answer.code == 2
    assert "holds 2 spaces: give --model PATH, or --space ID" in answer.err
    assert "nothing is cached" in cli("explain", f"file://{tmp_path / 'nothing'}", "--tokens", file).out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[1, 2.5]", "each a whole number"),
        ("[-3]", "from 0 to 4294967295"),
        ("[4294967296]", "no list"),
        ("a b", "no list of token ids"),
        ("[", "no list"),
    ],
)
def test_tokens_that_are_none(cli: Run, tmp_path: Path, filled: Space, content: str, expected: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(content)
    answer = cli("explain", f"file://{tmp_path / 'store'}", "--space", filled.id, "--tokens", file)
    assert answer.code == 2
    assert expected in answer.err


@pytest.mark.slow
def test_a_text_goes_through_the_models_tokenizer(cli: Run, tmp_path: Path, model: Path, space: Space) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install transformers")
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    vocabulary = {"[UNK]": 0} | {f"w{i}": i for i in range(1, 100)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    fill(open_store(f"file://{tmp_path / 'store'}"), space, range(1, 33))
    text = tmp_path / "prompt.txt"
    text.write_text(" ".join(f"w{i}" for i in range(1, 36)))
    answer = cli("explain", f"file://{tmp_path / 'store'}", "--model", model, "--prompt-file", text, "--json",
                 env={"LMCACHE_S3_CHUNK_TOKENS": "16"})  # fmt: skip
    assert answer.code == 0, answer.err
    assert "32 of 35 tokens are cached" in answer.json["verdict"][0]
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    answer = cli("explain", f"file://{tmp_path / 'store'}", "--model", model, "--prompt", "w1")
    assert answer.code == 2
    assert "no tokenizer there" in answer.err
