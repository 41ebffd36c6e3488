"""Codes of an array: how a parameter is coded, which shapes that gives, and rounding to the nearest."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.models.adapted import sides
from jaxmodels.models.coded import NF4, Activations, Coded, Kind, pack
from jaxmodels.models.parameters import Axes

Array = jax.Array
RANGES: Mapping[str, tuple[int, int]] = {"int8": (-128, 127), "int4": (-8, 7)}
"""The lowest and the highest code."""
FOUR_BITS = ("int4", "nf4")
HIGHEST = 448.0
"""The largest number of float8 (E4M3)."""


class Spec(NamedTuple):
    """How one parameter is coded."""

    kind: Kind
    group: int | None = None
    """Inputs that share a scale; None: all inputs of an output."""
    symmetric: bool = True
    factors: bool = False
    """Whether each input has a factor."""
    activations: Activations | None = None
    """How inputs of products become int8; None: they do not."""


def shared(names: Axes) -> range:
    """Return the dimensions along which numbers may share a scale: the inputs of a product with the parameter.

    An embedding's rows have scales of their own, since an output layer multiplies by its columns.
    """
    first, middle = sides(names, names.kind)
    return range(middle, len(names)) if names.kind == "embedding" else range(first, middle)


def scale_shape(shape: Sequence[int], names: Axes, spec: Spec) -> tuple[int, ...]:
    """Return the shape of the scales, and of the zeros, of a parameter.

    A group is of inputs that follow each other, through as many dimensions as it needs: with heads of 64, one of 128 is
    of two heads.

    Raises:
        UserError: groups do not divide the inputs.
    """
    if (found := _parts(shape, shared(names), spec.group)) is not None:
        return found
    inputs = " x ".join(str(shape[i]) for i in shared(names))
    fitting = [n for n in (128, 64, 32, 16, 8) if n < (spec.group or 0) and _parts(shape, shared(names), n)]
    more = f"--compress.group {fitting[0]}, or " if fitting else ""
    raise UserError(
        f"got groups of {spec.group} for a parameter of shape {tuple(shape)} with {inputs} inputs, expected groups "
        f"that divide the last of these, or are a multiple of it, try {more}--compress.kept with its path"
    )


def _parts(shape: Sequence[int], along: range, group: int | None) -> tuple[int, ...] | None:
    """Return how many groups each dimension has; None where they do not divide it."""
    found, rest = list(shape), group
    for i in reversed(along):
        block = shape[i] if rest is None else min(shape[i], rest)
        if shape[i] % block or (rest is not None and rest % block):
            return None
        found[i] //= block
        rest = None if rest is None else rest // block
    return tuple(found) if rest in (None, 1) else None


def packed_axis(shape: Sequence[int], names: Axes, spec: Spec) -> int | None:
    """Return the dimension in which two codes share a byte, counted from the last; None for codes of eight bits.

    The last of the inputs if it is even, as the products then read whole rows; else any other that is no stack.

    Raises:
        UserError: no dimension is even.
    """
    if spec.kind not in FOUR_BITS:
        return None
    first = sides(names, names.kind)[0]
    for i in [*reversed(shared(names)), *reversed(range(first, len(shape)))]:
        if shape[i] % 2 == 0:
            return i - len(shape)
    raise UserError(
        f"got {spec.kind} for a parameter of shape {tuple(shape)}, expected an even dimension, in which two codes "
        "share a byte, try --compress.codes int8, or --compress.kept with its path"
    )


def layout(shape: Sequence[int], names: Axes, spec: Spec) -> Coded:
    """Return the shapes of a coded parameter's arrays.

    Raises:
        UserError: groups do not divide its inputs, or codes of four bits none of its dimensions.
    """
    parts, packed = scale_shape(shape, names, spec), packed_axis(shape, names, spec)
    held = list(shape)
    if packed is not None:
        held[packed] //= 2
    kind = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}.get(spec.kind, jnp.uint8)
    zeros = None if spec.symmetric else jax.ShapeDtypeStruct(parts, jnp.int8)
    codes, scales = jax.ShapeDtypeStruct(tuple(held), kind), jax.ShapeDtypeStruct(parts, jnp.float32)
    first, middle = sides(names, names.kind)
    ones = [1] * (len(shape) - middle)
    factors = jax.ShapeDtypeStruct((*shape[:middle], *ones), jnp.float32) if spec.factors else None
    step = None
    if spec.activations == "static":
        step = jax.ShapeDtypeStruct((*shape[:first], *[1] * (middle - first), *ones), jnp.float32)
    return Coded(codes, scales, zeros, factors, step, spec.kind, packed, spec.activations)


def quantize(w: Any, names: Axes, spec: Spec) -> Coded:
    """Return a parameter with its numbers rounded to the nearest that codes stand for.

    Raises:
        UserError: as `layout` and `encoded`.
    """
    return encoded(w, layout(w.shape, names, spec))


def encoded(w: Any, like: Coded) -> Coded:
    """Return a parameter, or some of the matrices that it stacks, rounded to codes like those of `like`.

    Raises:
        UserError: `like` has what is measured on data: factors of inputs, or a scale of activations.
    """
    if like.factors is not None or like.step is not None:
        what = "compress.factors" if like.factors is not None else "compress.activations static"
        raise UserError(
            f"got {what} for float32 weights, expected a run that `jaxmodels compress` has made, in which they are "
            "measured, try jaxmodels compress RUN awq, or smoothquant"
        )
    parts = like.scales.shape[like.ndim - w.ndim :]
    return _encoded(w, parts, like.kind, like.zeros is None, like.packed, like.activations)


def encoded_on_host(w: Any, like: Coded) -> Coded:
    """Return `encoded` of an array in host memory, computed there too.

    Whatever the devices are, a base has the same codes: a GPU and a TPU divide with another last bit.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the CPU out
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        return jax.device_get(encoded(np.asarray(w, np.float32), like))


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _encoded(
    w: Array, parts: tuple[int, ...], kind: Kind, symmetric: bool, packed: int | None, activations: Activations | None
) -> Coded:
    scales, zeros = _grid(w, parts, kind, symmetric)
    arrays = _arrays(nearest(w, scales, zeros, kind), scales, zeros, kind, packed)
    return Coded(*arrays, kind=kind, packed=packed, activations=activations)


