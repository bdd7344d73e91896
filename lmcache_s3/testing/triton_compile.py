"""Compiles the Triton kernels for GPUs that are not here, and reads what came out: Triton brings its own assembler.

The interpreter shows that kernels compute the right bits as they are written; this, that compilers take them, and that
no multiplication and addition were fused, which would change bits. Must run where Triton does not interpret. Raises
`AssertionError`.
"""

from __future__ import annotations

import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmcache_s3.kernels import (
    triton_cachegen,
    triton_encode,
    triton_rans,
    triton_transform,
    triton_transform_encode,
)
from lmcache_s3.kernels.device_cachegen import FORMATS, TILE_VALUES

_POINTERS = {
    "states": "*u32", "words": "*u16", "word_ends": "*i64", "escapes": "*u8", "escape_ends": "*i64", "chosen": "*u8",
    "exact": "*u8", "slots": "*u32", "values": "*u16", "codes": "*i8", "means": "*i8", "mean_codes": "*i8", "q": "*i8",
    "status": "*i32", "bases": "*i32", "addresses": "*i64", "places": "*i64", "source": "*u16", "target": "*u16",
    "y": "*fp32", "wanted": "*fp64", "steps": "*fp64", "failed": "*i32", "costs": "*u32", "symbols": "*u8",
    "frequencies": "*u32", "starts": "*u32", "n_words": "*i32", "n_escapes": "*i32", "ends": "*i64", "packed": "*u16",
    "run_starts": "*i32", "run_tables": "*u8", "run_rows": "*i32", "run_units": "*i32", "counts": "*i32",
    "matrices": "*fp16", "cosine": "*fp32", "sine": "*fp32", "coded": "*i32", "of_unit": "*i32", "of_matrix": "*i64",
    "of_stride": "*i32", "of_live": "*i32", "of_q": "*i32", "of_row": "*i32", "of_head": "*i32", "of_turned": "*i32",
    "of_cell": "*i32", "of_token": "*i32", "channel_strides": "*i64", "source_ends": "*i64", "rooms": "*i64",
    "x": "*fp32", "of_start": "*i64", "of_width": "*i64", "of_within": "*i64",
}  # fmt: skip
"""Argument → type; the others are i32 (as most are: those above 2³¹ are compiled for i64)."""
_SHAPE = {"heads": 8, "channels": 128}
_BLOCKS = {"BLOCK": 128, "LEVELS": 7, "TILE": TILE_VALUES // 128}


def check_compiles(capability: int, kv_dtype: str = "bfloat16") -> None:
    """Every kernel for NVIDIA GPUs of a compute capability (80: A100, 90: H100), cells of 8 heads of 128 channels."""
    form = FORMATS[kv_dtype]
    narrow = {"BITS": form.bits, "MANTISSA": form.mantissa, "BIAS": form.bias}
    text = _ptx(triton_rans.decode_rows, {}, capability, warps=1)
    assert "redux.sync" in text, "lanes vote by shuffles: slow"
    for plane in (False, True):
        in_plane = {"PER_TOKEN": plane, "channel_stride": 1}
        _ptx(
            triton_cachegen.dequantise,
            {**_SHAPE, **_BLOCKS, **narrow, "LARGEST": form.largest, **in_plane},
            capability,
        )
        _ptx(triton_encode.quantise, {**_SHAPE, "TILE": TILE_VALUES, "PER_TOKEN": plane}, capability)
    _ptx(triton_cachegen.place_tokens, {"TILE": TILE_VALUES}, capability)
    _ptx(triton_encode.take_tokens, {"TILE": TILE_VALUES}, capability)
    _ptx(triton_encode.transform, {**_SHAPE, **_BLOCKS, **narrow, "INFINITE": form.infinite}, capability)
    means = {"means": "*fp64"}
    _ptx(triton_encode.channel_steps, {"width": 1024, "TILE": 128}, capability, types=means)
    _ptx(triton_encode.token_steps, {**_SHAPE, "TILE": 128}, capability, types=means)
    _ptx(triton_encode.code_steps, {"TILE": 1024}, capability, types=means)
    _ptx(triton_encode.choose_tables, {"TILE": 1024, "TOGETHER": 16}, capability)
    _ptx(triton_encode.encode_rows, {}, capability, warps=1)
    _ptx(triton_transform.decode_streams, {}, capability, warps=1)
    product = {"PARTS": 1, "HALF": 64, "TOKENS": 64, "DEPTH": 64, "channels": 128, **narrow, "LARGEST": form.largest}
    factors = {"mean": "*fp32", "scale": "*fp32"}
    text = _ptx(triton_transform.write_values, product, capability, warps=8, types=factors)
    assert "mma" in text, "the product does not use tensor cores"
    _ptx(triton_transform.place_vectors, {"TILE": TILE_VALUES}, capability)
    halves = {"PARTS": 1, "HALF": 64, "TOKENS": 64, "channels": 128, **narrow, "INFINITE": form.infinite}
    _ptx(triton_transform_encode.centre, halves, capability, types={"mean": "*fp32"})
    _ptx(triton_transform_encode.encode_streams, {}, capability, warps=1)
    _ptx(triton_transform_encode.take_vectors, {"TILE": TILE_VALUES}, capability)
    _ptx(triton_encode.pack, {"TILE": 1024}, capability)


def _ptx(
    kernel: triton.JITFunction,
    constants: dict[str, int],
    capability: int,
    *,
    warps: int = 4,
    types: dict[str, str] | None = None,
) -> str:
    known = {**_POINTERS, **(types or {})}
    signature = {name: "constexpr" if name in constants else known.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name in ("q_stride", "side_stride") and name not in constants)
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, values, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
    text = str(compiled.asm["ptx"])
    lines = [line for line in text.splitlines() if re.search(r"\bfma\.|\.ftz|\.approx|\.full\.", line)]
    assert not lines, f"{kernel.__name__}: {lines[:3]} would change bits"
    return text
