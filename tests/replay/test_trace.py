"""Traces are read as their formats say, and what is not one is refused by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmcache_s3.errors import Invalid
from lmcache_s3.replay.trace import read_trace


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines) + "\n\n", "utf-8")
    return path


def mooncake(time_ms: float, n_input: int, ids: list[int], n_output: int = 10) -> dict[str, Any]:
    return {"timestamp": time_ms, "input_length": n_input, "output_length": n_output, "hash_ids": ids}


def test_mooncake(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", mooncake(3000, 600, [7, 9]), mooncake(1500, 1024, [7, 8]))
    trace = read_trace(path)
    assert trace.chunk_tokens == 512
    first, second = trace.uses
    assert (first.time_s, second.time_s) == (1.5, 3.0), "by time"
    assert first.chunks[0] == second.chunks[0]
    assert first.chunks[1] != second.chunks[1]
    assert trace.input_tokens == 1624
    assert [trace.tokens_of(second, n) for n in (0, 1, 2)] == [0, 512, 600]


def test_bailians_small_blocks_are_joined_to_chunks(tmp_path: Path) -> None:
    ids = list(range(40))
    chat = {"chat_id": 1, "parent_chat_id": -1, "type": "text", "turn": 1}
    path = write(
        tmp_path / "t.jsonl",
        mooncake(1.5, 640, ids) | chat,
        mooncake(2.5, 512, ids[:32]) | chat,
        mooncake(3.5, 512, [*ids[:17], *range(100, 115)]) | chat,
    )
    trace = read_trace(path)
    assert trace.chunk_tokens == 256
    assert [use.time_s for use in trace.uses] == [1.5, 2.5, 3.5]
    a, b, c = (use.chunks for use in trace.uses)
    assert len(a) == 3, "the last is partial"
    assert a[:2] == b
    assert a[0] == c[0]
    assert a[1] != c[1], "its end differs"


def test_the_same_id_after_another_beginning_is_another_chunk(tmp_path: Path) -> None:
    a, b = read_trace(write(tmp_path / "t.jsonl", mooncake(0, 1024, [1, 2]), mooncake(0, 1024, [3, 2]))).uses
    assert not set(a.chunks) & set(b.chunks)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("no json", ":2: is not JSON"),
        ("[" * 100_000, ":2: is not JSON"),
        ("[1]", "not a JSON object"),
        (mooncake(0, 600, [1, 2]) | {"timestamp": "soon"}, "timestamp"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1, "hash_ids": [1]}', "no time"),
        (mooncake(0, 600, [1, 2]) | {"hash_ids": ["a"]}, "hash_ids"),
        (mooncake(0, 5000, [1, 2]), "block-tokens"),
        (mooncake(0, -1, []), "no number of tokens"),
        (mooncake(10**400, 600, [1, 2]), "no time"),
        (mooncake(0, 10**400, [1, 2]), "no number of tokens"),
        (mooncake(0, 600, [1, 2], 10**400), "no number of tokens"),
    ],
)
def test_what_is_no_trace_is_refused_by_line(tmp_path: Path, line: dict[str, Any] | str, says: str) -> None:
    path = write(tmp_path / "t.jsonl", mooncake(0, 600, [1, 2]), line)
    with pytest.raises(Invalid, match=says):
        read_trace(path)


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no requests"):
        read_trace(write(tmp_path / "t.jsonl"))
    with pytest.raises(Invalid, match="cannot be read"):
        read_trace(tmp_path / "absent")
