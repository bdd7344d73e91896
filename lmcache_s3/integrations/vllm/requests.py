"""Which requests can be cached, and what besides the tokens their KV depends on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from lmcache_s3.identity import ExtraKey

if TYPE_CHECKING:
    from vllm.v1.request import Request

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


def uncacheable(request: Request) -> str | None:
    """Why this request is never matched or stored, or None."""
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "prompt embeddings"
    if request.pooling_params is not None:
        return "pooling"
    if request.resumable:
        return "streaming session"  # media may be added while it runs: its hashes would not cover them
    return None


def extra_keys(request: Request, adapter_digest: Callable[[int, str], str | None]) -> tuple[ExtraKey, ...] | None:
    """What the prefix hashes must cover beyond the tokens: the LoRA adapter and media, by content.

    None while an adapter's digest is not known yet, or where media carry a name given by the user instead of a digest
    of their content (two engines could give one name to two pictures).
    """
    keys: list[ExtraKey] = []
    if request.lora_request is not None:
        if request.lora_request.load_inplace:
            return None  # other weights under the same number: the files do not tell which ones the engine has
        digest = adapter_digest(request.lora_request.lora_int_id, request.lora_request.lora_path)
        if digest is None:
            return None
        keys.append(ExtraKey("lora", digest, 0))
    for feature in request.mm_features:
        if not _DIGEST.fullmatch(feature.identifier):
            return None
        keys.append(ExtraKey(feature.modality, feature.identifier, feature.mm_position.offset))
    return tuple(keys)
