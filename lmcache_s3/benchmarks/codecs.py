"""`lmcache-s3 bench codecs`: what codecs save and cost, on SmolLM2's KV of our own documents; and mutated cells.

Speeds are of one core, in bfloat16 bytes a second of its time (what others take of a busy machine does not count), the
best of several runs over all cells. `lossless` stands beside zstd with byte shuffle, blosc2 and pcodec, each at the
settings that serve it best, in the same run on the same cells.
`transform` is measured with a calibration made for that (`transform_speed.py`).
The read path of `fast` (XXH3-64 of the stored cell, then the copy to its place) is held against the copy alone.
Then every decoder is given mutated cells, in processes of their own.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lmcache_s3.benchmarks.figures import Figure, report
from lmcache_s3.benchmarks.shannon import shannon_gap
from lmcache_s3.benchmarks.steps import Steps
from lmcache_s3.benchmarks.transform_speed import layerwise_codec, rotary_turns
from lmcache_s3.codecs.base import CellPosition, CellSpec, KVCodec
from lmcache_s3.codecs.checksum import xxh3
from lmcache_s3.codecs.registry import CODEC_IDS, make_codec
from lmcache_s3.testing.fuzz import count_untyped
from lmcache_s3.testing.real_kv import PROMPT_TOKENS, smollm2_kv

CHUNK_TOKENS = 256
MUTATIONS = 1_000_000
_ROUNDS = 3
_TRANSFORM_BITS = 1.2
"""A value: near what a layer at a time takes at a KL of .0125."""
_ROPE_THETA = 100_000.0
"""SmolLM2's."""
_SHARE = 2000
"""Mutations a task of the fuzzing processes takes."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A way to code cells: how many times smaller, and bfloat16 megabytes (10⁶) a second."""

    name: str
    ratio: float
    encode_mbps: float
    decode_mbps: float


def main(json_path: Path | None = None, *, mutations: int = MUTATIONS, prompts: int = 4) -> bool:
    """Run it, print the tables, write the JSON; whether every goal was met."""
    steps = Steps()
    with steps("computing SmolLM2's KV of our documents"):
        kv = smollm2_kv(prompts)
    cells = [np.ascontiguousarray(kv[:, :, t : t + CHUNK_TOKENS]) for t in range(0, kv.shape[2], CHUNK_TOKENS)]
    with steps("coding it, here and by the peers"):
        ours = _ours(make_codec("lossless"), cells)
        peers = _peers(cells)
        cachegen = _ours(make_codec("cachegen"), cells)
        gap = _shannon_gap(cells)
        transform = _layerwise(kv, cells)
    _print(steps, [ours, *peers, cachegen, transform])
    figures = _lossless(ours, peers) + _cachegen(cachegen, gap) + _transform(transform)
    figures.append(Figure("codec.fast_vs_memcpy", _fast_vs_memcpy(cells), "× speed of the copy", 0.6, "higher"))
    with steps(f"decoding {mutations:,} mutated cells"):
        figures.append(Figure("codec.fuzz_untyped", _fuzz(mutations), f"of {mutations:,}", 0, "lower"))
    return report(figures, json_path)


def _lossless(ours: Measured, peers: Sequence[Measured]) -> list[Figure]:
    best = max(peer.ratio for peer in peers)
    return [
        Figure("codec.lossless_ratio", ours.ratio, "×", 1.52, "higher"),
        Figure("codec.lossless_vs_best", ours.ratio / best, "× best peer's ratio", 1.03, "higher"),
        Figure("codec.lossless_encode_mbps", ours.encode_mbps, "MB/s a core", None, "higher"),
        Figure("codec.lossless_decode_mbps", ours.decode_mbps, "MB/s a core", None, "higher"),
        Figure(
            "codec.lossless_encode_vs_fastest",
            ours.encode_mbps / max(peer.encode_mbps for peer in peers),
            "× fastest peer",
            1,
            "higher",
        ),
        Figure(
            "codec.lossless_decode_vs_fastest",
            ours.decode_mbps / max(peer.decode_mbps for peer in peers),
            "× fastest peer",
            1,
            "higher",
        ),
        *(
            Figure(f"codec.{peer.name}_{what}", value, unit, None, "higher")
            for peer in peers
            for what, value, unit in (
                ("ratio", peer.ratio, "×"),
                ("encode_mbps", peer.encode_mbps, "MB/s a core"),
                ("decode_mbps", peer.decode_mbps, "MB/s a core"),
            )
        ),
    ]


