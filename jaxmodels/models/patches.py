"""Images as sequences of patches."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmodels.models import layers


def cut(images: jax.Array, patch: int) -> jax.Array:
    """Cut images (B, H, W, C) into square patches, row by row: (B, N, patch, patch, C)."""
    B, height, breadth, C = images.shape
    rows, columns = height // patch, breadth // patch
    return images.reshape(B, rows, patch, columns, patch, C).swapaxes(2, 3).reshape(B, rows * columns, patch, patch, C)


def join(patches: jax.Array, rows: int) -> jax.Array:
    """Put patches (B, N, patch, patch, C) together again, as images that have this many rows of them."""
    B, count, patch, _, C = patches.shape
    columns = count // rows
    x = patches.reshape(B, rows, columns, patch, patch, C).swapaxes(2, 3)
    return x.reshape(B, rows * patch, columns * patch, C)


def embed_patches(
    images: jax.Array,
    patch: int,
    width: int,
    *,
    token: layers.Init | None,
    bias: bool = True,
    dtype: str = "float32",
) -> jax.Array:
    """Embed the patches of images (B, H, W, C), row by row, and their positions: (B, N, D); call it inside a network.

    With `token`, the initializer of a learned class token, that token comes first.
    """
    B, x = len(images), cut(images, patch)
    # a product, which on a CPU is faster than a convolution with stride and window the same
    axes = ("window", "window", "features", "embed")
    x = layers.Linear((width,), axes, bias, dtype=dtype, before_stack=True, name="patches")(x)
    if token is not None:
        first = layers.Embed(1, width, ("positions", "embed"), token, dtype, before_stack=True, name="class_token")
        x = jnp.concatenate([jnp.broadcast_to(first(jnp.zeros((1, 1), jnp.int32)), (B, 1, width)), x], axis=1)
    axes = ("positions", "embed")
    places = layers.Embed(x.shape[1], width, axes, dtype=dtype, before_stack=True, name="positions")
    return layers.shard(x + places(jnp.arange(x.shape[1])[None]), "batch", "seq", None)
