"""A model as pure functions over a plain dict of arrays, and what a family states so that one can be made.

Flax stays behind this file: a family writes a Linen module, `functional` turns it into a `Model`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import KVCache, shown
from jaxmodels.models.adapted import Adapted, merged
from jaxmodels.models.coded import Coded, dequantize
from jaxmodels.models.inner import INNER
from jaxmodels.models.kernels import quantized as quantization
from jaxmodels.models.parameters import declared_axes
from jaxmodels.registry import outside

Params = dict[str, Any]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full", "offload"]
Inputs = tuple[jax.ShapeDtypeStruct, ...]
"""Shapes and dtypes of what `apply` takes."""


class Apply(Protocol):
    """`apply(params, *inputs)`, with what a family takes beyond these keywords in `options`."""

    def __call__(
        self,
        params: Params,
        *inputs: Any,
        stats: Params | None = None,
        rng: jax.Array | None = None,
        keep: bool = False,
        **options: Any,
    ) -> Any:
        """The outputs; `(outputs, new stats or cache)` where `stats=` or `cache=` is given.

        `train=True` turns on dropout, whose key `rng` is; `head=False` gives features in place of logits. With `keep`
        the outputs are `(outputs, inner)`: what the stacked blocks give, `layers/hidden` (L, B, T, D), and their
        attention, `layers/attn/scores` (L, B, H, T, S) and `layers/attn/values` (L, B, S, G, K), as a nested dict.
        """
        ...


class InputShapes(Protocol):
    """Shapes and dtypes of what `apply` takes; a model of images ignores the length."""

    def __call__(self, batch: int, length: int = 8) -> Inputs: ...


class EmptyCache(Protocol):
    """An empty key-value cache of this many rows, each with room for `length` tokens."""

    def __call__(self, batch: int, length: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Model:
    """Pure functions, and the config that they came from.

    `init(key)` makes parameters; `apply` computes outputs; `axes()` names the logical axes of each parameter. Batch
    statistics and the key-value cache are explicit: given as `stats=` or `cache=`, apply returns
    `(outputs, new stats or cache)`. `stats()` and `cache(batch, length)` make the initial ones; a model without batch
    statistics has an empty tree.
    """

    config: Any
    init: Callable[[jax.Array], Params]
    apply: Apply
    axes: Callable[[], Params]
    """The tree of params with `Axes` for arrays: the logical axes of each, and its kind."""
    shapes: Callable[[], Params]
    """The tree of params as `jax.ShapeDtypeStruct`, computed from shapes alone."""
    stats: Callable[[], Params]
    cache: EmptyCache
    inputs: InputShapes
    unembedding: Callable[[Params], jax.Array] | None = None
    """The output layer (V, D) of a language model, for losses that never hold all logits."""
    longest: int | None = None
    """The most tokens `apply` takes; None: no limit."""
    auxiliary: bool = False
    """Whether `apply(..., auxiliary=True)` gives `(outputs, {name: loss})`: weighted losses to add to the mean, which
    compare the examples of a batch, as a balance of experts does."""
    rule: quantization.Rule | None = None
    """Which of its products are in eight bits; None: none of them."""

    def count(self) -> int:
        """Number of parameters, from shapes alone."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes()))


@dataclass(frozen=True)
class Family:
    """What a family states: its config class, its network, and its published presets."""

    name: str
    config: type
    network: Callable[[Any], nn.Module]
    """The Linen module for a config."""
    inputs: Callable[[Any, int, int], Inputs]
    """(config, batch, length) -> what `apply` takes."""
    presets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Published configs by name."""
    cache: Callable[[Any, int, int], dict[str, Any]] | None = None
    """(config, batch, length) -> an empty cache, for a family that decodes."""
    unembedding: Callable[[Any, Params], jax.Array] | None = None
    """(config, params) -> the output layer (V, D), for a language model."""
    longest: Callable[[Any], int] | None = None
    """The most tokens that a config's model takes, where there is a limit."""
    auxiliary: bool = False
    """Whether `apply` takes `auxiliary=True`, as `Model.auxiliary` says."""