def _cachegen(measured: Measured, gap: float) -> list[Figure]:
    return [
        Figure("codec.cachegen_ratio", measured.ratio, "×, default level", None, "higher"),
        Figure("codec.cachegen_encode_mbps", measured.encode_mbps, "MB/s a core", 400, "higher"),
        Figure("codec.cachegen_decode_mbps", measured.decode_mbps, "MB/s a core", 800, "higher"),
        Figure("codec.shannon_gap", gap, "× cross-entropy of the chosen tables", 1.02, "lower"),
    ]


def _transform(measured: Measured) -> list[Figure]:
    at = f"MB/s a core, a layer a unit, {16 / measured.ratio:.2f} bits a value"
    return [
        Figure("codec.transform_encode_mbps", measured.encode_mbps, at, None, "higher"),
        Figure("codec.transform_decode_mbps", measured.decode_mbps, at, 250, "higher"),
    ]


# ---- coding ----------------------------------------------------------------------------------------------------------


def _ours(codec: KVCodec, cells: Sequence[np.ndarray]) -> Measured:
    spec, out = CellSpec(cells[0].shape, "bfloat16"), np.empty_like(cells[0])
    place = CellPosition(bytes(16), CHUNK_TOKENS, 0, 0)

    def decode(data: bytes) -> np.ndarray:
        codec.decode(data, spec, place, out)
        return out

    return _measure(codec.id, cells, lambda cell: codec.encode(cell, spec, place), decode, exact=codec.exact)


def _layerwise(kv: np.ndarray, cells: Sequence[np.ndarray]) -> Measured:
    prompts = [kv[:, :, t : t + PROMPT_TOKENS] for t in range(0, kv.shape[2], PROMPT_TOKENS)]
    codec = layerwise_codec(prompts, rotary_turns(_ROPE_THETA, kv.shape[4]), _TRANSFORM_BITS)
    spec, out = CellSpec(cells[0].shape, "bfloat16"), np.empty_like(cells[0])
    # Keys are turned back by their position, so each cell is coded at its own.
    first_token = {id(cell): i * CHUNK_TOKENS % PROMPT_TOKENS for i, cell in enumerate(cells)}

    def encode(cell: np.ndarray) -> bytes:
        return codec.encode(cell, spec, CellPosition(bytes(16), first_token[id(cell)], 0, 0))

    def decode(data: bytes) -> np.ndarray:
        codec.decode(data, spec, None, out)
        return out

    return _measure(codec.id, cells, encode, decode, exact=False)


def _shannon_gap(cells: Sequence[np.ndarray]) -> float:
    codec, spec = make_codec("cachegen"), CellSpec(cells[0].shape, "bfloat16")
    place = CellPosition(bytes(16), CHUNK_TOKENS, 0, 0)
    return shannon_gap([codec.encode(cell, spec, place) for cell in cells], spec)


