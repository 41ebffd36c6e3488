"""Products in eight bits: of float32 parameters, forward and backward, and of parameters that are held as int8 codes.

Each factor is divided by a scale that maps its largest value to the largest one of its type, and rounded; the product
is accumulated in more bits and multiplied by both scales, which are computed anew for each array. float8 has one scale
for a whole array, with E4M3 for activations and weights and E5M2 for gradients (Micikevicius et al. 2022, section 3);
int8, which has no exponents, has one for each row of the left factor and each column of the right one (Dettmers et al.
2022, section 2.1). Weights sharded over fsdp are rounded before they are gathered, so that links carry eight bits too.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.models.coded import Coded, dequantize
from jaxmodels.models.coded import gathered as gathered_codes
from jaxmodels.parallel.rules import constrain, gather

Array = jax.Array
AXES = ("embed", "heads", "kv_heads", "head_dim", "mlp")
"""Logical axes of the weights of blocks. Embeddings, output layers, routers and patches have others too."""


class Kind(NamedTuple):
    """How numbers are rounded."""

    forward: str
    """Type of activations and weights."""
    backward: str
    """Type of gradients."""
    sums: str | None
    """Type in which products are accumulated; None: the compute dtype."""
    vectors: bool
    """Whether each row and column has a scale of its own."""

    def shared(self, contracted: Sequence[int]) -> Sequence[int] | None:
        """The dimensions along which numbers share a scale, in a product that contracts these; None: all."""
        return contracted if self.vectors else None


KINDS = {
    "int8": Kind("int8", "int8", "int32", True),
    "float8": Kind("float8_e4m3fn", "float8_e5m2", None, False),
}


class Rule(NamedTuple):
    """Which products are quantized: those with weights whose logical axes are all among these."""

    kind: str
    axes: tuple[str, ...] = AXES

    def covers(self, axes: Sequence[str]) -> bool:
        return set(axes) <= set(self.axes)


class Scaled(NamedTuple):
    """An array as values · scale; the scale has size 1 in each dimension that shares it."""

    values: Array
    scale: Array


_ambient: contextvars.ContextVar[Rule | None] = contextvars.ContextVar("rule of quantization", default=None)


@contextlib.contextmanager
def ambient(rule: Rule) -> Iterator[None]:
    """A context in which a traced model's layers quantize by this rule."""
    token = _ambient.set(rule)
    try:
        yield
    finally:
        _ambient.reset(token)


def kind_of(axes: Sequence[str]) -> Kind | None:
    """How products with weights of these logical axes are quantized; None if they are not."""
    rule = _ambient.get()
    return KINDS[rule.kind] if rule is not None and rule.covers(axes) else None


def quantize(x: Array, dtype: str, shared: Sequence[int] | None) -> Scaled:
    """An array in eight bits, with one scale along the dimensions `shared` (None: along all)."""
    whole = jnp.issubdtype(dtype, jnp.integer)
    top = float(jnp.iinfo(dtype).max if whole else jnp.finfo(dtype).max)
    # nan passes through the maximum, and by the scale into every product that it has a part in
    largest = jnp.maximum(jnp.abs(x).max(shared, keepdims=True).astype(jnp.float32), 1e-30)
    values = jnp.clip(x.astype(jnp.float32) * (top / largest), -top, top)
    return Scaled((jnp.round(values) if whole else values).astype(dtype), largest / top)


def gathered(x: Scaled, axes: tuple[str, ...]) -> Scaled:
    """Weights of these logical axes, gathered over fsdp."""
    # sharded until they are rounded: the partitioner would gather first, and send float32
    return x._replace(values=gather(constrain(x.values, axes), axes))