def grid(w: Any, names: Axes, spec: Spec) -> tuple[Array, Array | None]:
    """Return the scales, and zeros, by which the numbers of each group just fit into the codes.

    Symmetric ones map the largest magnitude to the highest code, and others the range from the lowest number to the
    highest, with 0 in it, to all codes, so that 0 stays 0. A group of zeros has the scale 1.
    """
    return _grid(w, scale_shape(w.shape, names, spec), spec.kind, spec.symmetric)


def _grid(w: Any, parts: Sequence[int], kind: Kind, symmetric: bool) -> tuple[Array, Array | None]:
    w = jnp.asarray(w, jnp.float32)
    blocks = w.reshape([n for size, part in zip(w.shape, parts, strict=True) for n in (part, size // part)])
    inside = tuple(range(1, blocks.ndim, 2))
    if symmetric:
        top = {"float8": HIGHEST, "nf4": 1.0}.get(kind) or RANGES[kind][1]
        # a product with the reciprocal: a compiler may turn a division by a constant into one, with another last bit
        scales = jnp.abs(blocks).max(inside) * np.float32(1 / top)
        return jnp.where(scales == 0, 1.0, scales), None
    least, most = RANGES[kind]
    low, high = jnp.minimum(blocks.min(inside), 0), jnp.maximum(blocks.max(inside), 0)
    scales = (high - low) * np.float32(1 / (most - least))
    scales = jnp.where(scales == 0, 1.0, scales)
    return scales, jnp.clip(jnp.round(least - low / scales), least, most).astype(jnp.int8)


def nearest(w: Any, scales: Array, zeros: Array | None, kind: Kind) -> Array:
    """Return the code nearest to each number of w, in its shape; between two, the even one, or the lower of nf4."""
    w = jnp.asarray(w, jnp.float32)
    ratio = w / spread(scales, w.shape)
    if kind == "float8":
        return jnp.clip(ratio, -HIGHEST, HIGHEST).astype(jnp.float8_e4m3fn)
    if kind == "nf4":
        return sum((ratio > bound).astype(jnp.int8) for bound in (NF4[1:] + NF4[:-1]) / 2)  # pyright: ignore
    least, most = RANGES[kind]
    codes = jnp.round(ratio) + (0 if zeros is None else spread(zeros, w.shape))
    return jnp.clip(codes, least, most).astype(jnp.int8)


def spread(scales: Any, shape: Sequence[int]) -> Array:
    """Return scales or zeros with one for each number of a parameter of this shape."""
    scales = jnp.asarray(scales)
    for i, size in enumerate(shape):
        scales = jnp.repeat(scales, size // scales.shape[i], axis=i)
    return scales


def assemble(
    codes: Any, scales: Any, zeros: Any, names: Axes, spec: Spec, factors: Any = None, step: Any = None
) -> Coded:
    """Return the leaf of codes that were chosen elsewhere: signed integers (nf4: from 0 to 15), or float8, of the
    parameter's shape; `factors` are one for each input and `step` one for each matrix, in the parameter's order.

    Raises:
        UserError: they do not fit the parameter's groups, or `spec`.
    """
    like = layout(codes.shape, names, spec)
    if tuple(scales.shape) != like.scales.shape or (zeros is None) != (like.zeros is None):
        raise UserError(
            f"got scales of shape {tuple(scales.shape)}{'' if zeros is None else ' and zeros'} for {spec}, expected "
            f"{like.scales.shape}{'' if like.zeros is None else ' and zeros'}, try scale_shape"
        )
    more = []
    for what, given, held in (("factors", factors, like.factors), ("a step", step, like.step)):
        if (given is None) != (held is None):
            raise UserError(f"got {'no ' if given is None else ''}{what} for {spec}, expected what it says")
        more.append(None if held is None else jnp.asarray(given, jnp.float32).reshape(held.shape))
    arrays = _arrays(codes, scales, zeros, spec.kind, like.packed)
    return Coded(*arrays, more[0], more[1], spec.kind, like.packed, spec.activations)


def _arrays(codes: Any, scales: Any, zeros: Any, kind: Kind, packed: int | None) -> tuple[Array, Array, Array | None]:
    """Return codes, scales and zeros as a leaf holds them."""
    codes = jnp.asarray(codes) if kind == "float8" else jnp.asarray(codes).astype(jnp.int8)
    zeros = None if zeros is None else jnp.asarray(zeros).astype(jnp.int8)
    return codes if packed is None else pack(codes, packed), jnp.asarray(scales, jnp.float32), zeros


def axes_of(names: Axes, leaf: Coded) -> Coded:
    """Return the logical axes of a coded parameter's arrays: its own, but for dimensions that share one scale."""

    def one(x: Any) -> Axes:
        kept = (None if size == 1 else name for name, size in zip(names, x.shape, strict=True))
        return Axes(kept, names.kind, names.before_stack)

    return jax.tree.map(one, leaf)
