"""Whether the settings' sizes go with a model: a budget in which nothing of it fits is said at the start.

A budget that can never hold what it is for is an error, one that only may be of little use a warning. The least that
any size may be is the schema's affair (`config`), that of `staging_bytes` `transfer.check_staging`'s.
Pure. Raises `Invalid` (setting), one line.
"""

from __future__ import annotations

from collections.abc import Iterator

from lmcache_s3.codecs.base import CellSpec, KVCodec
from lmcache_s3.config import Settings
from lmcache_s3.errors import Invalid
from lmcache_s3.storing import expected_chunk_bytes
from lmcache_s3.types import Geometry, Grid

_MIB = 1 << 20
_FIXED_BYTES = 256 << 10
"""Room beside cells: more than what any tier takes for itself."""


def check_sizes(settings: Settings, geometry: Geometry, codec: KVCodec, grid: Grid, *, processes: int = 1) -> list[str]:
    """What is to be warned of, a line each.

    grid: of the cells that are written. processes: that share the cells of a chunk, each with budgets of its own.
    Raises `Invalid` for a budget in which not one cell fits.
    """
    spec = CellSpec.of(geometry, grid)
    fixed = codec.fixed_bytes(spec)
    most = codec.max_encoded_bytes(spec) if fixed is None else fixed
    warnings = list(_tiers(settings, fixed, most))
    if not settings.read_only:
        warnings += _stores(settings, expected_chunk_bytes(geometry, codec))
        if settings.write_behind_s > 0:
            warnings += _resting(settings, fixed, most, grid.shards, processes)
    return warnings


def _tiers(settings: Settings, fixed: int | None, most: int) -> Iterator[str]:
    tiers = {
        "device_bytes": settings.device_bytes,
        "host_bytes": settings.host_bytes,
        "disk_bytes": settings.disk_bytes,
    }
    for name, budget in tiers.items():
        if budget is None:
            continue
        if fixed is not None and budget < fixed:
            raise _too_small(name, budget, f"holds no chunk of this model ({_text(fixed)})", _room(fixed))
        if budget < _room(most):
            yield (
                f"{name}={budget} may hold not even one chunk of this model (up to {_text(most)}): such a tier is of "
                f"no use; give many times {_text(_room(most))}, or leave it out (null)"
            )


def _stores(settings: Settings, chunk: int) -> Iterator[str]:
    if settings.extent_bytes < chunk:
        yield (
            f"extent_bytes={settings.extent_bytes} is less than one chunk of this model ({_text(chunk)}): every chunk "
            f"becomes an extent of its own, and costs 3 PUTs; give many times {_text(chunk)}"
        )


def _resting(settings: Settings, fixed: int | None, most: int, shards: int, processes: int) -> Iterator[str]:
    budget = settings.write_behind_bytes
    here = -(-shards // processes)
    if fixed is not None and budget < fixed * here:
        raise _too_small(
            "write_behind_bytes", budget, f"holds no chunk of this model ({_text(fixed * here)})", fixed * here
        )
    if budget < most * here or budget * processes < settings.extent_bytes:
        least = max(most * here, -(-settings.extent_bytes // processes))
        yield (
            f"write_behind_bytes={budget} is less than an extent takes (extent_bytes={settings.extent_bytes}): prompts "
            f"between the two are never stored; give {_text(least)} or more, or lower extent_bytes"
        )


def _too_small(name: str, value: int, why: str, least: int) -> Invalid:
    mend = f"give many times {_text(least)}" + ("" if name == "write_behind_bytes" else ", or leave it out (null)")
    return Invalid(f"{name}: {value} {why}; {mend}", kind="setting", key=name)


def _room(cell: int) -> int:
    """What a tier needs for a cell, padding and its own bookkeeping included."""
    return cell + cell // 8 + _FIXED_BYTES


def _text(n_bytes: int) -> str:
    """As it can be written into a setting, rounded up."""
    return f"{-(-n_bytes // _MIB)}MiB" if n_bytes >= _MIB else f"{-(-n_bytes // 1024)}KiB"
