"""A parameter with low-rank factors beside it, as one leaf of a tree of parameters (LoRA; Hu et al. 2022).

The base is frozen and the factors are trained: w = base + scale · a · b, and with magnitudes (DoRA; Liu et al. 2024)
w = magnitude · (base + scale · a · b) / norm, where the norm is over the inputs of each output. Layers multiply by base
and factors apart, so that neither w nor its gradient is ever made of a matrix that a product takes.
Shapes: base (stacked…, inputs…, outputs…), a (stacked…, inputs…, r), b (stacked…, r, outputs…), magnitude (stacked…,
outputs…); layers and experts are stacked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.models.coded import is_coded, value

Array = jax.Array
STACKED = ("layers", "expert")
"""Logical axes that stack matrices where they come first; each of these has factors of its own."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """What is trained beside a frozen parameter; `a` and `b` may also be shapes or logical axes."""

    a: Any
    b: Any
    magnitude: Any = None
    """DoRA's length of each output's weights; None in LoRA."""
    scale: float = field(default=1.0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """A frozen parameter and its factors, in the place of a parameter."""

    base: Any
    factors: Factors


def base_of(leaf: Any) -> Any:
    """Return a parameter without its factors."""
    return leaf.base if isinstance(leaf, Adapted) else leaf


def sides(names: Sequence[str | None], kind: str) -> tuple[int, int]:
    """Return how many of a parameter's dimensions come before its inputs, and how many before its outputs.

    Heads with their size, and gates with theirs, are one output; an embedding's input is its id.
    """
    first = sum(1 for _ in itertools.takewhile(STACKED.__contains__, names))
    if kind == "embedding":
        return first, first + 1
    return first, len(names) - (2 if names[-1] == "head_dim" or names[-2] == "gates" else 1)


def flat(factors: Factors, first: int) -> tuple[Array, Array]:
    """Return the factors as stacks of matrices, (S, inputs, r) and (S, r, outputs), of float32."""
    rank = factors.a.shape[-1]
    stack = math.prod(factors.a.shape[:first])
    a = jnp.asarray(factors.a, jnp.float32).reshape(stack, -1, rank)
    return a, jnp.asarray(factors.b, jnp.float32).reshape(stack, rank, -1)


def merged(leaf: Adapted, names: Sequence[str | None], kind: str) -> Array:
    """Return the parameter that a leaf stands for, in float32; `names` are its logical axes."""
    first, _ = sides(names, kind)
    w = summed(leaf, first)
    if leaf.factors.magnitude is not None:
        w = w * (leaf.factors.magnitude.reshape(len(w), 1, -1) / norm(w))
    return w.reshape(leaf.base.shape)


def summed(leaf: Adapted, first: int) -> Array:
    """Return base + scale · a · b as a stack of matrices (S, inputs, outputs)."""
    a, b = flat(leaf.factors, first)
    return value(leaf.base).reshape(len(a), a.shape[1], -1) + leaf.factors.scale * (a @ b)


def norm(w: Array) -> Array:
    """Return the length of each output's weights in (S, inputs, outputs), a constant as far as gradients go.

    It is above 0 even where all weights of an output are 0, since it divides. Source: Liu et al. 2024, section 4.3.
    """
    return jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(jnp.square(w).sum(1, keepdims=True), 1e-30)))


def adapt(y: Array, leaf: Adapted, down: Callable[[Array], Array], up: Callable[[Array, Array], Array]) -> Array:
    """Return a product with an adapted parameter from `y`, the one with its base.

    `down(a)` is the input's product with a, and `up(h, b)` that of the result with b.
    """
    factors = leaf.factors
    y = y + (factors.scale * up(down(factors.a), factors.b)).astype(y.dtype)
    if factors.magnitude is None:
        return y
    length = norm(jax.lax.stop_gradient(summed(leaf, 0))).reshape(factors.magnitude.shape)
    return y * (factors.magnitude / length).astype(y.dtype)


def join(frozen: Any, trained: Any) -> Any:
    """Join frozen and trained parameters into a tree that models take; without frozen ones it is the trained tree."""
    if isinstance(trained, Factors):
        return Adapted(frozen, trained)
    if trained is None:
        return frozen
    if frozen is None or not isinstance(trained, Mapping):
        return trained
    return {name: join(frozen.get(name), trained.get(name)) for name in {**frozen, **trained}}


def merge(params: Any, axes: Any) -> Any:
    """Return parameters with each adapted leaf merged, which a coded base then is no more.

    `axes` is the tree of their logical axes.
    """

    def one(leaf: Any, names: Any) -> Any:
        return merged(leaf, names, names.kind) if isinstance(leaf, Adapted) else leaf

    return jax.tree.map(one, params, axes, is_leaf=lambda x: isinstance(x, Adapted) or is_coded(x))


def unmerge(params: Any, trained: Any, axes: Any) -> Any:
    """Return the frozen base of merged parameters, what `merge` was given before, up to rounding.

    Raises:
        ValueError: the factors have magnitudes, by which the base cannot be told from the merged parameters.
    """

    def one(w: Any, names: Any, beside: Any) -> Any:
        if not isinstance(beside, Factors):
            return w
        if beside.magnitude is not None:
            raise ValueError("got factors with magnitudes (DoRA), expected LoRA, try the base itself")
        negative = Factors(beside.a, beside.b, scale=-beside.scale)
        return merged(Adapted(w, negative), names, names.kind)

    whole = _spread(trained, params)
    return jax.tree.map(one, params, axes, whole, is_leaf=lambda x: x is None)


def _spread(trained: Any, like: Any) -> Any:
    """Return a tree of the form of `like` that has factors where they are, and the arrays of `like` elsewhere."""
    if not isinstance(like, Mapping):
        return trained if isinstance(trained, Factors) else like
    return {name: _spread((trained or {}).get(name), each) for name, each in like.items()}
