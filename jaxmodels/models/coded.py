"""A parameter as codes of few bits with scales, as one leaf of a tree of parameters.

It stands for w = scale · (code - zero), or scale · table[code] where the codes count values of a table; where inputs
have factors, for w = factor · scale · (code - zero). Layers multiply by it, dequantized as they read it, so a scan over
stacked layers never holds more than one layer's numbers. Where activations are int8 as well, the product is of codes
(`kernels.quantized.coded_product`).
Shapes: scales and zeros have the rank of the parameter, and each of their dimensions divides the parameter's, by the
size of a block of inputs that share a scale. So a mesh cuts them by the parameter's own logical axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.parallel import rules
from jaxmodels.parallel.rules import Names, constrain, gather

Array = jax.Array
Kind = Literal["int8", "int4", "float8", "nf4"]
Activations = Literal["dynamic", "static"]
"""How inputs of products become int8: with a scale of each row, found as it comes, or with one that is held."""

NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
"""NormalFloat's values: quantiles of the normal distribution, divided by the largest.

Source: Dettmers et al. 2023, appendix E; bitsandbytes computes with the same.
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coded:
    """A quantized parameter, in the place of a parameter; its arrays may also be shapes or logical axes."""

    codes: Any
    """Signed integers or float8 of the parameter's shape; of four bits, bytes, in which `packed` is half as long."""
    scales: Any
    zeros: Any = None
    """Codes that stand for 0, int8; None: 0 does."""
    factors: Any = None
    """What each input is multiplied by before the rest, 1 along the outputs (AWQ, SmoothQuant); None: 1."""
    step: Any = None
    """The scale of static int8 activations, of size 1 for each of stacked matrices."""
    kind: Kind = field(default="int8", metadata={"static": True})
    packed: int | None = field(default=None, metadata={"static": True})
    """The dimension, counted from the last, in which two codes that follow each other share a byte, the first in its
    lower half; None: each has a byte of its own."""
    activations: Activations | None = field(default=None, metadata={"static": True})
    """How the inputs of its products are made int8; None: they stay as they are."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        shape = list(self.codes.shape)
        if self.packed is not None:
            shape[self.packed] *= 2
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def size(self) -> int:
        """The number of the parameter's elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def is_coded(leaf: Any) -> bool:
    """Whether a leaf is a coded parameter."""
    return isinstance(leaf, Coded)


def dequantize(leaf: Coded, dtype: Any = "float32") -> Array:
    """Return the parameter that a leaf stands for, rounded to `dtype` once."""
    values: Any = unpack(leaf)
    if leaf.kind == "nf4":
        values = jnp.asarray(NF4)[values]
    values, scales = values.astype(jnp.float32), jnp.asarray(leaf.scales, jnp.float32)
    blocks, wide = [], []
    for size, parts in zip(values.shape, scales.shape, strict=True):
        cut = 1 < parts < size
        blocks += [parts, size // parts] if cut else [size]
        wide += [parts, 1] if cut else [parts]
    shape, values, scales = values.shape, values.reshape(blocks), scales.reshape(wide)
    if leaf.zeros is not None:
        values = values - jnp.asarray(leaf.zeros).astype(jnp.float32).reshape(wide)
    w = (values * scales).reshape(shape)
    if leaf.factors is not None:
        w = w * leaf.factors
    return w.astype(dtype)


def unpack(leaf: Coded) -> Array:
    """Return the codes in the parameter's shape: int8, for nf4 from 0 to 15, or float8."""
    codes = jnp.asarray(leaf.codes)
    if leaf.packed is None:
        return codes
    axis = codes.ndim + leaf.packed
    halves = jnp.stack([codes & 15, codes >> 4], axis + 1).reshape(leaf.shape).astype(jnp.int8)
    return halves if leaf.kind == "nf4" else (halves ^ 8) - 8  # the sign of four bits


def pack(codes: Array, packed: int) -> Array:
    """Return codes of four bits, two a byte along the dimension `packed`, counted from the last."""
    axis = codes.ndim + packed
    pairs = (codes & 15).astype(jnp.uint8).reshape(*codes.shape[:axis], -1, 2, *codes.shape[axis + 1 :])
    low, high = jnp.moveaxis(pairs, axis + 1, 0)
    return low | (high << 4)


def value(leaf: Any, dtype: Any = "float32") -> Array:
    """Return a parameter that may be coded as an array of this type."""
    return dequantize(leaf, dtype) if isinstance(leaf, Coded) else jnp.asarray(leaf, dtype)


def plain(tree: Any) -> Any:
    """Return a tree of parameters with each coded one dequantized."""
    return jax.tree.map(lambda leaf: dequantize(leaf) if is_coded(leaf) else leaf, tree, is_leaf=is_coded)


def through(f: Callable[[Any], Array], leaf: Any, names: Names, dtype: Any = "float32") -> Array:
    """Return f of a parameter's array, where the parameter has these logical axes and may be coded.

    Of a coded one the backward pass has codes alone: it dequantizes them again, as the numbers of all layers would be
    kept for it otherwise.
    """
    if not isinstance(leaf, Coded):
        return f(leaf)
    check_numbers(leaf, names)
    return jax.checkpoint(lambda leaf: f(dequantize(gathered(leaf, names), dtype)))(leaf)


def check_numbers(leaf: Coded, names: Names) -> None:
    """Refuse a parameter with int8 activations where its product is one of numbers: in all layers but `Linear`.

    Raises:
        UserError: it has them.
    """
    if leaf.activations:
        raise UserError(
            f"got {leaf.activations} int8 activations for a parameter with the axes {', '.join(map(str, names))}, "
            "whose layer multiplies numbers, expected the matrix of a linear layer, try --compress.kept with its path"
        )


def gathered(leaf: Any, names: Names) -> Any:
    """Gather a coded parameter along what fsdp splits, before it is dequantized: links carry codes."""

    def one(x: Array) -> Array:
        kept = [None if size == 1 else name for name, size in zip(names, x.shape, strict=True)]
        x = constrain(x, kept)  # sharded until here, or the partitioner would gather what it has dequantized
        return constrain(x, rules.without_fsdp(kept))

    return jax.tree.map(one, leaf)


def taken(leaf: Any, names: Names, dtype: Any) -> Any:
    """Return a parameter as a product takes it: in this type, or as codes, and whole along what fsdp cuts."""
    return gathered(leaf, names) if isinstance(leaf, Coded) else gather(leaf.astype(dtype), names)


def rows(leaf: Coded, ids: Array) -> Array:
    """Return rows of a coded table (V, D) as float32, dequantized after they are read."""
    if leaf.packed == -leaf.ndim:  # two rows share their bytes
        return dequantize(leaf)[ids]
    taken = jax.tree.map(lambda x: jnp.take(x, ids, axis=0), leaf)
    return dequantize(taken)
