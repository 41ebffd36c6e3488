"""Structured pruning: units, channels, heads and layers are removed, and what is left is an ordinary, smaller config.

No family is named here. What belongs to a unit is found by its size: the dimensions that change with a field of the
config. That they are those of one set of units is then proved on data: the same permutation of all of them must leave
what the model computes as it was.
"""

from __future__ import annotations

import dataclasses
import math
import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import tasks
from jaxmodels.compress.calibration import Calibration
from jaxmodels.compress.coding import named
from jaxmodels.compress.methods import Compressed, MethodConfig, Work
from jaxmodels.config import Config
from jaxmodels.errors import UserError, nearest
from jaxmodels.fields import MOST
from jaxmodels.models.observed import Order
from jaxmodels.tasks.task import Task
from jaxmodels.train.arrays import named_leaves, nest

Leaves = dict[str, Any]
"""Parameters and batch statistics by path: params/model/layers/mlp/up/w."""


@dataclass(frozen=True)
class Structured(MethodConfig):
    """Units, channels, heads and layers that the loss depends on least are removed, and the model is a smaller one."""

    fields: tuple[str, ...] = ()
    """The smaller model, as FIELD=VALUE or FIELD=VALUE,VALUE: mlp_width=256, layers=3, widths=8,16,32."""

    asks: ClassVar = "sums"

    def smaller(self, model: Any) -> Any:
        """Return the config of the smaller model.

        Raises:
            UserError: a field is none of the model's, is no size, or is not smaller.
        """
        if not self.fields:
            raise UserError("got structured without --fields, expected some, try --fields mlp_width=256")
        changed: dict[str, Any] = {}
        known = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
        hints = get_type_hints(type(model))
        # a size that is not given follows from others
        derived = [name for name, value in known.items() if value is None and int in get_args(hints[name])]
        sizes = [name for name, value in known.items() if _sizes(value) or name in derived]
        for text in self.fields:
            name, _, value = text.partition("=")
            name = name.strip().replace("-", "_")
            if name not in sizes:
                raise UserError(
                    f"got fields {text!r}, expected sizes of the model, of {', '.join(sizes)}{nearest(name, sizes)}"
                )
            before, values = (MOST,) if name in derived else _sizes(known[name]), value.split(",")
            if not all(each.strip().isdecimal() for each in values) or len(values) != len(before):
                example = ",".join(str(max(1, each // 2)) for each in before)
                raise UserError(f"got fields {text!r}, expected {len(before)} whole numbers, try {name}={example}")
            after = tuple(map(int, values))
            if any(new > old or new < 1 for old, new in zip(before, after, strict=True)) or after == before:
                raise UserError(f"got fields {text!r} of a model with {known[name]}, expected fewer and at least 1")
            changed[name] = after if isinstance(known[name], tuple) else after[0]
        return dataclasses.replace(model, **changed)

    def check(self, work: Work) -> None:
        built(work.config, self.smaller(work.config.model))

    def apply(self, work: Work) -> Compressed:
        target, model, calibration = self.smaller(work.config.model), work.config.model, work.calibration
        assert calibration is not None
        leaves = named_leaves({"params": work.params, "stats": work.stats})
        facts: dict[str, dict[str, Any]] = {}
        for name, index in _differences(model, target):
            old, new = (_sizes(getattr(each, name)) or (None,) for each in (model, target))
            old, new = old[index], new[index]
            assert new is not None
            following = _with(model, name, index, new)
            state = State(work.config, model, leaves, calibration)
            old, leaves = state.narrowed(following, name, old, new)
            model = following
            label = f"{name}[{index}]" if isinstance(getattr(model, name), tuple) else name
            facts[f"model/{label}"] = {"before": old, "after": new}
            work.report(f"{label}: {new} of {old}")
        tree = nest(leaves)
        config = dataclasses.replace(work.config, model=model)
        return Compressed(config, tree["params"], tree.get("stats", {}), facts, {})


class Part(NamedTuple):
    """A dimension of a leaf in which units lie, each `each` times: as its rows if `outer`, or one after the other."""

    leaf: str
    axis: int
    each: int = 1
    outer: bool = False

    def along(self, x: Any) -> Any:
        """Return the leaf with the units as its first dimension."""
        x = jnp.moveaxis(x, self.axis, 0)
        units = x.shape[0] // self.each
        if self.outer:
            return x.reshape(units, self.each, *x.shape[1:])
        return jnp.moveaxis(x.reshape(self.each, units, *x.shape[1:]), 1, 0)

    def taken(self, x: Any, units: Any) -> Any:
        """Return the leaf with these units."""
        chosen = self.along(x)[units]
        if not self.outer:
            chosen = jnp.moveaxis(chosen, 0, 1)
        return jnp.moveaxis(chosen.reshape(-1, *chosen.shape[2:]), 0, self.axis)


class State(NamedTuple):
    """A model on its way to a smaller one."""

    config: Config
    model: Any
    leaves: Leaves
    calibration: Calibration

    def narrowed(self, following: Any, name: str, old: int | None, new: int) -> tuple[int, Leaves]:
        """Return a size, and the leaves of the model in which it is smaller; None stands for one that was not given.

        Raises:
            UserError: other sizes would change too, or what changes is no set of units.
        """
        task, after = self.task, built(self.config, following)
        shapes = _shapes(after)
        if shapes.keys() != self.leaves.keys():
            lost = next(iter(self.leaves.keys() - shapes.keys()), "others").partition("/")[2]
            raise UserError(
                f"got fields {name}={new}, by which {lost} would be gone, expected a size of its parameters, or the "
                "layers of one stack"
            )
        axes = {f"params/{path}": each for path, each in named(task.networks).items()}
        parts: list[Part] = []
        if old is None:
            pairs = [pair for leaf, x in self.leaves.items() for pair in zip(x.shape, shapes[leaf].shape, strict=True)]
            old = next((a for a, b in pairs if a > b == new), 0)
            if not old:
                raise UserError(f"got fields {name}={new}, which is not smaller than it was, expected fewer")
        for leaf, x in self.leaves.items():
            for axis, (a, b) in enumerate(zip(x.shape, shapes[leaf].shape, strict=True)):
                if a == b:
                    continue
                if a % old or b != a // old * new:
                    raise UserError(
                        f"got fields {name}={new}, by which {leaf.partition('/')[2]} of {x.shape} would become "
                        f"{shapes[leaf].shape}, expected {a} to shrink as {old} to {new} does, try other fields too"
                    )
                parts.append(Part(leaf, axis, a // old))
        if all(axes.get(part.leaf, ("",))[part.axis] == "layers" for part in parts):
            return old, self.shallower(parts, name, old, new)
        return old, self.without(task, parts, axes, name, new)

    @property
    def task(self) -> Task:
        return built(self.config, self.model)

    def shallower(self, parts: Sequence[Part], name: str, depth: int, count: int) -> Leaves:
        """Remove one layer after the other, each time the one without which the loss is lowest."""
        leaves = dict(self.leaves)
        for left in range(depth - 1, count - 1, -1):
            task = built(self.config, _with(self.model, name, 0, left))
            measure = jax.jit(partial(_loss, task))
            losses = []
            for layer in range(left + 1):
                tried = {**leaves, **{p.leaf: jnp.delete(leaves[p.leaf], layer, axis=0) for p in parts}}
                with jax.set_mesh(self.calibration.mesh):
                    losses.append(sum(float(measure(tried, batch)) for batch in self.calibration.batches))
            gone = int(np.argmin(losses))
            leaves |= {p.leaf: jnp.delete(leaves[p.leaf], gone, axis=0) for p in parts}
        return leaves

    def without(self, task: Task, parts: list[Part], axes: Mapping[str, Any], name: str, new: int) -> Leaves:
        """Remove the units that the loss depends on least, of each set of units on its own where that is one."""
        stacked = {part.leaf for part in parts if axes.get(part.leaf, ("",))[0] == "layers"}
        matrices = [p.leaf.removeprefix("params/") for p in parts if p.leaf in axes and axes[p.leaf].kind == "matrix"]
        calibration = dataclasses.replace(self.calibration, task=task, order=Order())
        order = calibration.in_order(*self._trees(), list(dict.fromkeys(matrices)))
        value, gradients = jax.jit(partial(_loss, task)), jax.jit(jax.grad(partial(_loss, task), allow_int=True))
        with jax.set_mesh(self.calibration.mesh):
            batch = self.calibration.batches[0]
            base = float(value(self.leaves, batch))
            found = [gradients(self.leaves, each) for each in self.calibration.batches]
            leaves = dict(self.leaves)
            for group in self._groups(value, batch, base, parts, _chains(parts, order, axes), name):
                depth = self.leaves[group[0].leaf].shape[0] if {p.leaf for p in group} <= stacked else None
                leaves = self._chosen(leaves, found, group, new, depth)
        return leaves

    def _trees(self) -> tuple[Any, Any]:
        tree = nest(self.leaves)
        return tree["params"], tree.get("stats", {})

    def _groups(
        self, value: Any, batch: Any, base: float, parts: list[Part], chains: list[list[Part]], name: str
    ) -> list[list[Part]]:
        """Return the finest sets of parts that a permutation proves to be of the same units.

        Raises:
            UserError: there are none.
        """
        for groups in (chains, [parts]):
            for outer in (False, True):
                tried = [[p._replace(outer=outer) for p in group] for group in groups]
                if all(group and self._permutable(value, batch, base, group) for group in tried):
                    return tried
        raise UserError(
            f"got fields {name}, whose units cannot be told apart: permuting them changes what the model computes, "
            "expected independent units such as an MLP's, channels or heads"
        )

    def _permutable(self, value: Any, batch: Any, base: float, group: Sequence[Part]) -> bool:
        units = self.leaves[group[0].leaf].shape[group[0].axis] // group[0].each
        order = np.random.default_rng(0).permutation(units)
        moved = {}
        for part in group:
            moved[part.leaf] = part.taken(moved.get(part.leaf, self.leaves[part.leaf]), order)
        return math.isclose(float(value({**self.leaves, **moved}, batch)), base, rel_tol=1e-4, abs_tol=1e-4)

    def _chosen(
        self, leaves: Leaves, gradients: Sequence[Leaves], group: Sequence[Part], new: int, depth: int | None
    ) -> Leaves:
        """Return leaves with the units that matter most, in their order; of a stack each layer has its own.

        What a unit matters is the square of what its removal changes the loss by, to the first order, on each batch
        (Molchanov et al. 2019, equation 8).
        """

        def scores(layer: int | None) -> np.ndarray:
            total: Any = 0.0
            for gradient in gradients:
                change: Any = 0.0
                for part in group:
                    if part.leaf.startswith("params/"):
                        product = part.along(gradient[part.leaf] * self.leaves[part.leaf])
                        if layer is not None:  # the stack, which was the first dimension, follows the units
                            product = jnp.take(product, layer, axis=2)
                        change = change + product.reshape(len(product), -1).sum(1)
                total = total + jnp.square(change)
            return np.asarray(total)

        leaves = dict(leaves)
        if depth is None:
            kept = np.sort(np.argsort(-scores(None), kind="stable")[:new])
            for part in group:
                leaves[part.leaf] = part.taken(leaves[part.leaf], kept)
            return leaves
        chosen = [np.sort(np.argsort(-scores(layer), kind="stable")[:new]) for layer in range(depth)]
        for part in group:
            inner = part._replace(axis=part.axis - 1)
            leaves[part.leaf] = jnp.stack([inner.taken(x, chosen[i]) for i, x in enumerate(leaves[part.leaf])])
        return leaves


def _chains(parts: Sequence[Part], order: Sequence[str], axes: Mapping[str, Any]) -> list[list[Part]]:
    """Guess sets of parts: the outputs of a matrix, what is beside it, and the inputs of the next one."""
    matrices = [f"params/{name}" for name in order]
    last = {name: axes[name] for name in matrices}

    def is_output(part: Part) -> bool:
        names = last[part.leaf]
        return part.axis == len(names) - 1 or (names[-1] == "head_dim" and part.axis == len(names) - 2)

    outputs = [p for name in matrices for p in parts if p.leaf == name and is_output(p)]
    groups: dict[str, list[Part]] = {p.leaf: [p] for p in outputs}
    for part in parts:
        if part in outputs:
            continue
        if part.leaf in last:  # inputs: of the nearest matrix before it that gives such units
            before = [p.leaf for p in outputs if matrices.index(p.leaf) < matrices.index(part.leaf)]
            owners = before[-1:]
        else:
            near = {leaf: len(os.path.commonpath([_below(leaf), _below(part.leaf)])) for leaf in groups}
            owners = [max(near, key=lambda leaf: near[leaf])] if near else []
        for owner in owners:
            groups[owner].append(part)
    return list(groups.values())


def _below(leaf: str) -> str:
    return "/" + leaf.partition("/")[2]


def _loss(task: Task, leaves: Leaves, batch: Any) -> jax.Array:
    """Return the loss of a batch, a sum, as it is evaluated."""
    tree = nest(leaves)
    total: Any = task.metrics(tree["params"], tree.get("stats", {}), batch)["loss"][0]
    return total


def built(config: Config, model: Any) -> Task:
    """Build the task of a config with another model."""
    return tasks.build(config.task, model, config.data, config.train, config.eval.metrics)


def _shapes(task: Task) -> Leaves:
    params = {name: network.shapes() for name, network in task.networks.items()}
    stats = {name: tree for name, network in task.networks.items() if (tree := jax.eval_shape(network.stats))}
    return named_leaves({"params": params, "stats": stats})


def _sizes(value: Any) -> tuple[int, ...]:
    """Return a field's sizes; empty if it has none."""
    values = value if isinstance(value, tuple) else (value,)
    return values if values and all(type(each) is int for each in values) else ()


def _with(model: Any, name: str, index: int, value: int) -> Any:
    """Return a config with one size changed."""
    before = getattr(model, name)
    sizes = tuple(value if i == index else each for i, each in enumerate(_sizes(before)))
    return dataclasses.replace(model, **{name: sizes if isinstance(before, tuple) else value})


def _differences(model: Any, target: Any) -> list[tuple[str, int]]:
    """Return which sizes differ: field and place in it."""
    return [
        (field.name, i)
        for field in dataclasses.fields(model)
        if getattr(model, field.name) != getattr(target, field.name)
        for i, (a, b) in enumerate(
            zip(_sizes(getattr(model, field.name)) or (None,), _sizes(getattr(target, field.name)), strict=True)
        )
        if a != b
    ]
