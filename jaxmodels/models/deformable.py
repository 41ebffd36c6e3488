"""Attention to a few sampled points of feature maps of several strides, interpolated bilinearly (Zhu et al. 2020).

Dims: B rows, Q queries, S features of all strides, D width, H heads, K head size, N strides, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.models import layers

_xavier: Any = nn.initializers.xavier_uniform


class Deformable(nn.Module):
    """Attention of queries (B, Q, D) to P places of each stride around their boxes (Zhu et al. 2020).

    Where a head looks, and how much each place counts, are linear in the query. A place between four features is
    weighed between them; outside of the image there are zeros.
    """

    heads: int
    points: int
    """Places of each stride that a head looks at (P)."""
    sides: Sequence[tuple[int, int]]
    """Height and width of the features of each stride, which follow each other in the memory (N)."""
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array, boxes: jax.Array) -> jax.Array:
        sides, dtype = self.sides, self.dtype
        (B, Q, D), H, N, P = x.shape, self.heads, len(self.sides), self.points
        none, axes = layers.zeros, ("embed", "heads", "window", "window", "window")
        offsets = layers.Linear((H, N, P, 2), axes, True, none, dtype, outwards(H, N, P), name="offsets")(x)
        share = layers.Linear((H, N * P), axes[:3], True, none, dtype, name="weights")(x)
        into = _xavier(in_axis=0, out_axis=(1, 2))
        values = layers.Linear((H, D // H), ("embed", "heads", "head_dim"), True, into, dtype, name="values")(memory)
        values = layers.shard(values, "batch", None, "heads", None)

        middle, size = jnp.split(boxes.astype(jnp.float32)[:, :, None, None, None], 2, -1)
        at = middle + offsets.astype(jnp.float32) / P * size / 2  # (B, Q, H, N, P, 2), shares of the image
        share = jax.nn.softmax(share.astype(jnp.float32)).reshape(B, Q, H, N, P)
        full = jnp.array([(width, height) for height, width in sides], jnp.float32)[:, None]
        first = jnp.array(np.cumsum([0, *(h * w for h, w in sides[:-1])]), jnp.int32)[:, None]
        at = at * full - 0.5  # from the middle of the first feature
        low = jnp.floor(at)
        index, weight = [], []
        for corner in np.ndindex(2, 2):
            near = low + np.array(corner, np.float32)
            inside = ((near >= 0) & (near < full)).all(-1)
            x_at, y_at = jnp.moveaxis(jnp.clip(near, 0, full - 1).astype(jnp.int32), -1, 0)
            index.append(first + y_at * full[:, :, 0].astype(jnp.int32) + x_at)
            weight.append(share * (1 - jnp.abs(at - near)).prod(-1) * inside)

        def by_head(parts: list[jax.Array]) -> jax.Array:
            return jnp.stack(parts, -1).reshape(B, Q, H, -1).swapaxes(1, 2)

        index, weight = by_head(index), by_head(weight).astype(dtype)
        seen = jnp.take_along_axis(values.swapaxes(1, 2), index.reshape(B, H, -1, 1), 2)
        y = jnp.einsum("bhqnk,bhqn->bqhk", seen.reshape(*index.shape, D // H), weight)
        axes = ("heads", "head_dim", "embed")
        return layers.Linear((D,), axes, True, _xavier(in_axis=(0, 1), out_axis=2), dtype, name="output")(y)


def outwards(heads: int, strides: int, points: int) -> layers.Init:
    """Offsets with which training begins: each head looks in a direction of its own, each point farther."""
    angle = 2 * math.pi * np.arange(heads) / heads
    way = np.stack([np.cos(angle), np.sin(angle)], -1)
    way /= np.abs(way).max(-1, keepdims=True)
    far = way[:, None, None] * np.arange(1, points + 1)[:, None]
    start = np.broadcast_to(far, (heads, strides, points, 2))
    return lambda key, shape, dtype=jnp.float32: jnp.asarray(start, dtype)
