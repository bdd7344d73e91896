"""A small cache on a local path, and the command line in this process."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmcache_s3.cli.main import app
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.identity import KVGroup, Space
from lmcache_s3.testing.filling import fill, space_of
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import ExtentRecord, Grid

TOKENS = list(range(1000, 1050))
"""Three full chunks of 16, and two tokens."""
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class SmallCache:
    """Two spaces of one model: exact in four shards and two extents, and cachegen."""

    url: str
    path: Path
    store: ObjectStore
    exact: Space
    lossy: Space
    records: list[ExtentRecord] = field(default_factory=list)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("LMCACHE_S3_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def cli() -> Callable[..., Answer]:
    def run(*arguments: object, env: dict[str, str] | None = None) -> Answer:
        result = CliRunner().invoke(app, [str(a) for a in arguments], env={"TERM": "dumb", **(env or {})})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Answer(result.exit_code, _STYLE.sub("", result.stdout), result.stderr)

    return run


@pytest.fixture
def cache(tmp_path: Path) -> SmallCache:
    store = open_store(f"file://{tmp_path / 'store'}")
    exact = Space("ab" * 32, "bfloat16", (KVGroup("full", 4, 2, 2, 8),), chunk_tokens=16, model="org/small")
    cachegen = make_codec("cachegen")
    made = SmallCache(f"file://{tmp_path / 'store'}", tmp_path / "store", store, exact, space_of(exact, cachegen))
    for record in (
        fill(store, exact, TOKENS[:34], grid=Grid(2, 2)),
        fill(store, exact, TOKENS, grid=Grid(2, 2), seed=1),
        fill(store, made.lossy, TOKENS, codec=cachegen),
    ):
        assert record is not None
        made.records.append(record)
    return made
