"""A model as pure functions over a plain dict of arrays, and the registry of families.

Flax stays behind this file: a family writes a Linen module, `register` turns it into a `Model`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError, nearest
from jaxmodels.models.kernels import quantized as quantization

Params = dict[str, Any]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
Attention = Literal["auto", "xla", "blockwise", "cudnn", "splash", "tokamax", "ring", "ulysses"]


@dataclass(frozen=True)
class Model:
    """Three pure functions and the config they came from.

    `init(key) -> params`; `apply(params, inputs, *, stats=None, cache=None, train=False, rng=None, …) -> outputs`;
    `axes() -> ` the tree of params with logical axis names for arrays. With `stats` (batch statistics) or `cache`
    (key-value cache) given, apply returns `(outputs, new stats or cache)`. `stats()` and `cache(batch, length)`
    make the initial ones; a model without batch statistics has an empty tree.
    """

    config: Any
    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]
    axes: Callable[[], Params]
    shapes: Callable[[], Params]
    """The tree of params as `jax.ShapeDtypeStruct`, computed from shapes alone."""
    stats: Callable[[], Params]
    cache: Callable[[int, int], Any]
    inputs: Callable[..., tuple[jax.ShapeDtypeStruct, ...]]
    """`inputs(batch, length=8)`: shapes and dtypes of what `apply` takes; a model of images ignores the length."""
    unembedding: Callable[[Params], jax.Array] | None = None
    """The output layer (V, D) of a language model, for losses that never hold all logits."""
    longest: int | None = None
    """The most tokens `apply` takes; None: no limit."""
    auxiliary: bool = False
    """Whether `apply(..., auxiliary=True)` gives `(outputs, {name: loss})`: weighted losses to add to the mean."""

    def count(self) -> int:
        """Number of parameters, from shapes alone."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes()))


@dataclass(frozen=True)
class Family:
    """A registered family: its config class, its network, and its published presets."""

    name: str
    config: type
    network: Callable[[Any], nn.Module]
    inputs: Callable[[Any, int, int], tuple[jax.ShapeDtypeStruct, ...]]
    """(config, batch, length) -> what `apply` takes."""
    presets: Mapping[str, Any]
    cache: Callable[[Any, int, int], Any] | None = None
    unembedding: Callable[[Any, Params], jax.Array] | None = None
    longest: Callable[[Any], int] | None = None
    auxiliary: bool = False


FAMILIES = {
    name: f"jaxmodels.models.{name}"
    for name in (
        "gpt2",
        "llama",
        "mixtral",
        "mlp",
        "transformer",
        "cnn",
        "resnet",
        "vgg",
        "lstm",
        "vae",
        "gan",
        "bert",
        "vit",
        "clip",
    )
}
"""Family -> the module that registers it, so that a family is imported when it is asked for."""

_registered: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known to `create` and `list_models`."""
    _registered[family.name] = family


def family(name: str) -> Family:
    """The family of that name, imported if need be."""
    if name not in FAMILIES and name not in _registered:
        raise UserError(f"got model family {name!r}, expected one of {', '.join(FAMILIES)}{nearest(name, FAMILIES)}")
    if name not in _registered:
        importlib.import_module(FAMILIES[name])
    return _registered[name]


def family_of(config: Any) -> Family:
    """The family whose config this is."""
    for name in _registered:
        if type(config) is _registered[name].config:
            return _registered[name]
    raise UserError(f"got model config {config!r}, expected one of {', '.join(FAMILIES)}")


def list_models() -> dict[str, list[str]]:
    """Families and the names of their presets."""
    return {name: list(family(name).presets) for name in FAMILIES}


def preset(name: str) -> Any:
    """The config of a published model, or a family's default.

    Raises:
        UserError: no such name; says the nearest.
    """
    known: dict[str, Any] = {}
    for key in FAMILIES:
        known |= {key: family(key).config()} | dict(family(key).presets)
    if name not in known:
        hint = nearest(name, known) or ", try jaxmodels models, which lists them"
        raise UserError(f"got model {name!r}, expected one of {', '.join(FAMILIES)} or a preset{hint}")
    return known[name]


def create(model: Any, **overrides: Any) -> Model:
    """A model from a preset's name ("gpt2", "llama3-8b") or a family's config, with fields overridden.

    Raises:
        UserError: unknown name, unknown field, or values that do not fit together.
    """
    config = preset(model) if isinstance(model, str) else model
    kind = family_of(config)
    fields = [f.name for f in dataclasses.fields(config)]
    for name in overrides:
        if name not in fields:
            raise UserError(
                f"got {type(config).__name__} field {name!r}, expected one of {', '.join(fields)}"
                f"{nearest(name, fields)}"
            )
    config = dataclasses.replace(config, **overrides)
    return functional(config, kind)


def functional(config: Any, family: Family) -> Model:
    """The pure functions of a family's network."""
    module = family.network(config)

    def inputs(batch: int, length: int = 8) -> tuple[jax.ShapeDtypeStruct, ...]:
        return family.inputs(config, batch, length)

    def variables(key: jax.Array) -> dict[str, Any]:
        # one example, zeros: initial values depend on shapes alone
        made: Any = module.init({"params": key}, *(jnp.zeros(x.shape, x.dtype) for x in inputs(1)))
        return made

    @functools.cache
    def boxed() -> dict[str, Any]:
        return jax.eval_shape(lambda: variables(jax.random.key(0)))

    def init(key: jax.Array) -> Params:
        return nn.unbox(variables(key))["params"]

    def axes() -> Params:
        def names(leaf: Any) -> tuple[str | None, ...]:
            return leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim

        return jax.tree.map(names, boxed()["params"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))

    def shapes() -> Params:
        return nn.unbox(boxed())["params"]

    def stats() -> Params:
        if "stats" not in boxed():
            return {}
        # compiled, so that the parameters beside them are never made
        return jax.jit(lambda: nn.unbox(variables(jax.random.key(0)))["stats"])()

    def cache(batch: int, length: int) -> Any:
        if family.cache is None:
            raise UserError(f"got a key-value cache for {family.name}, expected a model that decodes")
        return family.cache(config, batch, length)

    def apply(
        params: Params, *args: Any, stats: Params | None = None, rng: jax.Array | None = None, **kwargs: Any
    ) -> Any:
        rngs = None if rng is None else {"dropout": rng, "latent": jax.random.fold_in(rng, 1)}
        if stats is None:
            return module.apply({"params": params}, *args, rngs=rngs, **kwargs)
        out, updated = module.apply({"params": params, "stats": stats}, *args, rngs=rngs, mutable=["stats"], **kwargs)
        return out, updated.get("stats", {})

    unembedding = family.unembedding
    return Model(
        config,
        init,
        apply,
        axes,
        shapes,
        stats,
        cache,
        inputs,
        None if unembedding is None else lambda params: unembedding(config, params),
        None if family.longest is None else family.longest(config),
        family.auxiliary,
    )


