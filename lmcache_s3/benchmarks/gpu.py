"""`lmcache-s3 bench gpu` (`make bench-gpu`): lossy codecs on a GPU, first their bits against the CPU's, then speed.

Cells are of an 8B model with grouped queries (32 layers, 8 heads of 128 channels, 256 tokens, bfloat16: 33.5 MB, 64
streams), heavy-tailed numbers, level medium. Speeds are gigabytes (10⁹) of decoded bfloat16 a second: of the kernels
alone, by CUDA events, the median of several runs, beside a copy of as many bytes within the device; and of whole cells
from host memory into device memory (checks and checksums on the host, transfer of the coded bytes, kernels), beside the
transfer of the uncoded bytes from pinned memory. How many streams must be in flight shows in the batches' sizes.
`transform` stands beside them, in layer-wise units (`gpu_transform.py`).

Without CUDA it says that nothing was measured, and exits with 2; with 1 where bits differ or a goal is missed. Needs
torch and triton (extra `gpu`) and no model: `python -m lmcache_s3.benchmarks.gpu [JSON]` runs it in a checkout.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lmcache_s3.benchmarks.figures import Figure, report
from lmcache_s3.benchmarks.gpu_timing import device_s, wall_s
from lmcache_s3.benchmarks.gpu_transform import measure_transform
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.codecs.base import CellSpec

if TYPE_CHECKING:
    import numpy as np
    import torch

OK, DIFFERS, NOT_MEASURED = 0, 1, 2
"""Exit statuses."""
CELL = CellSpec((2, 32, 256, 8, 128), "bfloat16")
BATCHES = (1, 2, 4, 8, 16, 32)
"""Cells in flight."""
GOAL_GBPS = 100.0
_GOAL_DEVICES = ("H100", "H200", "GH200", "B200", "GB200")
_DISTINCT = 4


_COLUMNS = {
    "entropy": "streams",
    "dequantise": "dequantise",
    "decode": "decode",
    "copy": "copy",
    "from host": "whole",
    "raw transfer": "transfer",
    "encode": "encode",
    "transform": "transform",
    "its encode": "transform_encode",
}
"""Heading → what of `Measured` stands below it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Gigabytes of bfloat16 a second in batches of `cells`: cachegen's streams, dequantise, decode: the two stages and
    both; whole: from host memory; copy: within the device; transfer: uncoded bytes from pinned host memory; encode: to
    coded rows in host memory. transform, transform_encode: decode of that codec, and to stored cells in host memory.
    """

    cells: int
    streams: float
    dequantise: float
    decode: float
    copy: float
    whole: float
    transfer: float
    encode: float
    transform: float
    transform_encode: float


def main(json_path: Path | None = None) -> int:
    """Check, measure, print, write the JSON; the exit status."""
    console = Console(highlight=False)
    if reason := _no_gpu():
        console.print(f"bench gpu: nothing was measured: {reason}", markup=False, soft_wrap=True)
        return NOT_MEASURED
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    steps = Steps(console)
    console.print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}", markup=False)
    if not check(device, steps):
        return DIFFERS
    with steps(f"measuring batches of {BATCHES[0]} to {BATCHES[-1]} cells"):
        ratio, measured = measure(device, CELL, BATCHES)
    _print(console, name, ratio, measured)
    return OK if report(figures(name, ratio, measured), json_path, console=console, gpu=name) else DIFFERS


def _no_gpu() -> str:
    if missing := [name for name in ("torch", "triton") if find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed (pip install lmcache-s3[gpu])"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here"
    return ""


def check(device: torch.device, steps: Steps) -> bool:
    """Whether the GPU's bits are the CPU's; says where they are not."""
    from lmcache_s3.testing import device_checks, device_transform_checks

    same = True
    for name, run in (device_checks.all_checks() | device_transform_checks.all_checks()).items():
        try:
            with steps(f"bits as the CPU's: {name}"):
                run(device)
        except AssertionError as e:
            steps.console.print(f"[red]✗[/red] {name}: {e}")
            same = False
    return same


def measure(device: torch.device, spec: CellSpec, batches: Sequence[int]) -> tuple[float, list[Measured]]:
    """(how many times smaller the cells are, speeds by size of the batch)."""
    from lmcache_s3.codecs.cachegen import CachegenCodec
    from lmcache_s3.testing.device_checks import position_of, some_cell

    raw = [some_cell(spec, seed) for seed in range(min(_DISTINCT, max(batches)))]
    stored = [CachegenCodec().encode(cell, spec, position_of(1)) for cell in raw]
    transform = measure_transform(device, spec, raw, batches)
    measured = []
    for n in batches:
        which = [i % len(raw) for i in range(n)]
        speeds = _measure_batch(device, spec, [raw[i] for i in which], [stored[i] for i in which])
        measured.append(Measured(n, **speeds, transform=transform[n][0], transform_encode=transform[n][1]))
    return sum(cell.nbytes for cell in raw) / sum(map(len, stored)), measured


def _measure_batch(
    device: torch.device, spec: CellSpec, raw: Sequence[np.ndarray], stored: Sequence[bytes]
) -> dict[str, float]:
    """The speeds of `cachegen`, by their names in `Measured`."""
    import numpy as np
    import torch

    from lmcache_s3.codecs.cachegen import CachegenCodec, read_cell
    from lmcache_s3.codecs.device import decode_cachegen
    from lmcache_s3.kernels import device_cachegen, device_cachegen_encode
    from lmcache_s3.kernels.device_cachegen import Places

    kv, layers, _, heads, channels = spec.shape
    n, kv_dtype, wanted = len(raw), spec.kv_dtype, CachegenCodec().steps(kv, layers)
    source = torch.from_numpy(np.stack(raw))
    source = source.pin_memory() if device.type == "cuda" else source
    there, out = source.to(device), torch.empty_like(source, device=device)
    places, of_source = Places.dense(out), Places.dense(there)
    coded = [of_cell for data in stored if (of_cell := read_cell(data, spec, None)[1]) is not None]
    rows = device_cachegen.upload(coded, [False] * n, spec.shape, device)
    values = device_cachegen.read_streams(rows)

    def encode() -> None:
        exact = np.zeros(n, bool)
        device_cachegen_encode.encode(of_source, (layers, heads, channels), exact, wanted, kv_dtype)

    on_device: dict[str, Callable[[], object]] = {
        "streams": lambda: device_cachegen.read_streams(rows),
        "dequantise": lambda: device_cachegen.write_values(rows, values, places, kv_dtype),
        "decode": lambda: device_cachegen.decode(rows, places, kv_dtype),
        "copy": lambda: out.copy_(there),
    }
    waited_for: dict[str, Callable[[], object]] = {
        "whole": lambda: decode_cachegen(stored, spec, [None] * n, places),
        "transfer": lambda: out.copy_(source, non_blocking=True),
        "encode": encode,
    }
    n_bytes = source.numel() * source.element_size()
    speeds = {name: n_bytes / device_s(device, run) / 1e9 for name, run in on_device.items()}
    return speeds | {name: n_bytes / wall_s(device, run) / 1e9 for name, run in waited_for.items()}


def figures(device_name: str, ratio: float, measured: Sequence[Measured]) -> list[Figure]:
    """Of the fastest batch each, and of the smallest that meets the goal."""
    goal = GOAL_GBPS if any(name in device_name for name in _GOAL_DEVICES) else None
    best = max(measured, key=lambda m: m.decode)
    out = [
        Figure("codec.gpu_decode_gbps", best.decode, "GB/s of output", goal, "higher"),
        Figure("codec.gpu_decode_cells", best.cells, "cells in flight", None, "lower"),
        Figure("codec.gpu_decode_vs_copy", best.decode / best.copy, "× device copy", None, "higher"),
        Figure("codec.gpu_transform_decode_gbps", max(m.transform for m in measured), "GB/s of output", goal, "higher"),
        Figure("codec.gpu_encode_gbps", max(m.encode for m in measured), "GB/s of input", None, "higher"),
        Figure(
            "codec.gpu_transform_encode_gbps",
            max(m.transform_encode for m in measured),
            "GB/s of input",
            None,
            "higher",
        ),
        Figure("codec.gpu_whole_gbps", max(m.whole for m in measured), "GB/s of output", None, "higher"),
        Figure("codec.gpu_transfer_gbps", max(m.transfer for m in measured), "GB/s uncoded", None, "higher"),
        Figure("codec.gpu_ratio", ratio, "×", None, "higher"),
    ]
    if enough := [m.cells for m in measured if m.decode >= GOAL_GBPS]:
        out.append(Figure("codec.gpu_cells_for_100_gbps", min(enough), "cells in flight", None, "lower"))
    for m in measured:
        out.append(Figure(f"codec.gpu_decode_gbps_{m.cells}_cells", m.decode, "GB/s of output", None, "higher"))
    return out


def _print(console: Console, name: str, ratio: float, measured: Sequence[Measured]) -> None:
    table = Table(title=f"{name}: GB/s of bfloat16, cells {ratio:.1f} × smaller", box=None, header_style="bold")
    per_cell = CELL.shape[0] * CELL.shape[1]
    for column in ("cells", "streams", *_COLUMNS):
        table.add_column(column, justify="right")
    for m in measured:
        speeds = (f"{getattr(m, name):.3g}" for name in _COLUMNS.values())
        table.add_row(str(m.cells), str(m.cells * per_cell), *speeds)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
