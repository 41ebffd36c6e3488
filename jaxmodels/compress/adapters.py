"""Adapters: which parameters get low-rank factors, and how a model's parameters are divided into frozen and trained."""

from __future__ import annotations

import functools
import math
import operator
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmodels.compress.coding import Coding
from jaxmodels.compress.patterns import matched, matches
from jaxmodels.errors import UserError
from jaxmodels.fields import Positive, Range, Section
from jaxmodels.models.adapted import Adapted, Factors, norm, sides, summed
from jaxmodels.models.coded import is_coded, value
from jaxmodels.models.model import Model
from jaxmodels.models.parameters import Axes
from jaxmodels.registry import Registry

ADAPTERS = Registry(
    "adapter",
    "jaxmodels.adapters",
    {"lora": "jaxmodels.compress.adapters:LoRA", "dora": "jaxmodels.compress.adapters:DoRA"},
)
Rank = Annotated[int, Range(1, 2**14)]


@dataclass(frozen=True)
class AdapterConfig(Section, section="adapter", kinds=ADAPTERS):
    """What is trained beside frozen parameters. Patterns are of paths below the network, such as layers/attn/q/w."""

    targets: tuple[str, ...] = ("*/attn/*",)
    """Patterns of the matrices and embeddings that get factors: */attn/*, */mlp/*, layers/attn/q/w, *."""
    full: tuple[str, ...] = ()
    """Patterns of parameters that are trained themselves, such as head/*. All others are frozen."""
    rank: Rank = 8
    """Rank r of the factors: a (inputs, r) and b (r, outputs)."""
    alpha: Positive = 16.0
    """The factors' product is multiplied by alpha / r."""
    stabilized: bool = False
    """Multiply by alpha / sqrt(r) instead (rsLoRA; Kalajdzievski 2023)."""
    ranks: tuple[str, ...] = ()
    """Ranks of some targets, as PATTERN=N: */mlp/*=16. The last one that matches counts."""
    alphas: tuple[str, ...] = ()
    """Alphas of some targets, as PATTERN=NUMBER: */mlp/*=32. The last one that matches counts."""
    source: str | None = None
    """Directory to take the factors from: an adapted run, or an adapter in PEFT's format. None: they start without
    effect."""

    def __post_init__(self) -> None:
        if not self.targets:
            raise UserError("got adapter.targets without a pattern, expected some, try --adapter.targets '*/attn/*'")
        for field, least in (("ranks", 1.0), ("alphas", 0.0)):
            for text in getattr(self, field):
                pattern, _, value = text.rpartition("=")
                if not pattern or not _is_number(value, whole=field == "ranks", least=least):
                    what = "PATTERN=N with a rank of at least 1" if field == "ranks" else "PATTERN=NUMBER above 0"
                    raise UserError(f"got adapter.{field} {text!r}, expected {what}, try '*/mlp/*=16'")

    @property
    @abstractmethod
    def magnitudes(self) -> bool:
        """Whether outputs have lengths of their own."""

    def rank_of(self, name: str) -> int:
        """Return the rank of a target."""
        return int(_last(self.ranks, name, self.rank))

    def scale_of(self, name: str) -> float:
        """Return what the product of a target's factors is multiplied by."""
        alpha, rank = _last(self.alphas, name, self.alpha), self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.stabilized else rank)


@dataclass(frozen=True)
class LoRA(AdapterConfig):
    """Low-rank factors beside frozen matrices (Hu et al. 2022)."""

    @property
    def magnitudes(self) -> bool:
        return False


@dataclass(frozen=True)
class DoRA(AdapterConfig):
    """Low-rank factors that turn the weights of each output, whose length is trained apart (Liu et al. 2024)."""

    @property
    def magnitudes(self) -> bool:
        return True


def _is_number(text: str, whole: bool, least: float) -> bool:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        return False
    return math.isfinite(value) and (value >= least if whole else value > least)


def _last(given: Sequence[str], name: str, default: float) -> float:
    found = [text.rpartition("=")[2] for text in given if matches(text.rpartition("=")[0], name)]
    return float(found[-1]) if found else default


