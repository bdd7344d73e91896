"""Codecs by name, made on demand: importing this module imports neither torch nor numba.

Raises `Invalid` (setting) for unknown names, unknown configuration and bounds that no codec can promise.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Mapping

from lmcache_s3.codecs.base import JSON, KVCodec
from lmcache_s3.errors import Invalid

_CLASSES: dict[str, tuple[str, str]] = {
    "fast": ("lmcache_s3.codecs.fast", "FastCodec"),
    "torch": ("lmcache_s3.codecs.torch_", "TorchCodec"),
    "safetensors": ("lmcache_s3.codecs.safetensors_", "SafetensorsCodec"),
    "lossless": ("lmcache_s3.codecs.lossless", "LosslessCodec"),
    "cachegen": ("lmcache_s3.codecs.cachegen", "CachegenCodec"),
    "transform": ("lmcache_s3.codecs.transform", "TransformCodec"),
}
CODEC_IDS: tuple[str, ...] = tuple(_CLASSES)
"""Every codec there is."""


def _nearest(word: str, known: list[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def make_codec(id: str, config: Mapping[str, JSON] | None = None) -> KVCodec:
    """The codec of this name and configuration; `config=None`: its defaults.

    A codec made with defaults decodes every cell of its id, whatever the configuration it was encoded with. Raises
    `Invalid`.
    """
    if id not in _CLASSES:
        raise Invalid(
            f"no codec is called {id!r}{_nearest(id, list(_CLASSES))}; there are {', '.join(CODEC_IDS)}",
            kind="setting",
            key="codec",
        )
    module, name = _CLASSES[id]
    try:
        codec_class: type[KVCodec] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise Invalid(
            f"codec {id!r} needs the package {error.name!r}: pip install 'lmcache-s3[{id}]'",
            kind="setting",
            key="codec",
        ) from error
    config = dict(config or {})
    known = sorted(codec_class().config)
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise Invalid(
            f"codec {id!r} has no setting {unknown[0]!r}{_nearest(unknown[0], known)}; "
            f"it has {', '.join(known) if known else 'none'}",
            kind="setting",
            key="codec",
        )
    return codec_class(**config)


def fidelity_class(codec: KVCodec, max_kl: float | None) -> str:
    """The fidelity class of a space that this codec writes: `exact`, `kl<bound>`, or `unmeasured-<codec>-<level>`.

    max_kl: worst admitted next-token KL, nats per token; None where the operator states no bound. A stated bound needs
    a codec with a measured error within it. Raises `Invalid`.
    """
    if max_kl is not None and not (math.isfinite(max_kl) and max_kl > 0):
        raise Invalid(f"max_kl={max_kl}: a bound in nats per token is a number above 0", kind="setting", key="max_kl")
    if codec.exact:
        return "exact"
    measured = codec.measured_kl
    if max_kl is None:
        return f"unmeasured-{codec.id}-{codec.level}" if measured is None else f"kl{measured!r}"
    if measured is None or measured > max_kl:
        have = "nobody has measured it" if measured is None else f"it measures {measured!r}"
        raise Invalid(
            f"max_kl={max_kl}: codec {codec.id!r} at level {codec.level!r} cannot promise that, {have}; "
            "choose another codec or level, or leave max_kl out",
            kind="setting",
            key="max_kl",
        )
    return f"kl{float(max_kl)!r}"
