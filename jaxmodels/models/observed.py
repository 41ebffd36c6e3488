"""A parameter whose inputs are measured, as one leaf of a tree of parameters: what calibration needs of real data.

The sums over a batch are gradients. A layer that multiplies by an observed parameter passes its input through
`observe`, which computes nothing; in the backward pass the cotangent of the leaf's sums is what they add up to. So they
come out of any network, stacked layer by stacked layer, on any mesh, and no layer hands anything on.
Shapes: I inputs of a matrix, flattened in the order in which the parameter has them; R rows that it multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """What is known of the inputs x (R, I) of a matrix; stacked matrices have stacked sums."""

    count: Any
    """Rows, those that no result depends on left out: ()."""
    square: Any
    """Sum of x²: (I,)."""
    size: Any
    """Sum of |x|: (I,)."""
    peak: Any
    """Largest |x|: (I,)."""
    gram: Any = None
    """Sum of the products of all pairs, xᵀx: (I, I). None: not asked for."""

    @classmethod
    def zeros(cls, stacked: tuple[int, ...], inputs: int, gram: bool) -> Self:
        """Return sums over nothing."""
        one = lambda *shape: jnp.zeros((*stacked, *shape), jnp.float32)  # noqa: E731
        return cls(one(), one(inputs), one(inputs), one(inputs), one(inputs, inputs) if gram else None)

    def __add__(self, other: Sums) -> Sums:
        """Return the sums over two sets of rows."""
        joined = jax.tree.map(jnp.add, self, other)
        return Sums(joined.count, joined.square, joined.size, jnp.maximum(self.peak, other.peak), joined.gram)


class Order(list[str]):
    """Names of parameters in the order in which a network multiplies by them, which is known when it is traced."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it is itself, whatever it holds, so that one trace serves

    def __eq__(self, other: object) -> bool:
        return self is other


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observed:
    """A parameter and the sums over its inputs, which are 0 and have the gradients that are the sums."""

    base: Any
    sums: Sums
    name: str = field(metadata={"static": True})
    order: Order = field(metadata={"static": True})


def observe(x: Array, leaf: Any, rows: Callable[[Array], Array], lead: int) -> tuple[Array, Any]:
    """Return the input of a product and the parameter that it takes, which is the leaf itself if it is not observed.

    `rows(x)` are the rows that the matrix multiplies, with the first `lead` dimensions of x before the others. An entry
    of these dimensions counts if a result depends on it: of padding nothing does.
    """
    if not isinstance(leaf, Observed):
        return x, leaf
    if leaf.name not in leaf.order:
        leaf.order.append(leaf.name)
    return _tap(x, leaf.sums, rows, lead), leaf.base


def unobserved(leaf: Any) -> Any:
    """Return a parameter for a layer that does not measure its inputs, whose sums stay 0."""
    return leaf.base if isinstance(leaf, Observed) else leaf


def matrix_rows(contracted: int, x: Array) -> Array:
    """Return x (…, inputs…) as (…, I), for a matrix that contracts the last dimensions."""
    return x.reshape(*x.shape[: x.ndim - contracted], -1)


def patch_rows(window: tuple[int, ...], strides: tuple[int, ...], padding: Any, x: Array) -> Array:
    """Return the patches of x (B, …, C) that a convolution multiplies, as (B, …, I) in the order of its weights."""
    spatial = len(window)
    numbers = ("N" + "DHW"[-spatial:] + "C", "DHW"[-spatial:] + "IO", "N" + "DHW"[-spatial:] + "C")
    found = jax.lax.conv_general_dilated_patches(x, window, strides, padding, dimension_numbers=numbers)
    # they come with the channels outermost
    found = found.reshape(*found.shape[:-1], x.shape[-1], math.prod(window))
    return found.swapaxes(-1, -2).reshape(*found.shape[:-2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _tap(x: Array, sums: Sums, rows: Callable[[Array], Array], lead: int) -> Array:
    return x


def _forward(x: Array, sums: Sums, rows: Any, lead: int) -> tuple[Array, tuple[Array, Sums]]:
    return x, (x, sums)


def _backward(rows: Callable[[Array], Array], lead: int, kept: tuple[Array, Sums], dx: Array) -> tuple[Array, Sums]:
    x, sums = kept
    counts = (dx != 0).any(tuple(range(lead, dx.ndim)))
    found = rows(x).astype(jnp.float32)
    weight = counts.reshape(*counts.shape, *(1,) * (found.ndim - lead))
    found = jnp.where(weight, found, 0).reshape(-1, found.shape[-1])
    count = jnp.broadcast_to(weight, (*rows(x).shape[:-1], 1)).sum(dtype=jnp.float32)
    gram = None
    if sums.gram is not None:
        gram = jnp.matmul(found.T, found, precision=jax.lax.Precision.HIGHEST)
    return dx, Sums(count, jnp.square(found).sum(0), jnp.abs(found).sum(0), jnp.abs(found).max(0), gram)


_tap.defvjp(_forward, _backward)
