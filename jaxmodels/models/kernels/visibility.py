"""Which keys each query may see."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


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
    """Zeros where a query sees no key, for kernels that give an average there."""
    T = out.shape[1]
    itself = (segments is None or segments[0] is segments[1]) and isinstance(q_offset, int) and q_offset == 0
    if itself and kv_length is None and T <= S:
        return out
    mask = full_mask(T, S, q_offset, causal=causal, window=window, segments=segments, kv_length=kv_length)
    return out if mask is None else jnp.where(mask.any(-1)[:, :, None, None], out, 0)
