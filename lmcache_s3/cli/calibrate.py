"""`lmcache-s3 calibrate`: make the transforms that codec `transform` needs for a model, and put them in the bucket."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.console import Console, RenderableType
from rich.progress import Progress as Bars
from rich.progress import TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lmcache_s3.cli.common import Cli, size_text, table
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.errors import Invalid, Unusable
from lmcache_s3.types import KVDtype

if TYPE_CHECKING:
    from lmcache_s3.quality.model import LayerGroup, Model

_DTYPES = ", ".join(get_args(KVDtype))


def calibrate(
    cli: Cli,
    model: Annotated[str, typer.Argument(help="Directory or hub name of the model.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text to calibrate on; may be repeated. Default: texts of this package and of Python."),
    ] = None,
    unit_layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers transformed as one: more take fewer bytes, more time and a larger file."),
    ] = None,
    stages: Annotated[int, typer.Option(min=1, help="Pipeline stages of the engines that will write.")] = 1,
    head_groups: Annotated[int, typer.Option(min=1, help="Head groups that cells are stored in.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: a GPU where there is one.")] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help=f"Of the engines' KV: {_DTYPES}. Default: the model's own.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the calibration to this file, not to the bucket; of several KV groups one file each: "
            "NAME.0.safetensors, NAME.1.safetensors, …"
        ),
    ] = None,
) -> None:
    """Calibrate codec `transform` on a model (about 20 minutes on two cores for one of 135 M parameters)."""
    from lmcache_s3.calibration.calibrate import Calibrating, Cut
    from lmcache_s3.calibration_store import publish
    from lmcache_s3.quality.model import Model
    from lmcache_s3.quality.texts import calibration, from_files
    from lmcache_s3.weights import weights_digest

    if out is None and cli.settings.read_only:
        raise Invalid("read_only is set: nothing can be put into the bucket; unset it, or give --out", kind="setting")
    documents = from_files(text) if text else calibration()
    if kv_dtype is not None and kv_dtype not in get_args(KVDtype):
        raise Invalid(f"--kv-dtype {kv_dtype} is none of {_DTYPES}", kind="argument", key="kv_dtype")
    known = Model(model, device=device, kv_dtype=cast(KVDtype | None, kv_dtype))
    weights = weights_digest(known.path)
    # What would stop it at the end stops it now.
    if out is None:
        _check_bucket(cli, known, weights)
    else:
        _check_directory(out)
    with _Shown(cli.progress_console) as shown:
        calibrating = Calibrating(known, documents, shown)
        made = calibrating.run(Cut(unit_layers, stages, head_groups), {"weights": weights})
    files = [_file(one) for one in made]
    if out is None:
        places = [publish(cli.store, one, weights) for one in made]
        use = "Engines that open this cache with codec=transform use it."
    else:
        paths = _paths(out, len(made))
        places = [str(path) for path in paths]
        for path, data in zip(paths, files, strict=True):
            _write(path, data)
        use = (
            f"In a cache, as calibrations/{made[0].digest}.safetensors, codec_calibration={made[0].digest} chooses it."
        )
        if len(made) > 1:
            use = "KL is what all groups together cost. Caches of models of several KV groups are not stored yet."
    calibrating.forget()
    _report(cli, known.groups, made, places, use)


def _check_bucket(cli: Cli, model: Model, weights: str) -> None:
    """That the store answers, and will be asked for such a calibration."""
    from lmcache_s3.calibration_store import read_name

    if len(model.groups) != 1:
        kinds = ", ".join(f"{one.group.layers} {one.group.kind}" for one in model.groups)
        raise Invalid(
            f"{model.name} has {len(model.groups)} KV groups (layers: {kinds}): caches of such models are not stored "
            "yet, so no calibration is; --out FILE writes one for each group",
            kind="argument",
            key="model",
        )
    with contextlib.suppress(Unusable):  # there is none yet, or one to be replaced
        read_name(cli.store, weights, model.kv_dtype)


def _check_directory(out: Path) -> None:
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK) or out.is_dir():
        raise Invalid(f"{out}: cannot be written (no such directory, or no right to)", kind="argument", key="out")


def _paths(out: Path, count: int) -> list[Path]:
    """`out`, or for several groups `out` with their numbers."""
    if count == 1:
        return [out]
    stem = out.with_suffix("") if out.suffix == ".safetensors" else out
    return [stem.with_name(f"{stem.name}.{i}.safetensors") for i in range(count)]


def _file(made: Calibration) -> bytes:
    try:
        return made.to_bytes()
    except Unusable as error:
        raise Invalid(
            f"{error}: make it smaller with --unit-layers or --head-groups (what was computed so far is kept)",
            kind="argument",
            key="unit_layers",
        ) from error


def _report(cli: Cli, groups: Sequence[LayerGroup], made: list[Calibration], places: list[str], use: str) -> None:
    told: list[dict[str, Any]] = []
    shown: list[RenderableType] = []
    for one, where, group in zip(made, places, groups, strict=True):
        said = _told(one, where, group)
        told.append(said)
        of = f" of {group.group.layers} {group.group.kind} layers" if len(made) > 1 else ""
        size = f"{size_text(said['bytes'])}, {said['units']} units of {said['widths']} values"
        shown += [_levels(one), f"[green]ok[/green] {where}{of} ({size})"]
    cli.emit(told[0] if len(told) == 1 else {"groups": told}, *shown, use)


def _told(made: Calibration, where: str, group: LayerGroup) -> dict[str, Any]:
    return {
        "calibration": made.digest,
        "where": where,
        "bytes": len(made.to_bytes()),
        "layers": list(group.layers),
        "levels": [{"name": o.name, "step": o.step, "kl": o.kl, "bits": o.bits} for o in made.levels],
        "units": len(made.units),
        "widths": sorted({unit.mean.size for unit in made.units}),
        "about": dict(made.about),
    }


def _levels(made: Calibration) -> Table:
    figures = ("step", "KL", "bits/value", "× vs bf16")
    shown = table("level", *figures, right=figures)
    for level in made.levels:
        assert level.kl is not None
        assert level.bits is not None
        ratio = f"{16 / level.bits:.0f}" if level.bits else "–"
        shown.add_row(level.name, f"{level.step:.5f}", f"{level.kl:.4f}", f"{level.bits:.2f}", ratio)
    return shown


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise Invalid(f"{path}: cannot be written ({e.strerror})", kind="argument") from e


class _Shown:
    """Progress on a console: bars on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        text = TextColumn("{task.description} {task.completed:.0f}/{task.total:.0f}")
        self._bars = Bars(text, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> _Shown:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, stage: str, steps: int) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(stage, total=steps)
        self.say(f"{stage} …")

    def advance(self) -> None:
        assert self._task is not None
        self._bars.advance(self._task)

    def say(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, markup=False)
