"""`lmcache-s3 calibrate`: make the transforms that codec `transform` needs for a model, and put them in the bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lmcache_s3.cli.common import Cli, size_text, table
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.errors import Invalid


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
    out: Annotated[Path | None, typer.Option(help="Write the calibration to this file, not to the bucket.")] = None,
) -> None:
    """Calibrate codec `transform` on a model (about 10 minutes on two cores for one of 135 M parameters)."""
    from lmcache_s3.calibration.calibrate import Calibrating, Cut
    from lmcache_s3.calibration_store import publish
    from lmcache_s3.quality.model import Model
    from lmcache_s3.quality.texts import calibration, from_files
    from lmcache_s3.weights import weights_digest

    if out is None and cli.settings.read_only:
        raise Invalid("read_only is set: nothing can be put into the bucket; unset it, or give --out", kind="setting")
    documents = from_files(text) if text else calibration()
    known = Model(model, device=device)
    weights = weights_digest(known.path)
    with _Shown(cli.progress_console) as shown:
        calibrating = Calibrating(known, documents, shown)
        cut = Cut(unit_layers, stages, head_groups)
        made = calibrating.run(cut, {"weights": weights})
    if len(made) != 1:
        raise Invalid(
            f"{known.name} has {len(made)} KV groups: caches of such models are not stored yet, so no calibration is",
            kind="argument",
            key="model",
        )
    (one,) = made
    if out is None:
        where = publish(cli.store, one, weights)
    else:
        where = str(out)
        _write(out, one.to_bytes())
    calibrating.forget()
    _report(cli, one, where)


def _report(cli: Cli, made: Calibration, where: str) -> None:
    shown = table("level", "step", "KL", "bits/value", "× vs bf16", right=("step", "KL", "bits/value", "× vs bf16"))
    for level in made.levels:
        assert level.kl is not None
        assert level.bits is not None
        shown.add_row(level.name, f"{level.step:.5f}", f"{level.kl:.4f}", f"{level.bits:.2f}", f"{16 / level.bits:.0f}")
    widths = sorted({unit.mean.size for unit in made.units})
    data = {
        "calibration": made.digest,
        "where": where,
        "bytes": len(made.to_bytes()),
        "levels": [{"name": o.name, "step": o.step, "kl": o.kl, "bits": o.bits} for o in made.levels],
        "units": len(made.units),
        "widths": widths,
        "about": dict(made.about),
    }
    said = f"[green]ok[/green] {where} ({size_text(len(made.to_bytes()))}, {len(made.units)} units of {widths} values)"
    cli.emit(data, shown, said, "Engines that open this cache with codec=transform use it.")


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as e:
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