def _peers(cells: Sequence[np.ndarray]) -> list[Measured]:
    import blosc2
    import numcodecs
    from pcodec import ChunkConfig, standalone

    shuffle, zstd, pco = numcodecs.Shuffle(2), numcodecs.Zstd(1), ChunkConfig(compression_level=8)
    # Higher levels look for repeats that are not there, and come out larger; so does blosc2's bit shuffle.
    blosc: dict[str, Any] = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    return [
        _measure(
            "zstd_shuffle",
            cells,
            lambda cell: bytes(zstd.encode(shuffle.encode(cell))),
            lambda data: np.frombuffer(shuffle.decode(zstd.decode(data)), np.uint16),
        ),
        _measure(
            "blosc2",
            cells,
            lambda cell: blosc2.compress2(cell, typesize=2, **blosc),
            lambda data: np.frombuffer(blosc2.decompress2(data, nthreads=1), np.uint16),
        ),
        # As half floats: its order of numbers with a sign fits bfloat16 too, and beats unsigned integers.
        _measure(
            "pcodec",
            cells,
            lambda cell: standalone.simple_compress(cell.view(np.float16).reshape(-1), pco),
            lambda data: np.asarray(standalone.simple_decompress(data)).view(np.uint16),
        ),
    ]


def _measure(
    name: str,
    cells: Sequence[np.ndarray],
    encode: Callable[[np.ndarray], bytes],
    decode: Callable[[bytes], np.ndarray],
    *,
    exact: bool = True,
) -> Measured:
    stored = [encode(cell) for cell in cells]  # what is compiled or set up once is so now
    for cell, data in zip(cells, stored, strict=True):
        if decode(data).reshape(-1).tobytes() != cell.tobytes() and exact:
            raise AssertionError(f"{name} is not exact")
    raw = sum(cell.nbytes for cell in cells)
    encode_s = min(_time_s(encode, cells) for _ in range(_ROUNDS))
    decode_s = min(_time_s(decode, stored) for _ in range(_ROUNDS))
    return Measured(name, raw / sum(map(len, stored)), raw / encode_s / 1e6, raw / decode_s / 1e6)


def _time_s(action: Callable[[Any], object], things: Sequence[Any]) -> float:
    """Seconds of processor time, of all threads."""
    start = time.process_time()
    for thing in things:
        action(thing)
    return time.process_time() - start


def _fast_vs_memcpy(cells: Sequence[np.ndarray]) -> float:
    """Speed of the read path of `fast`, from stored bytes to their place, over that of the copy alone."""
    codec, spec, place = make_codec("fast"), CellSpec(cells[0].shape, "bfloat16"), CellPosition(bytes(16), 0, 0, 0)
    stored = [codec.encode(cell, spec, place) for cell in cells]
    sums, targets = [xxh3(data) for data in stored], [np.zeros_like(cell) for cell in cells]

    def copy(i: int) -> None:
        np.copyto(targets[i], cells[i])

    def read(i: int) -> None:
        if xxh3(stored[i]) != sums[i]:
            raise AssertionError("a checksum changed")
        codec.decode(stored[i], spec, place, targets[i])

    copied, was_read = math.inf, math.inf
    for _ in range(15):
        copied = min(copied, _time_s(copy, range(len(cells))))
        was_read = min(was_read, _time_s(read, range(len(cells))))
    return copied / was_read


def _print(steps: Steps, measured: Sequence[Measured]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("codec")
    for name in ("ratio", "encode MB/s", "decode MB/s"):
        table.add_column(name, justify="right")
    for m in measured:
        table.add_row(m.name, f"{m.ratio:.3f}", f"{m.encode_mbps:.0f}", f"{m.decode_mbps:.0f}")
    steps.console.print(table)


# ---- mutated cells ---------------------------------------------------------------------------------------------------


def _fuzz(mutations: int) -> int:
    """How many of so many mutated cells, shared evenly among codecs, raised something that is not ours.

    A decoder that crashes breaks its process, and with it the benchmark.
    """
    each = -(-mutations // len(CODEC_IDS))
    tasks = [(id, min(_SHARE, each - at), at) for id in CODEC_IDS for at in range(0, each, _SHARE)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        return sum(pool.map(_task, tasks, repeat(1), chunksize=4))


def _task(task: tuple[str, int, int], seed: int) -> int:
    codec_id, rounds, at = task
    return count_untyped(codec_id, rounds, seed + at)
