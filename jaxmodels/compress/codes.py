"""Quantization: which parameters of a model are coded, how, and round-to-nearest codes of an array."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.compress.patterns import matched
from jaxmodels.errors import UserError
from jaxmodels.fields import Range, Section
from jaxmodels.models.adapted import sides
from jaxmodels.models.coded import NF4, Coded, Kind, is_coded, pack
from jaxmodels.models.model import Model
from jaxmodels.models.parameters import Axes
from jaxmodels.registry import Registry

Array = jax.Array
COMPRESSIONS = Registry(
    "compress",
    "jaxmodels.compressions",
    {"quantized": "jaxmodels.compress.codes:Quantized", "sparse": "jaxmodels.compress.sparse:Sparse"},
)
RANGES: Mapping[str, tuple[int, int]] = {"int8": (-128, 127), "int4": (-8, 7)}
"""The lowest and the highest code."""
FOUR_BITS = ("int4", "nf4")
HIGHEST = 448.0
"""The largest number of float8 (E4M3)."""
_KINDS = ("matrix", "embedding")


@dataclass(frozen=True)
class CompressConfig(Section, section="compress", kinds=COMPRESSIONS):
    """How a run holds its parameters."""

    def specs(self, networks: Mapping[str, Model]) -> dict[str, Spec]:
        """Return how parameters are coded, by network and path; those that are not coded are left out."""
        return {}

    def trained(self, optimizer: Any, steps: int, axes: Mapping[str, Any], updates: int = 1) -> Any:
        """Return the optimizer of a network whose parameters have these logical axes, over a run of so many steps."""
        return optimizer


@dataclass(frozen=True)
class Quantized(CompressConfig):
    """Parameters as codes of few bits with scales. Patterns are of paths below the network, such as layers/attn/q/w."""

    codes: Kind = "int8"
    """int8; int4, two a byte; float8 (E4M3); or nf4, the 16 values of QLoRA (Dettmers et al. 2023), two a byte."""
    group: Annotated[int, Range(2, 2**20)] | None = None
    """Inputs that share a scale, such as 32, 64 or 128. None: all inputs of an output."""
    symmetric: bool = True
    """Whether the codes lie around 0; otherwise int8 and int4 have a zero point beside each scale."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the matrices that are coded: *, */mlp/*, layers/attn/q/w."""
    embeddings: tuple[str, ...] = ()
    """Patterns of embeddings and output layers that are coded too: embed, head."""
    kept: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are."""

    def __post_init__(self) -> None:
        if not self.symmetric and self.codes not in RANGES:
            raise UserError(
                f"got compress.symmetric False for {self.codes}, which has no zero points, expected int8 or int4, "
                "try --compress.codes int4"
            )

    def specs(self, networks: Mapping[str, Model]) -> dict[str, Spec]:
        names, spec = named(networks), Spec(self.codes, self.group, self.symmetric)
        shapes = {
            f"{network}/{_path(path)}": leaf.shape
            for network, model in networks.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(model.shapes())
        }
        every, of = list(names), {kind: [name for name in names if names[name].kind == kind] for kind in _KINDS}
        chosen = {
            *matched("compress.targets", self.targets, every, of["matrix"], "matrix"),
            *matched("compress.embeddings", self.embeddings, every, of["embedding"], "embedding"),
        } - {*matched("compress.kept", self.kept, every, every, "parameter")}
        for name in sorted(chosen):
            try:
                layout(shapes[name], names[name], spec)
            except UserError as error:
                path = name.partition("/")[2]
                said = str(error).replace("a parameter", path, 1)
                raise UserError(said.replace("with its path", f"'{path.removesuffix('/w')}'")) from None
        return {name: spec for name in names if name in chosen}


class Spec(NamedTuple):
    """How one parameter is coded."""

    kind: Kind
    group: int | None = None
    """Inputs that share a scale; None: all inputs of an output."""
    symmetric: bool = True


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
    return Coded(codes, scales, zeros, spec.kind, packed)


def quantize(w: Any, names: Axes, spec: Spec) -> Coded:
    """Return a parameter with its numbers rounded to the nearest that codes stand for.

    Raises:
        UserError: groups do not divide its inputs, or codes of four bits none of its dimensions.
    """
    return encoded(w, layout(w.shape, names, spec))


def encoded(w: Any, like: Coded) -> Coded:
    """Return a parameter, or some of the matrices that it stacks, rounded to codes like those of `like`."""
    parts = like.scales.shape[like.ndim - w.ndim :]
    return _encoded(w, parts, like.kind, like.zeros is None, like.packed)


def encoded_on_host(w: Any, like: Coded) -> Coded:
    """Return `encoded` of an array in host memory, computed there too.

    Whatever the devices are, a base has the same codes: a GPU and a TPU divide with another last bit.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the CPU out
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        return jax.device_get(encoded(np.asarray(w, np.float32), like))


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _encoded(w: Array, parts: tuple[int, ...], kind: Kind, symmetric: bool, packed: int | None) -> Coded:
    scales, zeros = _grid(w, parts, kind, symmetric)
    return _assemble(nearest(w, scales, zeros, kind), scales, zeros, kind, packed)


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


