"""Which chunks are worth a place in the bucket: those seen before, and not too few at once.

Most chunks of a service are never used again, and each costs a write and its keep. Who waits for the second use writes
a fraction of them, and loses the reuse that the second use would have been. Pure and not thread-safe.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_s3.errors import Invalid

_PROBES = 4
_BITS_EACH = 12
"""Bits of a Bloom filter for each chunk: with four probes, one in 150 unseen chunks looks seen."""


class SecondTouch:
    """Admits chunks that were seen before. remember: chunks that are remembered at least, up to twice as many; 24 bits
    of memory for each. min_chunks: fewer new ones in a row are not worth an upload's requests."""

    def __init__(self, remember: int = 1 << 20, min_chunks: int = 1) -> None:
        if remember <= 0 or min_chunks <= 0:
            raise Invalid("remember and min_chunks must be positive", kind="setting")
        self._remember, self._min_chunks = remember, min_chunks
        self._n_bits = remember * _BITS_EACH
        self._young, self._old = bytearray(self._n_bits // 8 + 1), bytearray(self._n_bits // 8 + 1)
        self._n_young = 0

    def admit(self, hashes: Sequence[bytes]) -> int:
        """How many of the leading chunks to store; all are remembered.

        hashes: 16 bytes each, of a prompt's consecutive chunks from the first one on that is not stored.
        """
        n = 0
        leading = True
        for one in hashes:
            seen = self._note(one)
            leading = leading and seen
            n += leading
        return n if n >= self._min_chunks else 0

    def _note(self, prefix_hash: bytes) -> bool:
        bits = [int.from_bytes(prefix_hash[4 * i : 4 * i + 4], "little") % self._n_bits for i in range(_PROBES)]
        in_young = all(self._young[bit >> 3] >> (bit & 7) & 1 for bit in bits)
        if in_young:
            return True
        seen = all(self._old[bit >> 3] >> (bit & 7) & 1 for bit in bits)
        if self._n_young >= self._remember:  # forget the older generation
            self._old, self._young, self._n_young = self._young, bytearray(len(self._young)), 0
        for bit in bits:
            self._young[bit >> 3] |= 1 << (bit & 7)
        self._n_young += 1
        return seen
