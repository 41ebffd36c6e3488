"""Products with parameters that the mesh shards over fsdp (ZeRO-3)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxmodels.parallel.rules import Names, gather

Array = jax.Array
PRODUCT = "product"
"""The name by which a policy of `jax.checkpoint` finds the results of products with weights, whatever computes them."""


def product(x: Array, w: Array, axes: Names, contracted: int, dtype: str) -> Array:
    """x · w in the compute dtype, over the last `contracted` dimensions of x and the first of w; w has these axes."""
    return jnp.tensordot(x.astype(dtype), gather(w.astype(dtype), axes), contracted)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def gathered_product(x: Array, w: Array, axes: Names, contracted: int, dtype: str) -> Array:
    """`product`, whose backward pass gathers w again: a device that kept it would hold the weights of all layers."""
    return product(x, w, axes, contracted, dtype)


def _forward(x: Array, w: Array, *how: tuple[str, ...] | int | str) -> tuple[Array, tuple[Array, Array]]:
    return product(x, w, *how), (x, w)  # pyright: ignore[reportArgumentType]


def _backward(axes: Names, contracted: int, dtype: str, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    return jax.vjp(lambda x, w: product(x, w, axes, contracted, dtype), *kept)[1](dy)


gathered_product.defvjp(_forward, _backward)
