"""The order of the examples, as a function of (seed, step)."""

from __future__ import annotations

import math

import numpy as np

from jaxmodels.errors import UserError

# With 12 rounds, all orders of even 5 or 6 examples are equally frequent (chi-squared); with 6 they are not.
_ROUNDS = 12
_AT_ONCE = 4096


class Order:
    """Which examples make up global batch k: places `k*B ... (k+1)*B - 1` in the endless sequence of epochs.

    Each epoch is its own permutation of all n examples, and a batch may span two epochs. Nothing here depends on hosts
    or devices, so the order is the same on any number of them, and the step is all that resuming needs.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1:
            raise UserError(
                f"got a source of {n} examples, expected at least 1, try more data or a smaller data.seq_len"
            )
        if batch_size < 1:
            raise UserError(f"got a batch size of {batch_size}, expected at least 1, try --data.batch-size 16")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._memo = (-1, np.empty(0), np.empty(0))

    def epochs(self, step: int) -> np.ndarray:
        """Return the epoch of each example of batch `step`, int64 (B,)."""
        return self._batch(step)[0]

    def indices(self, step: int) -> np.ndarray:
        """Return the examples of batch `step`, int64 (B,)."""
        return self._batch(step)[1]

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        # Several steps are computed together, because a NumPy call costs as much as a thousand numbers. A single
        # assignment keeps the memo consistent whichever thread asks.
        together = max(1, _AT_ONCE // self.batch_size)
        block, row = divmod(step, together)
        memo = self._memo
        if memo[0] != block:
            size = together * self.batch_size
            epoch, place = np.divmod(block * size + np.arange(size, dtype=np.int64), self.n)
            index = permute(place, self.n, self.seed, epoch)
            memo = self._memo = (block, epoch.reshape(together, -1), index.reshape(together, -1))
        return memo[1][row], memo[2][row]


def permute(places: np.ndarray, n: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Map each place by the permutation of `range(n)` that (seed, epoch) selects, in memory O(len(places)).

    A Feistel network over Z_a x Z_b, with ab barely above n, and cycle walking for values past n.

    Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, sections 4 and 5.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    key = mix(np.uint64(seed % 2**64) + mix(epochs.astype(np.uint64)))
    out = _feistel(places.astype(np.uint64), a, b, key)
    while (outside := np.flatnonzero(out >= n)).size:
        out[outside] = _feistel(out[outside], a, b, key[outside])
    return out.astype(np.int64)


def _feistel(x: np.ndarray, a: int, b: int, key: np.ndarray) -> np.ndarray:
    left, right = np.divmod(x, np.uint64(b))
    for i in range(_ROUNDS):
        round_key = key + np.uint64(i * 0x632BE59BD9B4E019 % 2**64)
        if i % 2 == 0:
            left = (left + mix(right ^ round_key) % np.uint64(a)) % np.uint64(a)
        else:
            right = (right + mix(left ^ round_key) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 arrays that spreads every bit over all.

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood 2014).
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