class Chosen(NamedTuple):
    """What an adapter does to one parameter."""

    axes: Axes
    rank: int
    """Rank of its factors; 0: it is trained itself."""
    scale: float = 1.0
    magnitude: bool = False


@dataclass(frozen=True)
class Adaptation:
    """An adapter of a task's networks: how their parameters are divided into frozen and trained ones.

    Trees are of all networks: {"model": {"layers": …}}. A trained tree has `Factors` at the paths of adapted
    parameters, whose bases are in the frozen one.
    """

    networks: Mapping[str, Model]
    chosen: Mapping[str, Chosen]
    """By network and path: model/layers/attn/q/w."""
    coding: Coding | None = None
    """Which of the frozen parameters are coded; None: none of them."""

    def divide(self, params: Any, key: jax.Array) -> tuple[Any, Any]:
        """Divide parameters into frozen and trained ones, with factors that have no effect yet."""

        def factors(name: str, w: Any) -> Factors:
            index = sorted(self.chosen).index(name)
            return initial(self.chosen[name], w, jax.random.fold_in(key, index))

        return self._divided(params, factors)

    def axes(self) -> tuple[Any, Any]:
        """Return the logical axes of frozen and of trained parameters."""
        frozen, trained = self._divided(
            {name: network.axes() for name, network in self.networks.items()},
            lambda name, axes: factor_axes(self.chosen[name]),
        )
        return frozen if self.coding is None else self.coding.axes(frozen), trained

    def shapes(self) -> tuple[Any, Any]:
        """Return the shapes of frozen and of trained parameters."""
        params = {name: network.shapes() for name, network in self.networks.items()}
        params = params if self.coding is None else self.coding.shapes()
        return jax.eval_shape(self.divide, params, jax.eval_shape(jax.random.key, 0))

    def renewed(self, frozen: Any, trained: Any) -> Any:
        """Return trained parameters whose magnitudes are the lengths of these bases with these factors."""

        def one(name: str, factors: Any, base: Any) -> Any:
            chosen = self.chosen[name]
            if not chosen.magnitude:
                return factors
            first = sides(chosen.axes, chosen.axes.kind)[0]
            length = norm(summed(Adapted(base, factors), first)).reshape(factors.magnitude.shape)
            return Factors(factors.a, factors.b, length, factors.scale)

        return self.mapped(one, trained, frozen)

    def mapped(self, one: Callable[..., Any], trained: Any, *frozen: Any) -> Any:
        """Return a trained tree with `one(name, factors, *bases)` in place of the factors."""
        tree = jax.tree.map(lambda x: x, trained)
        for name, chosen in self.chosen.items():
            if chosen.rank:
                *path, last = name.split("/")
                owner = functools.reduce(operator.getitem, path, tree)
                owner[last] = one(
                    name, owner[last], *(functools.reduce(operator.getitem, name.split("/"), f) for f in frozen)
                )
        return tree

    def _divided(self, params: Any, factors: Callable[[str, Any], Any]) -> tuple[Any, Any]:
        frozen: dict[str, Any] = {name: {} for name in params}
        trained: dict[str, Any] = {name: {} for name in params}
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            chosen = self.chosen.get(name)
            if chosen is None or chosen.rank:
                _put(frozen, name, leaf)
            if chosen is not None:
                _put(trained, name, factors(name, leaf) if chosen.rank else leaf)
        return frozen, trained


def _is_leaf(x: Any) -> bool:
    return isinstance(x, tuple) or is_coded(x)


def _put(tree: dict[str, Any], name: str, leaf: Any) -> None:
    *path, last = name.split("/")
    functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)[last] = leaf


