"""Embedding lookup in a table that the mesh shards over fsdp (ZeRO-3)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmodels.parallel.rules import Names, add_up, apart, constrain, pieces

Array = jax.Array
Table = tuple[tuple[int, ...], str, Names]
"""Shape, dtype and logical axes of a table."""


def lookup(w: Array, ids: Array, axes: Names) -> Array:
    """w[ids], whose gradient is added up in float32.

    Each device adds up the gradient of its own rows and tokens, and one reduce-scatter joins them. Left to choose,
    XLA's partitioner may gather the gradients of all tokens on every device.
    Shapes: w (V, D), ids (…), returns (…, D).
    """
    return _lookup(w, ids, (w.shape, w.dtype.name, axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(w: Array, ids: Array, table: Table) -> Array:
    return jnp.take(w, ids, axis=0)


def _forward(w: Array, ids: Array, table: Table) -> tuple[Array, Array]:
    return _lookup(w, ids, table), ids


def _backward(table: Table, ids: Array, dy: Array) -> tuple[Array, None]:
    (shape, dtype, axes), over = table, ("batch", "seq")

    def add(ids: Array, dy: Array) -> Array:
        return jnp.zeros(shape, jnp.float32).at[ids].add(dy.astype(jnp.float32))

    counts = tuple(map(pieces, over))
    if counts == (1, 1) or ids.ndim != 2 or any(size % n for size, n in zip(ids.shape, counts, strict=True)):
        return constrain(add(ids, dy), axes).astype(dtype), None
    parts = jax.vmap(jax.vmap(add))(apart(ids, *counts), apart(dy, *counts))
    parts = constrain(parts, (*over, axes[0], None))
    return add_up(parts, over, axes).astype(dtype), None


_lookup.defvjp(_forward, _backward)
