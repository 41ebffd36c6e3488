"""Adafactor's second moments, factored over the rows and columns of each parameter's matrix."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxmodels.train.groups import STACKED, matrices

FACTORED = 128
"""Matrices with fewer rows or columns keep their second moments whole: factoring would save little."""


class Factored(NamedTuple):
    """Adafactor's state. Each parameter has either rows and columns or the whole; the others are None."""

    count: jax.Array
    rows: Any
    """Mean squares of each row of a matrix, taken over its columns."""
    columns: Any
    whole: Any


def scale_by_adafactor(axes: Any) -> optax.GradientTransformation:
    """Divide updates by the root of a factored second moment, then clip each to a root mean square of 1.

    Optax's `scale_by_factored_rms` factors the two largest dimensions. Those are not a matrix where a projection has
    heads or where layers are stacked: it then keeps the moments of 64-wide heads whole, or mixes layers. Here the
    logical axes say which dimensions are rows and which are columns.
    Source: Shazeer & Stern 2018, algorithm 4 and equation 6, with the decay of section 7.2 (1 - t^-0.8).
    """

    dimensions = matrices(axes, "matrix", "embedding")

    def factors(dims: contrib.MuonDimensionNumbers | None, shape: tuple[int, ...]) -> Any:
        """Return the dimensions of rows and of columns of a factored parameter, None of any other."""
        if dims is None:
            return None
        sides: Any = (dims.reduction_axis, dims.output_axis)
        return sides if all(math.prod(shape[i] for i in side) >= FACTORED for side in sides) else None

    def each(function: Any, *trees: Any) -> list[Any]:
        """Call `function(dimensions, names, leaf, …)` for each parameter; None counts as a leaf."""
        leaf = lambda x: x is None or isinstance(x, tuple)  # noqa: E731
        found = [jax.tree.leaves(tree, is_leaf=leaf) for tree in (dimensions, axes, *trees)]
        return [function(*leaves) for leaves in zip(*found, strict=True)]

    def init(params: Any) -> Factored:
        def one(dims: Any, names: Any, x: jax.Array) -> tuple[Any, Any, Any]:
            sides = factors(dims, x.shape)
            if sides is None:
                return None, None, jnp.zeros_like(x)
            rows, columns = sides
            row, column = (tuple(1 if i in over else n for i, n in enumerate(x.shape)) for over in (columns, rows))
            return jnp.zeros(row, x.dtype), jnp.zeros(column, x.dtype), None

        kept = zip(*each(one, params), strict=True)
        tree = jax.tree.structure(params)
        return Factored(jnp.zeros((), jnp.int32), *(jax.tree.unflatten(tree, leaves) for leaves in kept))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Factored]:
        decay = 1 - (state.count.astype(jnp.float32) + 1) ** -0.8

        def one(dims: Any, names: Any, g: jax.Array, row: Any, column: Any, whole: Any) -> tuple[Any, ...]:
            square = jnp.square(g) + 1e-30
            mix = lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype)  # noqa: E731
            sides = factors(dims, g.shape)
            if sides is None:
                whole = mix(whole, square)
                scaled = g * jax.lax.rsqrt(whole)
            else:
                rows, columns = sides
                row, column = (
                    mix(row, square.mean(columns, keepdims=True)),
                    mix(column, square.mean(rows, keepdims=True)),
                )
                scaled = g * jax.lax.rsqrt(row / row.mean(rows, keepdims=True)) * jax.lax.rsqrt(column)
            inner = tuple(i for i, name in enumerate(names) if name not in STACKED)
            size = jnp.sqrt(jnp.square(scaled).mean(inner, keepdims=True))
            return (scaled / jnp.maximum(size, 1.0)).astype(g.dtype), row, column, whole

        new = zip(*each(one, updates, state.rows, state.columns, state.whole), strict=True)
        tree = jax.tree.structure(updates)
        scaled, *moments = (jax.tree.unflatten(tree, leaves) for leaves in new)
        return scaled, Factored(state.count + 1, *moments)

    return optax.GradientTransformation(init, update)