def adaptation(section: AdapterConfig, networks: Mapping[str, Model], trains: Sequence[str]) -> Adaptation:
    """Choose what is trained of the networks; `trains` names those that losses train.

    Raises:
        UserError: a pattern matches nothing that it could, a rank is above the size of its matrix, or a network that a
            loss trains would be frozen.
    """
    axes = {
        f"{network}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for network, model in networks.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.axes(), is_leaf=lambda x: isinstance(x, tuple))
    }
    shapes = {
        f"{network}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf.shape
        for network, model in networks.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.shapes())
    }
    fits = {name for name, each in axes.items() if each.kind in ("matrix", "embedding")}
    every = list(axes)
    full = matched("adapter.full", section.full, every, every, "parameter")
    targets = matched("adapter.targets", section.targets, every, sorted(fits), "matrix or embedding")
    targets = [name for name in targets if name not in full]
    if not targets:
        raise UserError(
            f"got adapter.targets {' '.join(section.targets)}, all of which adapter.full trains themselves, expected "
            "some with factors, try other --adapter.targets, or --adapter none"
        )
    for field in ("ranks", "alphas"):
        patterns = [text.rpartition("=")[0] for text in getattr(section, field)]
        matched(f"adapter.{field}", patterns, every, targets, "target", "=16")
    chosen = {name: Chosen(axes[name], 0) for name in full}
    for name in targets:
        below = name.partition("/")[2]
        rank, (first, middle) = section.rank_of(below), sides(axes[name], axes[name].kind)
        most = min(math.prod(shapes[name][first:middle]), math.prod(shapes[name][middle:]))
        if rank > most:
            raise UserError(
                f"got adapter rank {rank} for {below}, a matrix of rank {most} at most, expected no more, "
                f"try --adapter.ranks '{below}={most}'"
            )
        if section.magnitudes and axes[name].kind == "embedding":
            raise UserError(
                f"got adapter dora for {below}, an embedding, expected matrices, try --adapter lora, or other "
                "--adapter.targets"
            )
        chosen[name] = Chosen(axes[name], rank, section.scale_of(below), section.magnitudes)
    for network in trains:
        if not any(name.startswith(network + "/") for name in chosen):
            raise UserError(
                f"got adapter.targets {' '.join(section.targets)}, which match nothing of the network {network}, "
                "expected something of each network that is trained, try --adapter.targets '*'"
            )
    return Adaptation(networks, {name: chosen[name] for name in axes if name in chosen})


def initial(chosen: Chosen, w: Any, key: jax.Array) -> Factors:
    """Return factors that have no effect yet, of a parameter w.

    Of a matrix a is random and b is 0, as in PEFT: a is uniform in ± 1 / sqrt(inputs). Of tables it is the other way
    round: an embedding's b is standard normal, and an output layer's, whose inputs are the table's columns, uniform.
    """
    first, middle = sides(chosen.axes, chosen.axes.kind)
    stacked, inputs, outputs = w.shape[:first], w.shape[first:middle], w.shape[middle:]
    a, b = (*stacked, *inputs, chosen.rank), (*stacked, chosen.rank, *outputs)
    if chosen.axes.is_output:
        bound = math.prod(outputs) ** -0.5
        made = jnp.zeros(a), jax.random.uniform(key, b, jnp.float32, -bound, bound)
    elif chosen.axes.kind == "embedding":
        made = jnp.zeros(a), jax.random.normal(key, b)
    else:
        bound = math.prod(inputs) ** -0.5
        made = jax.random.uniform(key, a, jnp.float32, -bound, bound), jnp.zeros(b)
    length = None
    if chosen.magnitude:
        flat = value(w).reshape(math.prod(stacked), math.prod(inputs), -1)
        length = norm(flat).reshape((*stacked, *outputs))
    return Factors(*made, length, chosen.scale)


def factor_axes(chosen: Chosen) -> Factors:
    """Return the logical axes of a parameter's factors; the rank has none."""
    axes = chosen.axes
    first, middle = sides(axes, axes.kind)
    a = Axes((*axes[:middle], None), "matrix", axes.before_stack)
    b = Axes((*axes[:first], None, *axes[middle:]), "matrix", axes.before_stack)
    length = Axes((*axes[:first], *axes[middle:]), "norm", axes.before_stack) if chosen.magnitude else None
    return Factors(a, b, length, chosen.scale)