def functional(config: Any, family: Family) -> Model:
    """The pure functions of a family's network.

    Raises:
        UserError: the family's functions do not give a module and the shapes of its inputs.
    """
    module = family.network(config)
    if not isinstance(module, nn.Module):
        raise UserError(
            f"got model family {family.name!r}, whose network gives {shown(module)}, expected a Linen module"
        )
    if outside(config):
        _check_call(family, module)

    def inputs(batch: int, length: int = 8) -> Inputs:
        found: Any = family.inputs(config, batch, length)
        if not isinstance(found, tuple | list) or not all(isinstance(x, jax.ShapeDtypeStruct) for x in found):
            raise UserError(
                f"got model family {family.name!r}, whose inputs gives {shown(found)}, expected a tuple of "
                "jax.ShapeDtypeStruct, one for each input"
            )
        return tuple(found)

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
        return declared_axes(boxed()["params"])

    def shapes() -> Params:
        return nn.unbox(boxed())["params"]

    def stats() -> Params:
        if "stats" not in boxed():
            return {}
        # compiled, so that the parameters beside them are never made
        return jax.jit(lambda: nn.unbox(variables(jax.random.key(0)))["stats"])()

    def cache(batch: int, length: int) -> dict[str, Any]:
        if family.cache is None:
            raise UserError(f"got a key-value cache for {family.name}, expected a model that decodes")
        return family.cache(config, batch, length)

    def apply(
        params: Params,
        *inputs: Any,
        stats: Params | None = None,
        rng: jax.Array | None = None,
        keep: bool = False,
        **options: Any,
    ) -> Any:
        rngs = None if rng is None else {"dropout": rng, "latent": jax.random.fold_in(rng, 1)}
        given, returned = {"params": params}, [INNER] * keep
        if stats is not None:
            given, returned = {**given, "stats": stats}, ["stats", *returned]
        if not returned:
            return module.apply(given, *inputs, rngs=rngs, **options)
        out, updated = module.apply(given, *inputs, rngs=rngs, mutable=returned, **options)
        out = (out, updated.get(INNER, {})) if keep else out
        return out if stats is None else (out, updated.get("stats", {}))

    def unembedding(params: Params) -> jax.Array:
        assert family.unembedding is not None
        table: Any = family.unembedding(config, params)
        if isinstance(table, Adapted):
            return merged(table, ("vocab", "embed"), "embedding")
        return dequantize(table) if isinstance(table, Coded) else table

    return Model(
        config,
        init,
        apply,
        axes,
        shapes,
        stats,
        cache,
        inputs,
        None if family.unembedding is None else unembedding,
        None if family.longest is None else family.longest(config),
        family.auxiliary,
    )


def _check_call(family: Family, module: Any) -> None:
    """Refuse a network that cannot be told whether it trains."""
    taken = inspect.signature(module.__call__).parameters.values()
    if not any(each.name == "train" or each.kind is each.VAR_KEYWORD for each in taken):
        raise UserError(
            f"got model family {family.name!r}, whose network takes ({', '.join(str(x) for x in taken)}), expected the "
            "keyword train too, which says whether dropout is on, try def __call__(self, x, *, train=False)"
        )


def quantized(model: Model, rule: quantization.Rule) -> Model:
    """The model with its products with weights in eight bits, as far as the rule says; parameters stay float32.

    Raises:
        UserError: the rule covers none of its products.
    """
    leaves = jax.tree.leaves(model.axes(), is_leaf=lambda x: isinstance(x, tuple))
    matrices = [[name for name in axes if name != "layers"] for axes in leaves if axes.kind == "matrix"]
    if not any(map(rule.covers, matrices)):
        raise UserError(
            f"got quantization to {rule.kind} for {type(model.config).__name__}, expected a model with weights of the "
            f"axes {', '.join(rule.axes)} alone, try --train.quantize none"
        )

    def apply(*args: Any, **kwargs: Any) -> Any:
        with quantization.ambient(rule):
            return model.apply(*args, **kwargs)

    return dataclasses.replace(model, apply=apply, rule=rule)


@functools.lru_cache(maxsize=8)
def with_kv_cache(model: Model, kind: KVCache | None) -> Model:
    """The model with a key-value cache of int8 codes, each head of each token with a scale; None: as it is.

    A cache of a head of K numbers has K + 4 bytes in place of 4 K, or of 2 K in bfloat16. Of a model that reads a
    source, keys and values of the source stay numbers.

    Raises:
        UserError: it does not decode, its cache is no keys and values, or there is no such kind.
    """
    if kind is None:
        return model
    if kind not in get_args(KVCache):
        raise UserError(f"got kv_cache {kind!r}, expected int8 or None, try kv_cache='int8'")
    held = jax.eval_shape(lambda: model.cache(1, 8))
    if set(held) != {"layers", "length"} or set(held["layers"]) != {"k", "v"}:
        raise UserError(
            f"got a key-value cache in {kind} for {type(model.config).__name__}, whose cache is a state and no keys "
            "and values, expected a model with attention, try it without"
        )

    def cache(batch: int, length: int) -> dict[str, Any]:
        shapes = jax.eval_shape(lambda: model.cache(batch, length))
        make = lambda shape, dtype: Coded(jnp.zeros(shape, dtype), jnp.zeros((*shape[:-1], 1)))  # noqa: E731
        codes = {name: make(leaf.shape, kind) for name, leaf in shapes["layers"].items()}
        return {"layers": codes, "length": jnp.zeros_like(shapes["length"])}

    return dataclasses.replace(model, cache=cache)
