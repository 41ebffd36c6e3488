"""Where tokens are, as numbers that a model adds to embeddings or looks up."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """Positions (…) as (…, D) float32: alternating sin and cos, of wavelengths from 2π to 10000·2π (section 3.5)."""
    freq = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[..., None].astype(jnp.float32) * freq
    waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return waves.reshape(*positions.shape, -1)[..., :width]


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions (B, T) that start at 0 in each run of equal segment ids."""
    index = jnp.arange(segment_ids.shape[1])[None]
    fresh = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return index - jax.lax.cummax(jnp.where(fresh, index, 0), axis=1)


def bucket(buckets: int, distance: int, both: bool) -> np.ndarray:
    """The bucket of each key position less query position from -distance to distance, (2·distance + 1,).

    Half of the buckets hold one distance each, the others a range that grows as the logarithm. `both`: keys after the
    query have buckets of their own; otherwise they are those of distance 0.
    """
    ahead = np.arange(-distance, distance + 1)
    count = buckets // 2 if both else buckets
    apart = np.abs(ahead) if both else np.maximum(-ahead, 0)
    exact = count // 2
    share = np.log(np.maximum(apart, 1).astype(np.float32) / exact) / math.log(distance / exact)
    far = np.minimum(exact + (share * (count - exact)).astype(np.int32), count - 1)
    return np.where(apart < exact, apart, far) + (count * (ahead > 0) if both else 0)
