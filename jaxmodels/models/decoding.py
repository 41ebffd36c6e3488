"""What a decoder's blocks need beside the residual stream: positions, masks, and the key-value cache.

Dims: B rows, T new tokens, S places of the cache, L layers, H heads of keys and values, K head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError

KeyValues = dict[str, jax.Array]


class Context(NamedTuple):
    """What all blocks of one call share. Shapes: positions (B, T) or (1, T); offset and kv_length (B,)."""

    positions: Any = None
    segment_ids: Any = None
    """(B, T), or a pair of those of queries (B, T) and keys (B, S)."""
    offset: jax.Array | None = None
    """With a cache, the absolute position of each row's first token."""
    kv_length: jax.Array | None = None
    """With a cache, how many keys of each row are valid after this call."""

    def masks(self) -> dict[str, Any]:
        """The keyword arguments of `attention` that follow from this call."""
        cached = {} if self.offset is None else {"q_offset": self.offset, "kv_length": self.kv_length}
        return {"segment_ids": self.segment_ids, **cached}

    @staticmethod
    def of(
        tokens: jax.Array,
        cache: dict[str, Any] | None,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        longest: int | None = None,
    ) -> Context:
        """The context of a call on tokens (B, T).

        Raises:
            UserError: there are more tokens than the `longest` that the model takes.
        """
        T = tokens.shape[1]
        if longest is not None and longest < T:
            raise UserError(
                f"got {T} tokens, expected at most the model's context of {longest}, "
                "try a shorter --data.seq-len or a larger --model.context"
            )
        offset = None if cache is None else cache["length"]
        if positions is None:
            positions = jnp.arange(T)[None] + (0 if offset is None else offset[:, None])
        return Context(positions, segment_ids, offset, None if offset is None else offset + T)


def empty_cache(layers: int, batch: int, length: int, heads: int, head_dim: int, dtype: str) -> dict[str, Any]:
    """An empty cache with room for `length` tokens: keys and values (L, B, S, H, K), and each row's length (B,).

    Rows fill up each at its own pace: the next call writes a row's tokens behind the `length` that it has. To take back
    what a row has too much (the padding of a prompt), set its length lower: what lies beyond is never attended to, and
    is overwritten.
    """
    shape = (layers, batch, length, heads, head_dim)
    empty = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
    return {"layers": empty, "length": jnp.zeros((batch,), jnp.int32)}


def update(
    cache: KeyValues | None, k: jax.Array, v: jax.Array, ctx: Context
) -> tuple[jax.Array, jax.Array, KeyValues | None]:
    """Keys and values to attend to: with a cache, the whole of it after the new ones (B, T, H, K) are written."""
    if cache is None:
        return k, v, None

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        row = lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (at, 0, 0))  # noqa: E731
        return jax.vmap(row)(old, new.astype(old.dtype), ctx.offset)

    written = {"k": write(cache["k"], k), "v": write(cache["v"], v)}
    return written["k"], written["v"], written
