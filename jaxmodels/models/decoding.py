"""What a decoder's blocks need beside the residual stream: positions, masks, and the key-value cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError

KeyValues = dict[str, jax.Array]


class Context(NamedTuple):
    """Shared by all blocks of one call. Shapes: positions (B, T) or (1, T); offset and kv_length scalars."""

    positions: Any = None
    segment_ids: Any = None
    """(B, T), or those of queries (B, T) and keys (B, S)."""
    offset: jax.Array | None = None
    """Absolute position of the first token, with a cache."""
    kv_length: jax.Array | None = None
    """Keys that are valid after this call, with a cache."""

    def masks(self) -> dict[str, Any]:
        """What `attention` needs of this call, as keyword arguments."""
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
        """The context of a call on tokens (B, T); refuses more than `longest` positions."""
        T = tokens.shape[1]
        if longest is not None and longest < T:
            raise UserError(
                f"got {T} tokens, expected at most the model's context of {longest}, "
                "try a shorter --data.seq-len or a larger --model.context"
            )
        offset = None if cache is None else cache["length"]
        counted = (jnp.arange(T) + (0 if offset is None else offset))[None]
        return Context(
            counted if positions is None else positions, segment_ids, offset, None if offset is None else offset + T
        )


def empty_cache(layers: int, batch: int, length: int, heads: int, head_dim: int, dtype: str) -> dict[str, Any]:
    """A cache for `length` tokens: keys and values (L, B, S, H, K) and how many are filled."""
    shape = (layers, batch, length, heads, head_dim)
    return {"layers": {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}, "length": jnp.zeros((), jnp.int32)}


def update(
    cache: KeyValues | None, k: jax.Array, v: jax.Array, ctx: Context
) -> tuple[jax.Array, jax.Array, KeyValues | None]:
    """Keys and values to attend to: with a cache, the whole of it after writing the new ones (B, T, H, K)."""
    if cache is None:
        return k, v, None
    start: Any = ctx.offset
    at = (0, start, 0, 0)
    k = jax.lax.dynamic_update_slice(cache["k"], k.astype(cache["k"].dtype), at)
    v = jax.lax.dynamic_update_slice(cache["v"], v.astype(cache["v"].dtype), at)
    return k, v, {"k": k, "v": v}