def assemble(codes: Any, scales: Any, zeros: Any, names: Axes, spec: Spec) -> Coded:
    """Return the leaf of codes that were chosen elsewhere: signed integers (nf4: from 0 to 15), or float8, of the
    parameter's shape.

    Raises:
        UserError: they do not fit the parameter's groups.
    """
    like = layout(codes.shape, names, spec)
    if tuple(scales.shape) != like.scales.shape or (zeros is None) != (like.zeros is None):
        raise UserError(
            f"got scales of shape {tuple(scales.shape)}{'' if zeros is None else ' and zeros'} for {spec}, expected "
            f"{like.scales.shape}{'' if like.zeros is None else ' and zeros'}, try scale_shape"
        )
    return _assemble(codes, scales, zeros, spec.kind, like.packed)


def _assemble(codes: Any, scales: Any, zeros: Any, kind: Kind, packed: int | None) -> Coded:
    codes = jnp.asarray(codes) if kind == "float8" else jnp.asarray(codes).astype(jnp.int8)
    zeros = None if zeros is None else jnp.asarray(zeros).astype(jnp.int8)
    return Coded(
        codes if packed is None else pack(codes, packed), jnp.asarray(scales, jnp.float32), zeros, kind, packed
    )


@dataclass(frozen=True)
class Coding:
    """Which parameters of a task's networks are coded, and how."""

    networks: Mapping[str, Model]
    chosen: Mapping[str, Spec]
    """By network and path: model/layers/attn/q/w."""

    def encode(self, params: Any) -> Any:
        """Return parameters, by network, with the chosen ones coded by round-to-nearest."""
        return self._mapped(lambda name, w: quantize(w, self._names[name], self.chosen[name]), params)

    def shapes(self) -> Any:
        """Return the shapes of the parameters, by network."""
        return self._mapped(
            lambda name, w: layout(w.shape, self._names[name], self.chosen[name]),
            {name: network.shapes() for name, network in self.networks.items()},
        )

    def axes(self, of: Any = None) -> Any:
        """Return the logical axes of the parameters, by network; `of` is that tree, or a part of it, without codes."""
        whole = {name: network.axes() for name, network in self.networks.items()} if of is None else of
        shapes = dict(jax.tree_util.tree_leaves_with_path(self.shapes(), is_leaf=is_coded))
        layouts = {_path(path): leaf for path, leaf in shapes.items()}
        return self._mapped(lambda name, names: axes_of(names, layouts[name]), whole)

    def _mapped(self, one: Callable[[str, Any], Any], tree: Any) -> Any:
        def each(path: tuple[Any, ...], leaf: Any) -> Any:
            return one(_path(path), leaf) if _path(path) in self.chosen and not is_coded(leaf) else leaf

        return jax.tree_util.tree_map_with_path(each, tree, is_leaf=lambda x: isinstance(x, tuple) or is_coded(x))

    @functools.cached_property
    def _names(self) -> dict[str, Axes]:
        return named(self.networks)


def axes_of(names: Axes, leaf: Coded) -> Coded:
    """Return the logical axes of a coded parameter's arrays: its own, but for dimensions that share one scale."""

    def one(x: Any) -> Axes:
        kept = (None if size == 1 else name for name, size in zip(names, x.shape, strict=True))
        return Axes(kept, names.kind, names.before_stack)

    return jax.tree.map(one, leaf)


def coding(section: CompressConfig | None, networks: Mapping[str, Model]) -> Coding | None:
    """Return which parameters of networks a config holds as codes; None if it holds none so.

    Raises:
        UserError: a pattern matches nothing that it could, or a parameter cannot be coded so.
    """
    specs = {} if section is None else section.specs(networks)
    return Coding(networks, specs) if specs else None


def named(networks: Mapping[str, Model]) -> dict[str, Axes]:
    """Return the logical axes of all parameters by network and path."""
    return {
        f"{network}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for network, model in networks.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.axes(), is_leaf=lambda x: isinstance(x, tuple))
    }


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
