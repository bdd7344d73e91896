"""Traces of requests: when each came, how long it was, and which blocks of its prompt are the same as others'.

Read are Mooncake's format (a JSON object a line: `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of
blocks of 512 tokens) and Qwen-Bailian's (the same with `chat_id`, `parent_chat_id`, `type`, `turn`; seconds; blocks of
16).
Raises `Invalid` naming the line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_s3.errors import Invalid

_MOONCAKE_TOKENS = 512
_BAILIAN_TOKENS = 16
_CHUNK_TOKENS = 256
"""Blocks smaller than this are joined, as the cache would."""
_MAX_LINE_BYTES = 64 << 20
_MAX_NUMBER = 1 << 53
"""Times and lengths up to here are exact as floats; JSON's may be any."""


@dataclass(frozen=True, slots=True)
class Use:
    """One request. chunks: numbers of its prompt's chunks, in order; the last may be partial. Equal numbers: equal
    tokens up to the chunk's end."""

    time_s: float
    input_tokens: int
    output_tokens: int
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """uses: by time."""

    chunk_tokens: int
    uses: tuple[Use, ...]

    @property
    def input_tokens(self) -> int:
        return sum(use.input_tokens for use in self.uses)

    def tokens_of(self, use: Use, n_chunks: int) -> int:
        """Tokens of a request's first chunks."""
        return min(n_chunks * self.chunk_tokens, use.input_tokens)


def read_trace(path: Path, block_tokens: int | None = None) -> Trace:
    """block_tokens: of a block in the file; None: as its format says."""
    numbers: dict[tuple[int, int], int] = {}
    uses: list[Use] = []
    join = 1
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b""), 1):
                if not line.strip():
                    continue
                fields = _fields(line, f"{path}:{number}")
                bailian = "chat_id" in fields
                if block_tokens is None:
                    block_tokens = _BAILIAN_TOKENS if bailian else _MOONCAKE_TOKENS
                join = max(1, _CHUNK_TOKENS // block_tokens)
                uses.append(_use(fields, 1.0 if bailian else 1e-3, block_tokens, join, numbers, f"{path}:{number}"))
    except OSError as e:
        raise Invalid(f"{path}: cannot be read ({e.strerror})", kind="argument") from e
    if not uses or block_tokens is None:
        raise Invalid(f"{path}: holds no requests", kind="argument")
    uses.sort(key=lambda use: use.time_s)
    return Trace(join * block_tokens, tuple(uses))


def _fields(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise Invalid(f"{where}: is not JSON; a trace has one JSON object a line", kind="argument") from e
    if not isinstance(fields, dict):
        raise Invalid(f"{where}: is not a JSON object; a trace has one a line", kind="argument")
    return fields


def _use(
    fields: dict[str, Any],
    seconds: float,
    block_tokens: int,
    join: int,
    numbers: dict[tuple[int, int], int],
    where: str,
) -> Use:
    time, n_input, n_output = (fields.get(name) for name in ("timestamp", "input_length", "output_length"))
    ids = fields.get("hash_ids")
    if not isinstance(time, int | float) or not isinstance(n_input, int) or not isinstance(n_output, int):
        raise Invalid(f"{where}: lacks timestamp, input_length or output_length as numbers", kind="argument")
    if not abs(time) <= _MAX_NUMBER:
        raise Invalid(f"{where}: timestamp {str(time)[:40]} is no time", kind="argument")
    if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
        raise Invalid(f"{where}: lacks hash_ids, a list of integers", kind="argument")
    if not (0 <= n_input <= _MAX_NUMBER and 0 <= n_output <= _MAX_NUMBER):
        raise Invalid(f"{where}: input_length or output_length is no number of tokens", kind="argument")
    if not -1 <= len(ids) - n_input / block_tokens < 1.5:
        raise Invalid(
            f"{where}: {len(ids)} blocks of {block_tokens} tokens do not fit {n_input} tokens; mend --block-tokens",
            kind="argument",
        )
    blocks = []
    parent = -1
    for one in ids:  # the same id after another beginning is another chunk
        parent = numbers.setdefault((parent, one), len(numbers))
        blocks.append(parent)
    chunks = blocks[join - 1 :: join]
    if len(blocks) % join:
        chunks.append(blocks[-1])
    return Use(seconds * time, n_input, n_output, tuple(chunks))
