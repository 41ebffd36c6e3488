"""Dropout with 16 random bits for each element, half as many as a random number would need."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Set a fraction `rate` of the elements of x to 0 and scale the rest to keep the mean (Srivastava et al. 2014)."""
    *outer, last = x.shape
    words = jax.random.bits(key, (*outer, -(-last // 2)), jnp.uint32)
    # 16 bits make the fraction exact to 1/65,536; making random bits is most of the cost of dropout
    halves = jnp.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(*outer, -1)[..., :last]
    return jnp.where(halves >= round(rate * 65536), x / (1 - rate), 0).astype(x.dtype)
