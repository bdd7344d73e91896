"""What others do with a KV cache, by their published formulas, to be measured in the same run as ours.

`LMCacheCacheGen`: LMCache 0.5's codec `cachegen` with its default bins. Quantisation: K and V per layer and token by
the largest magnitude m over all heads and channels, C = ⌊bins / 2⌋ − 1, symbol = round(x · C / m) + C; bins are 32 in
the first 10 layers of K and the first 2 of V, 16 behind (32 throughout in models of fewer than 10 layers). Stored for a
chunk: for each (K or V, layer, channel) an arithmetic-coded stream by the stream's own histogram, the histogram as 33
numbers of 16 bits, and a length of 32 bits; a maximum of 16 bits for each (K or V, layer, token). Its streams are
counted, not made: their entropy and 2 bits to end each, in whole bytes. That favours it a little.
`Fp8`: e4m3, one scale a layer and K or V, nothing else counted.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.dtypes import from_float32, to_float32

_K_FINE_LAYERS, _V_FINE_LAYERS, _SMALL_MODEL_LAYERS = 10, 2, 10
_FINE_BINS, _COARSE_BINS = 32, 16
_HISTOGRAM_BITS = 33 * 16
_LENGTH_BITS = 32
_MAXIMUM_BITS = 16
_END_BITS = 2


class LMCacheCacheGen:
    """scale: multiplies the numbers of bins; 1 is the default. Layers are counted within the cell."""

    def __init__(self, scale: float = 1.0) -> None:
        self._scale = scale

    @property
    def name(self) -> str:
        return "lmcache-cachegen" if self._scale == 1 else f"lmcache-cachegen-x{self._scale:g}"

    def _bins(self, plane: int, layer: int, layers: int) -> int:
        fine_layers = (_K_FINE_LAYERS, _V_FINE_LAYERS)[plane]
        fine = layers < _SMALL_MODEL_LAYERS or layer < fine_layers
        return round((_FINE_BINS if fine else _COARSE_BINS) * self._scale)

    def code(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> tuple[int, np.ndarray]:
        kv, layers, tokens, heads, channels = spec.shape
        decoded = np.empty_like(cell, order="C")
        bits: int = 0
        for plane in range(kv):
            for layer in range(layers):
                limit = self._bins(plane, layer, layers) // 2 - 1
                values = to_float32(cell[plane, layer], spec.kv_dtype).reshape(tokens, heads * channels)
                most = np.maximum(np.abs(values).max(-1, keepdims=True), np.float32(1e-20))
                symbols = np.rint(values * (limit / most)).astype(np.int32)
                restored = (symbols / np.float32(limit) * most).astype(np.float32)
                decoded[plane, layer] = from_float32(restored.reshape(tokens, heads, channels), spec.kv_dtype)
                bits += tokens * _MAXIMUM_BITS + _stream_bits(symbols + limit, 2 * limit + 1)
        return bits // 8, decoded


def _stream_bits(symbols: np.ndarray, alphabet: int) -> int:
    """symbols: `[token, channel]`, below `alphabet`; all of a layer's streams with their side information."""
    tokens, streams = symbols.shape
    counts = np.zeros((streams, alphabet), np.int64)
    np.add.at(counts, (np.arange(streams)[None, :], symbols), 1)
    share = counts / tokens
    information = -(counts * np.log2(np.where(counts, share, 1))).sum(-1)
    stream_bits: np.ndarray = 8 * np.ceil((information + _END_BITS) / 8)
    return int(stream_bits.sum()) + int(streams) * (_HISTOGRAM_BITS + _LENGTH_BITS)


class Fp8:
    @property
    def name(self) -> str:
        return "fp8-e4m3"

    def code(self, cell: np.ndarray, spec: CellSpec, position: CellPosition) -> tuple[int, np.ndarray]:
        decoded = np.empty_like(cell, order="C")
        for plane in range(spec.shape[0]):
            for layer in range(spec.shape[1]):
                values = to_float32(cell[plane, layer], spec.kv_dtype)
                scale = np.float32(448) / max(np.abs(values).max(), np.float32(1e-20))
                small = (values * scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
                decoded[plane, layer] = from_float32(small / scale, spec.kv_dtype)
        return int(np.prod(spec.shape)), decoded
