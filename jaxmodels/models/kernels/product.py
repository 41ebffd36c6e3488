"""Products with parameters that the mesh shards over fsdp (ZeRO-3)."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.parallel.rules import Names, gather, pieces

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

_recomputed: contextvars.ContextVar[bool] = contextvars.ContextVar("whether a block is recomputed", default=False)


@contextlib.contextmanager
def recomputed(yes: bool) -> Iterator[None]:
    """A context in which blocks are traced whose backward pass computes them again, or, inside such a block, not."""
    token = _recomputed.set(yes)
    try:
        yield
    finally:
        _recomputed.reset(token)


def weight_product() -> Callable[..., Any]:
    """The product for weights here: the one that keeps no gathered weights, unless the block keeps nothing anyway.

    A block that is recomputed has gathered its weights when its gradients need them. A TPU's compiler would find a
    second gather equal to the first, a GPU's would not.
    """
    return gathered_product if pieces("embed") > 1 and not _recomputed.get() else product
