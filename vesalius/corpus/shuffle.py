"""A permutation that needs no table: any place can be asked for, forwards and backwards, at the same cost.

A balanced Feistel network over the smallest even power of two that holds n, walked until it lands below n. Keys are
sha256 of (seed, epoch, stream), the round function is the finaliser of splitmix64: nothing depends on the version of a
library, so an order can be rebuilt from its description for as long as this file stands.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8


class Permutation:
    """A permutation of 0..n-1 by (seed, epoch, stream).

    Example:
        >>> shuffled = Permutation(10, seed=1)
        >>> sorted(shuffled(range(10)).tolist()) == list(range(10))
        True
        >>> shuffled.inverse(shuffled(range(10))).tolist() == list(range(10))
        True
    """

    def __init__(self, n: int, seed: int, epoch: int = 0, stream: str = "") -> None:
        self.n = n
        self._half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        text = f"vesalius order {seed} {epoch} {stream}".encode()
        digest = b"".join(hashlib.sha256(text + bytes([i])).digest() for i in range(ROUNDS // 4))
        self._keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, places: ArrayLike) -> NDArray[np.int64]:
        """Which of 0..n-1 stands at each place."""
        return self._walk(places, forwards=True)

    def inverse(self, values: ArrayLike) -> NDArray[np.int64]:
        """At which place each of 0..n-1 stands."""
        return self._walk(values, forwards=False)

    def _walk(self, numbers: ArrayLike, forwards: bool) -> NDArray[np.int64]:
        x = np.array(numbers, dtype=np.uint64, ndmin=1)
        if self.n <= 1:
            return x.astype(np.int64)
        x = self._rounds(x, forwards)
        outside = np.flatnonzero(x >= self.n)
        while len(outside):
            x[outside] = self._rounds(x[outside], forwards)
            outside = outside[x[outside] >= self.n]
        return x.astype(np.int64)

    def _rounds(self, x: NDArray[np.uint64], forwards: bool) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        if forwards:
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & self._mask)
        else:
            for key in self._keys[::-1]:
                left, right = right ^ (_mix(left ^ key) & self._mask), left
        return (left << self._half) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
