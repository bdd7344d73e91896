"""Codec `transform` for `bench quality`: calibrations of the measured model, and coders made of them.

Two cuts are measured, wide units (as `lmcache-s3 calibrate` makes them: 15 layers of SmolLM2) and units of one layer (a
small file, a cheap transform).

    python -m lmcache_s3.benchmarks.calibrated MODEL URL     # the former into a cache's bucket, for the demo

Each is calibrated on the spot, on texts that are not measured on, and kept in the
user's cache directory, so that a run that was interrupted goes on. Raises what calibrating raises.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from lmcache_s3.calibration.calibrate import Calibrating, Cut
from lmcache_s3.calibration_store import publish
from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.codecs.transform import TransformCodec
from lmcache_s3.config import load_settings
from lmcache_s3.errors import LMCacheS3Error
from lmcache_s3.quality.coding import CodecCoder
from lmcache_s3.quality.model import Model
from lmcache_s3.quality.texts import calibration as calibration_texts
from lmcache_s3.quality.texts import digest
from lmcache_s3.testing.models import cache_home
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.weights import weights_digest

CUTS = {"transform": Cut(), "transform-layerwise": Cut(unit_layers=1)}
"""Coder's name → how units are cut."""
_VERSION = 2
"""Raised when calibrating changes: what was kept is made anew."""


class CalibratedCoder(CodecCoder):
    """One level of a model's calibrations, one for each KV group, which differ in the shape of their cells."""

    def __init__(self, name: str, level: str, made: Sequence[Calibration]) -> None:
        self._name = f"{name}-{level}"
        self._codecs: dict[tuple[int, int, int, int], KVCodec] = {}
        for one in made:
            codec = TransformCodec(level, calibrations.register(one))
            self._codecs[one.kv, one.layers, one.heads, one.head_dim] = codec
        super().__init__(next(iter(self._codecs.values())))

    @property
    def name(self) -> str:
        return self._name

    def code(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> tuple[int, np.ndarray]:
        kv, layers, _, heads, channels = spec.shape
        return CodecCoder(self._codecs[kv, layers, heads, channels]).code(cell, spec, position)


def calibrated_coders(model: Model, levels: Sequence[str], console: Console) -> list[CodecCoder]:
    """All levels, or those given, of every cut; calibrates what was not calibrated yet."""
    coders: list[CodecCoder] = []
    for name, made in _calibrations(model, console).items():
        coders += [
            CalibratedCoder(name, level.name, made) for level in made[0].levels if not levels or level.name in levels
        ]
    return coders


def _calibrations(model: Model, console: Console, names: Sequence[str] = tuple(CUTS)) -> dict[str, list[Calibration]]:
    texts = calibration_texts()
    found: dict[str, list[Calibration]] = {}
    calibrating: Calibrating | None = None
    for name in names:
        cut = CUTS[name]
        key = hashlib.sha256(repr((_VERSION, model.path, model.kv_dtype, digest(texts), cut)).encode())
        directory = cache_home().parent / "calibration" / f"made-{key.hexdigest()[:32]}"
        made = _kept(directory, len(model.groups))
        if made is None:
            console.print(f"calibrating {name} on {model.name}", markup=False)
            calibrating = calibrating or Calibrating(model, texts, _Lines(console))
            made = calibrating.run(cut, {})
            directory.mkdir(parents=True, exist_ok=True)
            for i, one in enumerate(made):
                (directory / f"{i}.safetensors").write_bytes(one.to_bytes())
        found[name] = made
    if calibrating is not None:
        calibrating.forget()
    return found


def _kept(directory: Path, groups: int) -> list[Calibration] | None:
    with contextlib.suppress(OSError, LMCacheS3Error):
        return [Calibration.from_bytes((directory / f"{i}.safetensors").read_bytes()) for i in range(groups)]
    return None


class _Lines:
    """Progress as lines."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, stage: str, steps: int) -> None:
        self._console.print(f"{stage} ({steps}) …", markup=False)

    def advance(self) -> None:
        pass

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)


def main(model: str, url: str) -> None:
    """Put the wide calibration of a model with one KV group where caches under this URL find it."""
    known = Model(model)
    ((made,),) = _calibrations(known, Console(), ["transform"]).values()
    store = open_store(url, options=load_settings(url=url).store_options())
    try:
        publish(store, made, weights_digest(known.path))
    finally:
        store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
