"""Which keys each query may see."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Mask(NamedTuple):
    """Which keys the queries of a call may see, as far as its shapes and options say."""

    queries: int
    keys: int
    causal: bool
    window: int | None

    @property
    def scope(self) -> str:
        """The scope under which a call is traced, by which a compiled program says what its kernels compute."""
        options = ["causal"] * self.causal + ([] if self.window is None else [f"window={self.window}"])
        return f"attend[{','.join([f'{self.queries}x{self.keys}', *options])}]"

    @classmethod
    def of(cls, name: str) -> Mask | None:
        """The mask in the name of an instruction; None if it belongs to no call."""
        found = re.search(r"attend\[(\d+)x(\d+)(,causal)?(?:,window=(\d+))?\]", name)
        if found is None:
            return None
        queries, keys, causal, window = found.groups()
        return cls(int(queries), int(keys), causal is not None, None if window is None else int(window))

    def pairs(self, block: tuple[int, int] = (1, 1)) -> int:
        """The number of pairs of a query and a key that it sees, counted in whole blocks of (queries, keys)."""
        first = np.arange(0, self.queries, block[0])
        last = np.minimum(first + block[0], self.queries) - 1
        ahead = 0 if self.causal else self.keys if self.window is None else self.window - 1
        end = np.minimum(last + ahead + 1, self.keys)
        begin = np.zeros_like(first) if self.window is None else np.maximum(first - self.window + 1, 0)
        blocks = np.maximum(-(-end // block[1]) - begin // block[1], 0)
        return int(np.minimum(blocks * block[1], self.keys).sum()) * block[0]

    @property
    def share(self) -> float:
        """The share of all pairs that are seen."""
        return self.pairs() / (self.queries * self.keys)

    @property
    def band(self) -> float:
        """The share of all pairs that a window reaches if it is counted in full, whether the call is causal or not."""
        if self.window is None or not self.causal:
            return 1.0 if self.window is None else self.share
        return min(self.window, self.keys) / self.keys


def visible(
    t: Array,
    s: Array,
    *,
    causal: bool,
    window: int | None,
    segments: tuple[Array, Array] | None,
    kv_length: Array | None,
) -> Array | None:
    """Which keys a query may see, or None for all.

    Shapes: t absolute query positions (B or 1, T), s key positions (S,), segments (B, T) and (B, S), kv_length
    (B or 1,); returns bool (B or 1, T, S).
    """
    t, s = t[:, :, None], s[None, None, :]
    mask = None

    def also(condition: Array) -> Array:
        return condition if mask is None else mask & condition

    if causal:
        mask = also(s <= t)
    if window is not None:
        mask = also(t - s < window)
        if not causal:
            mask = also(s - t < window)
    if segments is not None:
        mask = also(segments[0][:, :, None] == segments[1][:, None, :])
    if kv_length is not None:
        mask = also(s < kv_length[:, None, None])
    return mask


def positions(q_offset: int | Array, T: int) -> Array:
    """Absolute positions of T queries, (B or 1, T)."""
    return jnp.atleast_1d(jnp.asarray(q_offset, jnp.int32))[:, None] + jnp.arange(T)


def full_mask(T: int, S: int, q_offset: int | Array, **conditions) -> Array | None:
    """`visible` for whole arrays: bool (B or 1, T, S), or None for all."""
    return visible(positions(q_offset, T), jnp.arange(S), **conditions)


def zero_blind(out: Array, S: int, q_offset: int | Array, *, causal, window, segments, kv_length) -> Array:
    """Set the output to zero where a query sees no key, for kernels that give an average there."""
    T = out.shape[1]
    itself = (segments is None or segments[0] is segments[1]) and isinstance(q_offset, int) and q_offset == 0
    if itself and kv_length is None and T <= S:
        return out
    mask = full_mask(T, S, q_offset, causal=causal, window=window, segments=segments, kv_length=kv_length)
    return out if mask is None else jnp.where(mask.any(-1)[:, :, None, None], out, 0)
