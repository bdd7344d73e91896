"""What an interrupted `bench quality` had measured, so that the next one goes on.

A file in the user's cache directory, named by all that figures depend on: model, texts, and what each coder makes of
one fixed cell (so that a changed codec begins anew). It goes when its run ends: no figure is of an older run. One that
cannot be read or written only costs time. Raises nothing of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.dtypes import from_float32
from lmcache_s3.quality.coding import Coder
from lmcache_s3.quality.model import Model
from lmcache_s3.testing.models import cache_home
from lmcache_s3.types import Grid


class State:
    """Rows by (document, kind); each document is written when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, list[dict[str, Any]]] = {}
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text("utf-8").splitlines():
                key, rows = json.loads(line)
                self._rows[key] = rows

    @classmethod
    def of(cls, model: Model, texts: str, coders: Sequence[Coder]) -> State:
        digest = hashlib.sha256(f"{model.path}\0{model.device}\0{texts}".encode())
        geometry = model.groups[0].geometry(model.kv_dtype, 16)
        spec, position = CellSpec.of(geometry, Grid()), CellPosition(bytes(16), 0, 0, 0)
        values = np.random.default_rng(0).standard_normal(spec.shape, np.float32)
        cell = from_float32(values, model.kv_dtype)
        for coder in coders:
            n_bytes, decoded = coder.code(cell, spec, position)
            digest.update(f"{coder.name}\0{n_bytes}\0".encode() + decoded.tobytes())
        return cls(cache_home().parent / "quality" / f"{digest.hexdigest()[:32]}.jsonl")

    @property
    def documents(self) -> int:
        return len(self._rows)

    def rows(self, name: str, kind: str) -> list[dict[str, Any]] | None:
        return self._rows.get(f"{kind}/{name}")

    def add(self, name: str, kind: str, rows: list[dict[str, Any]]) -> None:
        self._rows[f"{kind}/{name}"] = rows
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([f"{kind}/{name}", rows]) + "\n")

    def forget(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