def multiply(a: Scaled, b: Scaled, left: Sequence[int], right: Sequence[int], kind: Kind, dtype: str) -> Array:
    """The product that contracts these dimensions of the left and of the right, in `dtype`."""
    sums, contracted = jnp.dtype(kind.sums or dtype), (tuple(left), tuple(right))
    y = jax.lax.dot_general(a.values, b.values, (contracted, ((), ())), preferred_element_type=sums)
    rows, columns = a.scale.squeeze(left), b.scale.squeeze(right)
    rows = rows.reshape(*rows.shape, *(1,) * columns.ndim)
    return (y.astype(jnp.float32) * rows * columns).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def quantized_product(x: Array, w: Array, axes: tuple[str, ...], contracted: int, dtype: str, kind: Kind) -> Array:
    """`product.product` in eight bits, as are both products of its backward pass, which gathers w again."""
    last, first = range(x.ndim - contracted, x.ndim), range(contracted)
    a = quantize(x, kind.forward, kind.shared(last))
    b = gathered(quantize(w, kind.forward, kind.shared(first)), axes)
    return multiply(a, b, last, first, kind, dtype)


def _forward(x: Array, w: Array, *how: object) -> tuple[Array, tuple[Array, Array]]:
    return quantized_product(x, w, *how), (x, w)  # pyright: ignore[reportArgumentType]


def _backward(
    axes: tuple[str, ...], contracted: int, dtype: str, kind: Kind, kept: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = kept
    leading = range(x.ndim - contracted)
    outputs, columns = range(len(leading), dy.ndim), range(contracted, w.ndim)
    g = quantize(dy, kind.backward, kind.shared(outputs))
    b = gathered(quantize(w, kind.forward, kind.shared(columns)), axes)
    dx = multiply(g, b, outputs, columns, kind, dtype)
    a = quantize(x, kind.forward, kind.shared(leading))
    g = quantize(dy, kind.backward, kind.shared(leading))
    dw = constrain(multiply(a, g, leading, leading, kind, dtype), axes)
    return dx.astype(x.dtype), dw.astype(w.dtype)


quantized_product.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def coded_product(x: Array, w: Coded, axes: tuple[str, ...], contracted: int, dtype: str) -> Array:
    """x (…, inputs…) times a parameter of int8 codes, with the inputs rounded to int8: sums of integers, scaled.

    Each row of x has the scale of its largest number, or all have the one that the parameter holds; numbers beyond it
    become the largest code. The gradient of x is that of the product with x as it was (straight through).
    """
    held = gathered_codes(w, axes)
    last = range(x.ndim - contracted, x.ndim)
    if held.factors is not None:
        x = x * held.factors.reshape(x.shape[last.start :]).astype(x.dtype)
    if held.step is None:
        a = quantize(x, "int8", last)
    else:
        step = held.step.reshape((1,) * x.ndim)
        a = Scaled(jnp.clip(jnp.round(x.astype(jnp.float32) / step), -127, 127).astype(jnp.int8), step)
    return multiply(a, Scaled(held.codes, held.scales), last, range(contracted), KINDS["int8"], dtype)


def _coded_forward(x: Array, w: Coded, *how: object) -> tuple[Array, tuple[Array, Coded]]:
    return coded_product(x, w, *how), (x, w)  # pyright: ignore[reportArgumentType]


def _coded_backward(
    axes: tuple[str, ...], contracted: int, dtype: str, kept: tuple[Array, Coded], dy: Array
) -> tuple[Array, Coded]:
    x, w = kept
    numbers = dequantize(gathered_codes(w, axes), dtype)
    outputs = tuple(range(x.ndim - contracted, dy.ndim)), tuple(range(contracted, numbers.ndim))
    dx = jax.lax.dot_general(dy.astype(dtype), numbers, (outputs, ((), ())))
    none = jax.tree.map(  # codes are not trained
        lambda part: (
            jnp.zeros(part.shape, part.dtype)
            if jnp.issubdtype(part.dtype, jnp.floating)
            else np.zeros(part.shape, jax.dtypes.float0)
        ),
        w,
    )
    return dx.astype(x.dtype), none


coded_product.defvjp(_coded_forward, _coded_backward)