def quantized(model: Model, rule: quantization.Rule) -> Model:
    """The model whose products with weights are in eight bits, as far as the rule says; its parameters stay float32.

    Raises:
        UserError: the rule covers none of its products.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model.axes(), is_leaf=lambda x: isinstance(x, tuple))
    weights = [[name for name in axes if name != "layers"] for path, axes in leaves if path[-1].key == "w"]
    if not any(rule.covers(axes) for axes in weights if len(axes) > 1):
        raise UserError(
            f"got quantization to {rule.kind} for {type(model.config).__name__}, expected a model with weights of the "
            f"axes {', '.join(rule.axes)} alone, try --train.quantize none"
        )

    def apply(*args: Any, **kwargs: Any) -> Any:
        with quantization.ambient(rule):
            return model.apply(*args, **kwargs)

    return dataclasses.replace(model, apply=apply)


def divide(config: Any, whole: str, parts: str) -> None:
    """Check that one field of a config divides by another; for a config's `__post_init__`."""
    a, b = getattr(config, whole), getattr(config, parts)
    if b < 1 or a % b:
        small = [n for n in range(1, math.isqrt(max(a, 1)) + 1) if a % n == 0]
        near = [*small, *(max(a, 1) // n for n in small)]
        best = min(near, key=lambda n: (abs(n - b), n))
        raise UserError(
            f"got {whole} {a} with {parts} {b}, expected {whole} to be a multiple of {parts}, try {parts} {best}"
        )


def halvings(input_shape: tuple[int, int, int], channels: tuple[int, ...], field: str) -> tuple[int, int]:
    """Height and width after a halving for each of the channels; for a config's `__post_init__` too.

    Raises:
        UserError: they are not even each time.
    """
    height, width, _ = input_shape
    times = 2 ** len(channels)
    if height % times or width % times:
        even = math.gcd(height, width)
        most = (even & -even).bit_length() - 1
        raise UserError(
            f"got {field} {channels} for images of {height}×{width}, expected sides that {times} divides, "
            f"try at most {most} {field}"
        )
    return height // times, width // times


def check_patches(input_shape: tuple[int, int, int], patch: int) -> None:
    """Refuse images that patches do not fill; for a config's `__post_init__`."""
    height, width, _ = input_shape
    if patch < 1 or height % patch or width % patch:
        near = [n for n in range(1, min(height, width) + 1) if not height % n and not width % n]
        best = min(near, key=lambda n: (abs(n - patch), n))
        raise UserError(
            f"got patch {patch} with images of {height}x{width}, expected one that divides height and width, "
            f"try --model.patch {best}"
        )


def check_shape(x: jax.Array, expected: Sequence[int]) -> None:
    """Refuse inputs whose examples have another shape than the config's."""
    if x.shape[1:] != tuple(expected):
        raise UserError(f"got inputs of shape {x.shape[1:]}, expected {tuple(expected)}, try --model.input-shape")
